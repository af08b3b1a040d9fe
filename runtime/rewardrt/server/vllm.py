"""vLLM's scoring routes: `/classify`, `/score`, `/rerank` and `/pooling`, as verl and vLLM's own examples call them.

Texts get the tokenizer's special tokens unless `add_special_tokens` is false, as vLLM adds them: its clients strip the
BOS that a chat template writes. Rewards are raw unless `use_activation` is true, which is a sigmoid; `activation` is
the older name of the same field, and vLLM ignores it now.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from rewardrt.scoring.scored import Scored, shortest
from rewardrt.server.call import (
    CONVERSATION,
    Call,
    Dialect,
    Incoming,
    Outcome,
    Scoring,
    answers,
    conversation,
    cut,
    ranking,
    reward_of,
    single_rewards,
    texts,
)
from rewardrt.server.models import Served
from rewardrt.server.problem import Problem
from rewardrt.server.schema import (
    BOOLEAN,
    INTEGER,
    MESSAGES,
    NOTHING,
    NUMBER,
    OBJECT,
    STRING,
    STRINGS,
    array,
    body,
    only,
)
from rewardrt.text.items import TokenIds
from rewardrt.text.rows import Row

INPUT = {"anyOf": [STRING, STRINGS, array(INTEGER), array(array(INTEGER))]}
# What vLLM takes everywhere and no score depends on.
NEUTRAL = {
    "model": STRING,
    "user": STRING,
    "request_id": STRING,
    "priority": INTEGER,
    "cache_salt": STRING,
    "encoding_format": only("float"),
}
SHARED: dict[str, Any] = NEUTRAL | {
    "use_activation": BOOLEAN,
    "activation": BOOLEAN,
    "truncate_prompt_tokens": INTEGER | {"minimum": -1},
    "truncation_side": only("right"),
}
CHAT = {
    "messages": MESSAGES,
    "add_generation_prompt": only(False),
    "continue_final_message": only(False),
    "chat_template": NOTHING,  # the bundle's own is what the model was trained on
    "chat_template_kwargs": OBJECT,
    "tools": array(OBJECT),
    "documents": array(OBJECT),
}
CLASSIFY_BODY = body(input=INPUT, add_special_tokens=BOOLEAN, **SHARED, **CHAT)
POOLING_BODY = body(
    input=INPUT,
    add_special_tokens=BOOLEAN,
    task=only("classify", "token_classify"),
    **SHARED,
    **CHAT,
)
TEXT_OR_TEXTS = {"anyOf": [STRING, STRINGS]}
SCORE_BODY = body(queries=TEXT_OR_TEXTS, documents=TEXT_OR_TEXTS, text_1=TEXT_OR_TEXTS, text_2=TEXT_OR_TEXTS, **SHARED)
RERANK_BODY = body(
    {"query": STRING, "documents": array({"anyOf": [STRING, body({"text": STRING})]})},
    top_n=INTEGER | {"minimum": 0},
    return_documents=BOOLEAN,
    **SHARED,
)
USAGE = {"type": "object", "properties": {"prompt_tokens": INTEGER, "total_tokens": INTEGER}}


def listed(item: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of vLLM's answers with `data`."""
    return {
        "type": "object",
        "properties": {
            "id": STRING,
            "object": only("list"),
            "created": INTEGER,
            "model": STRING,
            "data": array({"type": "object", "properties": item, "required": sorted(item)}),
            "usage": USAGE,
        },
        "required": ["id", "object", "created", "model", "data", "usage"],
    }


def refusal(status: int, problem: Problem) -> dict[str, Any]:
    """Return the body of a request that is not answered."""
    if problem.kind == "unauthorized":
        return {"error": "Unauthorized"}
    kinds = {400: "BadRequestError", 404: "NotFoundError", 413: "BadRequestError", 503: "ServiceUnavailableError"}
    kind = kinds.get(status, "InternalServerError")
    return {"error": {"message": problem.message, "type": kind, "param": None, "code": status}}


def usage(scores: Sequence[Scored]) -> dict[str, Any]:
    """Return what a request was charged for."""
    tokens = sum(score.tokens for score in scores)
    return {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0, "prompt_tokens_details": None}


