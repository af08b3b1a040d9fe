"""vLLM's scoring routes: `/classify`, `/score`, `/rerank` and `/pooling`, as verl and vLLM's own examples call them.

As in vLLM, texts get the tokenizer's special tokens unless `add_special_tokens` is false; its clients remove the BOS
that a chat template writes. Rewards are raw unless `use_activation` is true, which applies a sigmoid. `activation` is
the older name of that field, which vLLM now ignores.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from rewardrt.scoring.scored import Scored, shortest
from rewardrt.server.call import Call, Dialect, Incoming, Outcome, Scoring
from rewardrt.server.models import Served
from rewardrt.server.problem import Problem
from rewardrt.server.schema import (
    BOOLEAN,
    INTEGER,
    NUMBER,
    STRING,
    STRINGS,
    array,
    body,
    only,
)
from rewardrt.server.vocabulary import (
    CHAT,
    CONVERSATION,
    INPUT,
    RANKED,
    RERANK_BODY,
    SHARED,
    USAGE,
    answers,
    conversation,
    cut,
    limits,
    openai_refusal,
    rank,
    reward_of,
    sigmoid,
    single_rewards,
    text_rows,
    usage,
)
from rewardrt.text.rows import Row

CLASSIFY_BODY = body(input=INPUT, add_special_tokens=BOOLEAN, **SHARED, **CHAT)
POOLING_BODY = body(
    input=INPUT,
    add_special_tokens=BOOLEAN,
    task=only("classify", "token_classify"),
    **SHARED,
    **CHAT,
)
TEXT_OR_TEXTS = {"anyOf": [STRING, STRINGS]}
SCORE_BODY = body(
    queries=TEXT_OR_TEXTS,
    documents=TEXT_OR_TEXTS,
    text_1=TEXT_OR_TEXTS,
    text_2=TEXT_OR_TEXTS,
    instruction=STRING,
    **SHARED,
)


def listed(item: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of vLLM's answers with a list `data`."""
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


def input_rows(served: Served, wanted: dict[str, Any]) -> tuple[Row, ...]:
    """Return the rows of `input`, or the one row of `messages`."""
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


def classify(incoming: Incoming) -> Call:
    """Return each text's reward as `probs` of a single class."""
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
    """Return each text's reward, or with "token_classify" the reward after every token, if the bundle has them."""
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
    rows = answers(served, list(zip(firsts, seconds, strict=True)), wanted.get("instruction"))
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


DIALECT = Dialect("vllm", openai_refusal)
CLASSIFY = Scoring(
    DIALECT,
    CLASSIFY_BODY,
    classify,
    listed({"index": INTEGER, "label": STRING, "probs": array(NUMBER), "num_classes": INTEGER}),
)
POOLING = Scoring(DIALECT, POOLING_BODY, pooling, listed({"index": INTEGER, "object": STRING, "data": array({})}))
SCORE = Scoring(DIALECT, SCORE_BODY, score, listed({"index": INTEGER, "object": STRING, "score": NUMBER}))
RERANK = Scoring(DIALECT, RERANK_BODY, rerank, RANKED)
