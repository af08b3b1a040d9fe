"""What several protocols share: bodies, rows of texts, limits, and the format of rewards.

Protocol modules use this module, and know nothing of each other.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rewardrt.errors import RowError
from rewardrt.scoring.scored import Scored, shortest
from rewardrt.server.call import Call, Outcome
from rewardrt.server.models import Served
from rewardrt.server.problem import Problem, too_many
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
from rewardrt.text.items import RawText, TokenIds
from rewardrt.text.rows import Row

# The fields of a request that determine the text of a conversation.
CONVERSATION = ("messages", "tools", "documents", "chat_template_kwargs", "instruction")
# Schemas of the fields of a conversation that ends with the answer to score.
CHAT: dict[str, Any] = {
    "messages": MESSAGES,
    "add_generation_prompt": only(False),
    "continue_final_message": only(False),
    "chat_template": NOTHING,  # the model was trained with the bundle's own
    "chat_template_kwargs": OBJECT,
    "tools": array(OBJECT),
    "documents": array(OBJECT),
    "instruction": STRING,
}
INPUT = {"anyOf": [STRING, STRINGS, array(INTEGER), array(array(INTEGER))]}
# Fields that vLLM accepts everywhere and that do not affect scores.
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
RERANK_BODY = body(
    {"query": STRING, "documents": array({"anyOf": [STRING, body({"text": STRING})]})},
    top_n=INTEGER | {"minimum": 0},
    return_documents=BOOLEAN,
    instruction=STRING,
    **SHARED,
)
USAGE = {"type": "object", "properties": {"prompt_tokens": INTEGER, "total_tokens": INTEGER}}
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


def texts(served: Served, values: Sequence[str], *, special_tokens: bool = False) -> tuple[Row, ...]:
    """Return a row for each text, which is scored as sent; with `special_tokens`, the tokenizer adds its own."""
    rows = []
    for index, value in enumerate(values):
        row = _parse(served, {"text": value}, f"item {index}")
        if special_tokens:
            row = Row(row.kind, tuple(RawText(value, special_tokens=True) for _ in row.items))
        rows.append(row)
    return tuple(rows)


def answers(served: Served, pairs: Sequence[tuple[str, str]], instruction: str | None = None) -> tuple[Row, ...]:
    """Return a row for each (prompt, answer), all with the same instruction if there is one."""
    return tuple(
        _parse(served, {"prompt": prompt, "response": answer, "instruction": instruction}, f"item {index}")
        for index, (prompt, answer) in enumerate(pairs)
    )


def answered(served: Served, messages: Sequence[Any], answer: str) -> tuple[Row, ...]:
    """Return the row of an answer to the conversation before it."""
    return (_parse(served, {"prompt": list(messages), "response": answer}, ""),)


def ranking(served: Served, query: str, documents: Sequence[str], instruction: str | None = None) -> tuple[Row, ...]:
    """Return the one row of a query and its documents; () if there are no documents."""
    if not documents:
        return ()
    row = {"prompt": query, "responses": list(documents), "instruction": instruction}
    check_texts(served, [row])
    return (_parse(served, row, ""),)


def conversation(served: Served, wanted: Mapping[str, Any]) -> tuple[Row, ...]:
    """Return the row of a conversation that ends with the assistant, with the template's other inputs."""
    return (_parse(served, {name: wanted[name] for name in CONVERSATION if wanted.get(name) is not None}, ""),)


def check_texts(served: Served, rows: Sequence[Any]) -> None:
    """Raise Problem if rows have too many texts together, before they are parsed; an invalid row counts as one text."""
    compared, most, found = served.model.spec.reads_two_answers, served.options.max_items, 0
    for row in rows:
        answers = row.get("responses") if isinstance(row, dict) else None
        count = len(answers) if isinstance(answers, list) else 1
        found += max(1, count * (count - 1) if compared else count)
    if found > most:
        raise too_many(found, most)