def envelope(kind: str, served: Served, scores: Sequence[Scored], data: list[Any]) -> dict[str, Any]:
    """Return vLLM's answer around `data`."""
    return {
        "id": f"{kind}-{secrets.token_hex(8)}",
        "object": "list",
        "created": int(time.time()),
        "model": served.name,
        "data": data,
        "usage": usage(scores),
    }


def text_rows(served: Served, value: Any, *, special_tokens: bool) -> tuple[Row, ...]:
    """Return a row for each text or list of token ids of an `input`."""
    single_rewards(served)
    if isinstance(value, str):
        return texts(served, [value], special_tokens=special_tokens)
    if value and isinstance(value[0], str):
        return texts(served, value, special_tokens=special_tokens)
    if not value:
        raise Problem("validation", "input: expected at least one text, found none")
    lists = value if isinstance(value[0], list) else [value]
    return tuple(Row("single", (TokenIds(tuple(map(int, ids))),)) for ids in lists)


def input_rows(served: Served, wanted: dict[str, Any]) -> tuple[Row, ...]:
    """Return the rows of `input`, or the one of `messages`."""
    value, messages = wanted.get("input"), wanted.get("messages")
    if (value is None) == (messages is None):
        raise Problem("validation", "body: expected either input or messages")
    special = wanted.get("add_special_tokens")
    if messages is None:
        if given := [name for name in CONVERSATION if wanted.get(name) is not None]:
            raise Problem("validation", f"{given[0]}: expected this field only beside messages")
        return text_rows(served, value, special_tokens=special is not False)
    if special:
        raise Problem("validation", "add_special_tokens: expected false with messages; the template writes them")
    single_rewards(served)
    return conversation(served, wanted)


def limits(wanted: dict[str, Any]) -> dict[str, Any]:
    """Return what `truncate_prompt_tokens` says: nothing, the model's own limit (-1), or a lower one."""
    value = wanted.get("truncate_prompt_tokens")
    if value is None:
        return {}
    if value == 0:
        raise Problem("validation", "truncate_prompt_tokens: expected -1 or at least 1, found 0")
    return {"overflow": "cut", "max_length": None if value == -1 else int(value)}


def sigmoid(wanted: dict[str, Any]) -> bool:
    """Return whether the request asks for a value between 0 and 1."""
    new, old = wanted.get("use_activation"), wanted.get("activation")
    if new is not None and old is not None and new != old:
        raise Problem("validation", f"activation: expected the value of use_activation, {new}; found {old}")
    return bool(new or old)


def classify(incoming: Incoming) -> Call:
    """Give each text its reward as the one class's `probs`."""
    wanted = incoming.body
    served, squash = incoming.models.choose(wanted.get("model")), sigmoid(wanted)

    def render(outcome: Outcome) -> dict[str, Any]:
        scores = outcome.scores
        data = [
            {"index": index, "label": "LABEL_0", "probs": [reward_of(score, sigmoid=squash)], "num_classes": 1}
            | cut(score)
            for index, score in enumerate(scores)
        ]
        return envelope("classify", served, scores, data)

    return Call(served, input_rows(served, wanted), render, **limits(wanted))


def pooling(incoming: Incoming) -> Call:
    """Give each text its reward, or with "token_classify" the reward after every token where the bundle has them."""
    wanted = incoming.body
    served, squash = incoming.models.choose(wanted.get("model")), sigmoid(wanted)
    every = wanted.get("task") == "token_classify"
    if every and (squash or not served.model.session.has_token_rewards):
        found = "use_activation" if squash else f"model {served.name!r}, which has no rewards of tokens"
        raise Problem("validation", f"task: expected classify with {found}")

    def render(outcome: Outcome) -> dict[str, Any]:
        scores = outcome.scores
        data = []
        for index, score in enumerate(scores):
            values: list[Any] = [reward_of(score, sigmoid=squash)]
            if every:
                values = [[shortest(reward)] for _, reward in outcome.token_rewards.get(index, [])]
            data.append({"index": index, "object": "pooling", "data": values} | cut(score))
        return envelope("pool", served, scores, data)

    return Call(served, input_rows(served, wanted), render, every_token=every, **limits(wanted))


