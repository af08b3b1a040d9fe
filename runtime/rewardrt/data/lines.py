"""Rows of JSON as bytes, one after the other: what each holds, or what is wrong with it; and a row as a line again."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from rewardrt.data.formats import LINE_BYTES
from rewardrt.data.strict_json import read_json
from rewardrt.errors import RowError


@dataclass(frozen=True)
class Line:
    """One input row: its number in its file from 1, its size in bytes, and its object or what is wrong with it.

    A row of a file with columns knows its place there, a record batch of pyarrow and an index. `members` are the rows
    that were put together to this one, by `--group-by`. After a line that is not `whole` comes one of the same rows: a
    file cannot be gone on with between them. `error` is what is wrong with a row that could be read.
    """

    number: int
    bytes: int
    row: dict[str, Any] | RowError
    place: tuple[Any, int] | None = None
    members: tuple[Line, ...] = ()
    whole: bool = True
    error: RowError | None = None

    @property
    def given(self) -> dict[str, Any] | RowError:
        """What is to be scored: the row, or what is wrong with it."""
        return self.row if self.error is None else self.error

    @property
    def fields(self) -> dict[str, Any]:
        """What is known of the row."""
        return {} if isinstance(self.row, RowError) else self.row


def read_lines(lines: Iterable[bytes]) -> Iterator[Line]:
    """Yield one Line for each line of a JSONL stream, blank and damaged ones included."""
    for number, data in enumerate(lines, 1):
        yield read_line(number, data)


def read_line(number: int, data: bytes, word: str = "line") -> Line:
    """Return one row of JSON; `word` is what it is called in messages."""
    row: dict[str, Any] | RowError
    try:
        if len(data) > LINE_BYTES:
            raise RowError(f"longer than {LINE_BYTES} bytes; expected one JSON object")
        row = _read_row(data.removeprefix(codecs.BOM_UTF8) if number == 1 else data)
    except RowError as error:
        row = RowError(f"{word} {number}: {error}")
    return Line(number, len(data), row)


def to_line(row: dict[str, Any]) -> bytes:
    """Return one line of JSON, in UTF-8."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate in a field that is not scored: only an escape can carry it
        return json.dumps(row, allow_nan=False).encode() + b"\n"


def _read_row(data: bytes) -> dict[str, Any]:
    """Return the object on one line, or raise RowError."""
    if not data.strip():
        raise RowError("blank line; expected a JSON object")
    row = read_json(data)
    if not isinstance(row, dict):
        raise RowError(f"expected a JSON object, found {type(row).__name__}")
    return row
