"""Rows as `POST /v1/reward` of a server takes them, and its answers as scores.

Only the fields that are scored are sent. The server sends each reward as the shortest decimal of a float32, and this
module reads it as that float32: bit for bit the value of the server's model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rewardrt.bundle.spec import AggregateRule
from rewardrt.errors import RowError, ServerError
from rewardrt.scoring.scored import Scored, ScoredAnswers, ScoredPair, ScoredRow
from rewardrt.text.rows import INPUT_FIELDS, TEMPLATE_FIELDS, parse_row

FIELDS = (*INPUT_FIELDS, *TEMPLATE_FIELDS, "steps", "instruction")


@dataclass(frozen=True)
class Options:
    """The options for all rows of a request."""

    model: str | None = None
    normalize: bool | None = None
    aggregate: AggregateRule | None = None


def encode_row(row: object) -> bytes:
    """Return the JSON to send for a row. Raises RowError for an invalid row, with the messages of offline scoring."""
    parse_row(row)
    assert isinstance(row, dict)
    sent = {name: row[name] for name in FIELDS if row.get(name) is not None}
    try:
        return json.dumps(sent, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise RowError(f"expected JSON values only, found something else ({error})") from None


def encode_request(rows: Sequence[bytes], options: Options, *, objectives: bool) -> bytes:
    """Return the body of a request."""
    given = {"model": options.model, "normalize": options.normalize, "aggregate": options.aggregate}
    given |= {"objectives": objectives or None}
    head = json.dumps({name: value for name, value in given.items() if value is not None})
    return head[:-1].encode() + (b", " if len(head) > 2 else b"") + b'"rows": [' + b", ".join(rows) + b"]}"


def decode_answer(body: bytes, count: int, labels: Sequence[str], where: str) -> list[ScoredRow | RowError]:
    """Return the results of the rows in an answer. Raises ServerError if the body is not an answer to `count` rows."""
    try:
        rows = json.loads(body)["rows"]
        if len(rows) != count:
            raise ValueError(f"{len(rows)} rows")
        return [_result(row, labels) for row in rows]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ServerError(f"{where}: expected a RewardRT server's answer to {count} rows, found {error!r}") from error


def _result(row: dict[str, Any], labels: Sequence[str]) -> ScoredRow | RowError:
    if "error" in row:
        return RowError(str(row["error"]))
    tokens, truncated, named = row["tokens"], row["truncated"], row.get("objectives")
    if not isinstance(tokens, list):
        steps = tuple(map(_float32, row.get("step_rewards", ())))
        reward = _float32(row["reward"]) if "reward" in row or not steps else float("nan")
        return Scored(reward, tokens, truncated, _objectives(named, labels), steps=steps)
    pair = "chosen_reward" in row
    rewards = [row["chosen_reward"], row["rejected_reward"]] if pair else row["rewards"]
    compared = row.get("comparisons") or [()] * len(rewards)
    objectives = named or [None] * len(rewards)
    answers = [
        Scored(_float32(reward), count, cut, _objectives(values, labels), tuple(map(_float32, others)))
        for reward, count, cut, values, others in zip(rewards, tokens, truncated, objectives, compared, strict=True)
    ]
    return ScoredPair(*answers) if pair else ScoredAnswers(tuple(answers))


def _objectives(named: dict[str, float] | None, labels: Sequence[str]) -> tuple[float, ...]:
    return () if named is None else tuple(_float32(named[label]) for label in labels)


def _float32(value: float) -> float:
    if not isinstance(value, int | float):
        raise TypeError(f"a reward that is {type(value).__name__}")
    return float(np.float32(value))
