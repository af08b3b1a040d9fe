"""Contiguous parts of the rows, cut between prompts, so that the rows of one prompt stay together for prefix reuse."""

from __future__ import annotations

import itertools
import json
from typing import Any

from rewardrt.data.lines import Line
from rewardrt.data.readers import Rows
from rewardrt.errors import RewardRTError


def shard_bounds(reader: Rows, shard: int, shards: int, group_by: str = "") -> tuple[int, int]:
    """Return the first row of the `shard`-th of `shards` parts, counted from 1, and the row after its last.

    The parts have about equal numbers of rows; together they are all rows in order.
    """
    total = reader.count()
    return tuple(_cut(reader, part, shards, total, group_by) for part in (shard - 1, shard))  # type: ignore[return-value]


def piece_bounds(reader: Rows, rows: int, group_by: str = "") -> list[tuple[int, int]]:
    """Return the bounds of pieces of at least `rows` rows each, except the last. This reads all rows once."""
    cuts, row, before = [0], 0, None
    for line in reader.lines():
        if row >= cuts[-1] + rows - 1:
            prompt = prompt_of(line, group_by)
            if row >= cuts[-1] + rows and _begins(prompt, before, group_by):
                cuts.append(row)
            before = prompt if prompt is not None or not group_by else before
        row += 1
    return list(itertools.pairwise([*cuts, row])) if row else []


def read_shard(text: str) -> tuple[int, int]:
    """Return the two numbers of a text such as `3/8`, or raise RewardRTError."""
    first, _, second = text.partition("/")
    if first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second):
        return int(first), int(second)
    raise RewardRTError(f"--shard {text}: expected i/n, as 1/8, 2/8 ... 8/8")


def _cut(reader: Rows, part: int, parts: int, total: int, group_by: str) -> int:
    """Return the row at which a part begins, which is the first row of a prompt."""
    row = part * total // parts
    if row in (0, total):
        return row
    lines = reader.lines(row - 1)
    before = prompt_of(next(lines), group_by)
    for line in lines:
        prompt = prompt_of(line, group_by)
        if _begins(prompt, before, group_by):
            break
        before = prompt if prompt is not None else before
        row += 1
    return row


def _begins(prompt: str | None, before: str | None, group_by: str) -> bool:
    """Return whether a part may begin at a row. With `group_by`, rows without a group may stand inside a group."""
    if group_by:
        return prompt is not None and before is not None and prompt != before
    return prompt is None or prompt != before


def prompt_of(line: Line, group_by: str) -> str | None:
    """Return a text that is equal for rows of one prompt; None for a row that belongs to no other.

    It is made from the field `group_by`, or else from the prompt or the messages before the answer.
    """
    row = line.fields
    value: Any = row.get(group_by) if group_by else row.get("prompt") or row.get("messages")
    if not group_by and isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[:-1] if value[-1].get("role") == "assistant" else value
    return None if value is None else json.dumps(value, default=str, sort_keys=True)