def single_rewards(served: Served) -> None:
    """Raise Problem for a model that rewards steps, in a protocol with exactly one reward per text."""
    if served.model.spec.input == "steps":
        message = f"model {served.name!r} rewards steps; expected POST /v1/reward with steps"
        raise Problem("validation", message)


def reward_of(score: Scored, *, sigmoid: bool = False) -> float:
    """Return the reward to send; with `sigmoid`, mapped to 0..1."""
    if not sigmoid:
        return shortest(score.reward)
    value = float(score.reward)
    return shortest(1 / (1 + np.exp(-value)) if value >= 0 else np.exp(value) / (1 + np.exp(value)))


def cut(score: Scored) -> dict[str, int]:
    """Return the field that is added to an item whose text was cut: the number of tokens cut off."""
    return {"truncated": score.truncated} if score.truncated else {}


def _parse(served: Served, row: dict[str, Any], where: str) -> Row:
    try:
        return served.model.answers.parse(row)
    except RowError as error:
        raise Problem("validation", f"{where}: {error}" if where else str(error)) from error


def openai_refusal(status: int, problem: Problem) -> dict[str, Any]:
    """Return the body of a refused request in the format of OpenAI's servers, which vLLM uses too."""
    if problem.kind == "unauthorized":
        return {"error": "Unauthorized"}
    kinds = {400: "BadRequestError", 404: "NotFoundError", 413: "BadRequestError", 503: "ServiceUnavailableError"}
    kind = kinds.get(status, "InternalServerError")
    return {"error": {"message": problem.message, "type": kind, "param": None, "code": status}}


def usage(scores: Sequence[Scored]) -> dict[str, Any]:
    """Return the number of tokens of a request, in OpenAI's format."""
    tokens = sum(score.tokens for score in scores)
    return {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0, "prompt_tokens_details": None}


def text_rows(served: Served, value: Any, *, special_tokens: bool) -> tuple[Row, ...]:
    """Return a row for each text, or each list of token ids, in an `input`."""
    single_rewards(served)
    if isinstance(value, str):
        return texts(served, [value], special_tokens=special_tokens)
    if value and isinstance(value[0], str):
        return texts(served, value, special_tokens=special_tokens)
    if not value:
        raise Problem("validation", "input: expected at least one text, found none")
    lists = value if isinstance(value[0], list) else [value]
    return tuple(Row("single", (TokenIds(tuple(map(int, ids))),)) for ids in lists)


def limits(wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the options for `truncate_prompt_tokens`: none, the model's own limit (-1), or a lower one."""
    value = wanted.get("truncate_prompt_tokens")
    if value is None:
        return {}
    if value == 0:
        raise Problem("validation", "truncate_prompt_tokens: expected -1 or at least 1, found 0")
    return {"overflow": "cut", "max_length": None if value == -1 else int(value)}


def sigmoid(wanted: dict[str, Any]) -> bool:
    """Return whether the request wants rewards mapped to 0..1 by a sigmoid."""
    new, old = wanted.get("use_activation"), wanted.get("activation")
    if new is not None and old is not None and new != old:
        raise Problem("validation", f"activation: expected the value of use_activation, {new}; found {old}")
    return bool(new or old)


def rank(served: Served, wanted: dict[str, Any]) -> Call:
    """Rank documents with one model; other fields of a document object than `text` are returned with it."""
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

    rows = ranking(served, wanted["query"], documents, wanted.get("instruction"))
    return Call(served, rows, render, **limits(wanted))


def _shown(document: Any) -> dict[str, Any]:
    return {"text": document} if isinstance(document, str) else dict(document)


def best_first(scores: Sequence[Scored], top_n: int | None) -> list[int]:
    """Return the indices of the `top_n` highest rewards (None and 0: all); equal rewards keep their order."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index].reward)
    return order[: int(top_n)] if top_n else order
