"""Read rows of files in any supported format, which is recognised by a file's first bytes, not by its name.

| first bytes | read as |
| --- | --- |
| `PAR1`, `ARROW1`, ff ff ff ff | columns (`columns`): Parquet, Arrow's file and stream formats |
| those of gzip and zstd | the decompressed contents (`compression`), as JSON |
| `[` | the items of a JSON array (`arrays`) |
| anything else | JSONL, or refused as what `formats` recognises |
"""

from __future__ import annotations

import bisect
import io
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rewardrt.data.arrays import array_items
from rewardrt.data.columns import Table, check_names, check_same, is_table, open_table, table_lines
from rewardrt.data.compression import GZIP, ZSTD, Headed, reading, unpacked
from rewardrt.data.formats import HEAD_BYTES, begins_array, jsonl_lines
from rewardrt.data.inputs import InputFile, find_inputs
from rewardrt.data.lines import Line, read_line
from rewardrt.errors import RewardRTError

_MARK_ROWS = 64  # rows between two marks for the progress


class Rows(Protocol):
    """What a job reads: the rows of files, or a table in memory. `schema` is pyarrow's, None for JSON."""

    files: Sequence[InputFile]
    schema: Any

    def lines(self, skip: int = 0) -> Iterator[Line]:
        """Yield the rows after the first `skip`."""

    def count(self) -> int:
        """Return the number of rows."""

    def share(self, rows: float) -> float:
        """Return the first `rows` rows as a share of all, from 0 to 1; estimated by bytes for rows already read."""


class InMemory:
    """The rows of a table in memory."""

    def __init__(self, table: Table) -> None:
        self.files: Sequence[InputFile] = (InputFile("the table", io.BytesIO, 0, ""),)
        self.schema, self._table = table.schema, table

    def lines(self, skip: int = 0) -> Iterator[Line]:
        """Yield the rows after the first `skip`."""
        return table_lines(self._table, skip)

    def count(self) -> int:
        """Return the number of rows."""
        return self._table.rows or 0

    def share(self, rows: float) -> float:
        """Return the first `rows` rows as a share of all, from 0 to 1."""
        return min(1.0, rows / max(1, self.count()))


class RowReader:
    """The rows of several files in order. Either all files have columns, of the same types, or none has."""

    def __init__(self, files: Sequence[InputFile]) -> None:
        """Read the beginning of each file to recognise its format. Raises RewardRTError."""
        # Empty parts of a folder are left out; a single empty file is refused later.
        files = self.files = [file for file in files if file.size != 0] or files[:1]
        self.schema: Any = None  # pyarrow's, of files with columns
        self._marks: list[tuple[int, float]] = []  # number of rows read, share of the files' bytes
        self._pipe: Headed | None = None
        if files[0].size is None:  # a pipe can be opened only once
            self._pipe = Headed(files[0].open())
            if is_table(self._pipe.head):
                raise RewardRTError(f"{files[0].name}: has columns; name the file: such a format is read from its end")
        self._tables = [self._table(file) for file in files]
        if any(table is not None for table in self._tables):
            for file, table in zip(files, self._tables, strict=True):
                if table is None:
                    raise RewardRTError(f"{file.name}: has no columns, as other files have; score it by itself")
                self.schema = table.schema if self.schema is None else self.schema
                check_names(table.schema, file.name)
                check_same(self.schema, table.schema, file.name)

    def lines(self, skip: int = 0) -> Iterator[Line]:
        """Yield the rows after the first `skip` of all files.

        Raises RewardRTError if a file cannot be read.
        """
        row, done, whole = skip, 0, sum(file.size or 0 for file in self.files)
        self._marks = []
        for file, table in zip(self.files, self._tables, strict=True):
            rows = table.rows if table is not None else None
            if table is not None and rows is None and skip:
                rows = _count_rows(table)
            if rows is not None and skip >= rows:
                skip -= rows
            else:
                stream = self._pipe or Headed(file.open()) if table is None else None
                at = _Place("row")
                with ExitStack() as opened, reading(file.name, at.say):
                    if stream is not None and self._pipe is None:
                        opened.enter_context(closing(stream))
                    alone = len(self.files) == 1
                    for line in table_lines(table, skip) if table else _json_lines(stream, file.name, at, skip, alone):
                        at.number = line.number
                        row += 1
                        if row % _MARK_ROWS == 0:
                            size = at.bytes if stream is not None else (file.size or 0) * line.number / (rows or 1)
                            self._marks.append((row, min(1.0, (done + size) / whole) if whole else 0.0))
                        yield line
                skip = max(0, skip - at.number) if stream is not None else 0
            done += file.size or 0

    def count(self) -> int:
        """Return the number of rows in the files. Raises RewardRTError for a pipe, which can be read only once."""
        if self._pipe is not None:
            raise RewardRTError(f"{self.files[0].name}: its rows are not counted before they are read; name a file")
        return sum(
            _count_items(file) if table is None else _count_rows(table)
            for file, table in zip(self.files, self._tables, strict=True)
        )

    def share(self, rows: float) -> float:
        """Return the first `rows` rows as a share of all, from 0 to 1, by the bytes of the files read so far."""
        after = bisect.bisect(self._marks, (int(rows), 2.0))
        return self._marks[after - 1][1] if after else 0.0

    def _table(self, file: InputFile) -> Table | None:
        if self._pipe is not None:
            return None
        with reading(file.name), closing(Headed(file.open())) as stream:
            pass
        return open_table(file, stream.head) if is_table(stream.head) else None


def _count_items(file: InputFile) -> int:
    with reading(file.name), closing(Headed(file.open())) as stream:
        return sum(1 for _ in json_items(unpacked(stream), file.name)[1])


def _count_rows(table: Table) -> int:
    return table.rows if table.rows is not None else sum(batch.num_rows for batch in table.batches(0))


@dataclass
class _Place:
    """How far a file has been read, for messages."""

    word: str
    number: int = 0
    bytes: int = 0  # as stored, before decompression

    def say(self) -> str:
        return f" after {self.word} {self.number}" if self.number else ""


def _json_lines(stream: Headed | None, name: str, at: _Place, skip: int, alone: bool) -> Iterator[Line]:
    assert stream is not None
    unpacked_stream = unpacked(stream)
    if not alone and not unpacked_stream.peek(1):  # one of several files, which is empty when decompressed
        return
    at.word, items = json_items(unpacked_stream, name)
    packed = stream.head.startswith((GZIP, ZSTD))
    for number, data in enumerate(items, 1):
        at.bytes = stream.count if packed else at.bytes + len(data) + (at.word == "item")
        at.number = number
        if number > skip:  # skipped rows are not parsed
            yield read_line(number, data, at.word)


def json_items(stream: io.BufferedReader, name: str) -> tuple[str, Iterator[bytes]]:
    """Return what messages call the rows of a JSON stream, and their bytes: lines, or items of an array."""
    first = stream.readline(HEAD_BYTES)
    if begins_array(first, stream.peek(1)[:1] if first.startswith(b"[") else b""):
        return "item", array_items(stream, name, first)
    return "line", jsonl_lines(stream, name, first)


def read_rows_of(path: str | Path) -> Iterator[Line]:
    """Yield the rows of one file. Raises RewardRTError."""
    return RowReader(find_inputs([str(path)])).lines()
