"""One JSON row as bytes: parse it to an object or an error, and write a row as a line."""

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
    """One input row: its number in its file from 1, its size in bytes, and its object or the error in reading it.

    A row of a file with columns has a `place`: a record batch of pyarrow and an index into it. `members` are the rows
    that `--group-by` joined into this one. A line that is not `whole` is followed by a line from the same group of
    input rows, and an interrupted job cannot be resumed between the two. `error` is what is wrong with a row that could
    be read.
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
        """What is to be scored: the row, or its error."""
        return self.row if self.error is None else self.error

    @property
    def fields(self) -> dict[str, Any]:
        """The row's object; empty if it could not be read."""
        return {} if isinstance(self.row, RowError) else self.row


def read_lines(lines: Iterable[bytes]) -> Iterator[Line]:
    """Yield one Line for each line of a JSONL stream, including blank and damaged ones."""
    for number, data in enumerate(lines, 1):
        yield read_line(number, data)


def read_line(number: int, data: bytes, word: str = "line") -> Line:
    """Parse one row of JSON; `word` is what messages call it, "line" or "item"."""
    row: dict[str, Any] | RowError
    try:
        if len(data) > LINE_BYTES:
            raise RowError(f"longer than {LINE_BYTES} bytes; expected one JSON object")
        row = _read_row(data.removeprefix(codecs.BOM_UTF8) if number == 1 else data)
    except RowError as error:
        row = RowError(f"{word} {number}: {error}")
    return Line(number, len(data), row)


def to_line(row: dict[str, Any]) -> bytes:
    """Return the row as one line of JSON in UTF-8, with the line break."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate in a field that is not scored: it must be written as an escape
        return json.dumps(row, allow_nan=False).encode() + b"\n"


def _read_row(data: bytes) -> dict[str, Any]:
    """Return the object on one line, or raise RowError."""
    if not data.strip():
        raise RowError("blank line; expected a JSON object")
    row = read_json(data)
    if not isinstance(row, dict):
        raise RowError(f"expected a JSON object, found {type(row).__name__}")
    return row