def score(incoming: Incoming) -> Call:
    """Score answers (documents) to prompts (queries), one to many or one to one."""
    wanted = incoming.body
    served, squash = incoming.models.choose(wanted.get("model")), sigmoid(wanted)
    firsts, seconds = (_texts(wanted, *names) for names in (("queries", "text_1"), ("documents", "text_2")))
    if len(firsts) == 1:
        firsts = firsts * len(seconds)
    if len(firsts) != len(seconds):
        raise Problem("validation", f"queries: expected 1 or {len(seconds)}, as many as documents; found {len(firsts)}")

    def render(outcome: Outcome) -> dict[str, Any]:
        scores = outcome.scores
        data = [
            {"index": index, "object": "score", "score": reward_of(each, sigmoid=squash)} | cut(each)
            for index, each in enumerate(scores)
        ]
        return envelope("score", served, scores, data)

    single_rewards(served)
    rows = answers(served, list(zip(firsts, seconds, strict=True)))
    return Call(served, rows, render, **limits(wanted))


def _texts(wanted: dict[str, Any], new: str, old: str) -> list[str]:
    given = [name for name in (new, old) if wanted.get(name) is not None]
    if len(given) != 1:
        raise Problem("validation", f"{new}: expected this field or {old}, found {'both' if given else 'neither'}")
    value = wanted[given[0]]
    found: list[str] = [value] if isinstance(value, str) else value
    if not found:
        raise Problem("validation", f"{given[0]}: expected at least one text, found none")
    return found


def rerank(incoming: Incoming) -> Call:
    """Rank documents as answers to the query, best first."""
    wanted = incoming.body
    return rank(incoming.models.choose(wanted.get("model")), wanted)


def rank(served: Served, wanted: dict[str, Any]) -> Call:
    """Rank documents with one model; what an object holds beside its `text` comes back with it."""
    squash = sigmoid(wanted)
    documents = [value if isinstance(value, str) else value["text"] for value in wanted["documents"]]
    shown = wanted.get("return_documents") is not False

    def render(outcome: Outcome) -> dict[str, Any]:
        scores = outcome.scores
        results = [
            {"index": index}
            | ({"document": _shown(wanted["documents"][index])} if shown else {})
            | {"relevance_score": reward_of(scores[index], sigmoid=squash)}
            | cut(scores[index])
            for index in best_first(scores, wanted.get("top_n"))
        ]
        name = f"rerank-{secrets.token_hex(8)}"
        return {"id": name, "model": served.name, "usage": usage(scores), "results": results}

    return Call(served, ranking(served, wanted["query"], documents), render, **limits(wanted))


def _shown(document: Any) -> dict[str, Any]:
    return {"text": document} if isinstance(document, str) else dict(document)


def best_first(scores: Sequence[Scored], top_n: int | None) -> list[int]:
    """Return the indices of the highest rewards; equal ones keep their order. None and 0 are all of them."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index].reward)
    return order[: int(top_n)] if top_n else order


DIALECT = Dialect("vllm", refusal)
RANKED = {
    "type": "object",
    "properties": {
        "id": STRING,
        "model": STRING,
        "usage": USAGE,
        "results": array({"type": "object", "properties": {"index": INTEGER, "relevance_score": NUMBER}}),
    },
    "required": ["id", "model", "usage", "results"],
}
CLASSIFY = Scoring(
    DIALECT,
    CLASSIFY_BODY,
    classify,
    listed({"index": INTEGER, "label": STRING, "probs": array(NUMBER), "num_classes": INTEGER}),
)
POOLING = Scoring(DIALECT, POOLING_BODY, pooling, listed({"index": INTEGER, "object": STRING, "data": array({})}))
SCORE = Scoring(DIALECT, SCORE_BODY, score, listed({"index": INTEGER, "object": STRING, "score": NUMBER}))
RERANK = Scoring(DIALECT, RERANK_BODY, rerank, RANKED)
