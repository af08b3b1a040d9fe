"""Files with columns: Parquet and Arrow's file and stream formats, read in batches by pyarrow.

pyarrow comes with the extra `data`, and is imported where it is used.
"""

from __future__ import annotations

import datetime
import decimal
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from rewardrt.data.compression import import_pyarrow, reading
from rewardrt.data.inputs import InputFile
from rewardrt.data.lines import Line
from rewardrt.errors import RewardRTError

PARQUET, ARROW_FILE, ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
BATCH_ROWS = 512  # rows converted to Python objects at a time


@dataclass(frozen=True)
class Table:
    """An open file with columns: its schema, its number of rows if known, and a function that reads it.

    `batches(skip)` yields pyarrow record batches, after the first `skip` rows.
    """

    schema: Any
    rows: int | None
    batches: Callable[[int], Iterator[Any]]


def is_table(head: bytes) -> bool:
    """Return whether a file that begins with `head` has columns."""
    return head.startswith((PARQUET, ARROW_FILE, ARROW_STREAM))


def open_table(file: InputFile, head: bytes) -> Table:
    """Open a file with columns that begins with `head`. Raises RewardRTError if it is damaged, or MissingExtraError."""
    pa = import_pyarrow(file.name)
    with reading(file.name):
        if head.startswith(PARQUET):
            return _open_parquet(file)
        opener = pa.ipc.open_file if head.startswith(ARROW_FILE) else pa.ipc.open_stream
        with file.open() as stream:
            schema = opener(stream).schema
        return Table(schema, None, lambda skip: _after(_arrow_batches(file, opener), skip))


def _open_parquet(file: InputFile) -> Table:
    import pyarrow.parquet as pq

    with file.open() as stream:
        opened = pq.ParquetFile(stream)
        schema, rows = opened.schema_arrow, opened.metadata.num_rows

    def batches(skip: int) -> Iterator[Any]:
        with file.open() as stream:
            opened = pq.ParquetFile(stream)
            groups: list[int] = []
            before = 0
            for group in range(opened.num_row_groups):
                size = opened.metadata.row_group(group).num_rows
                if groups or before + size > skip:
                    groups.append(group)
                else:
                    before += size
            yield from _after(opened.iter_batches(BATCH_ROWS, row_groups=groups), skip - before)

    return Table(schema, rows, batches)


def _arrow_batches(file: InputFile, opener: Callable[[BinaryIO], Any]) -> Iterator[Any]:
    with file.open() as stream:
        reader = opener(stream)
        if hasattr(reader, "num_record_batches"):
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index)
        else:
            yield from reader


def _after(batches: Iterable[Any], skip: int) -> Iterator[Any]:
    """Yield the rows after the first `skip`, in batches of at most BATCH_ROWS."""
    for batch in batches:
        if skip >= batch.num_rows:
            skip -= batch.num_rows
            continue
        for start in range(skip, batch.num_rows, BATCH_ROWS):
            yield batch.slice(start, BATCH_ROWS)
        skip = 0


def table_of(batch: Any) -> Any:
    """Return a pyarrow table, given one, a pandas data frame, or a dictionary of columns by name."""
    pa = import_pyarrow("columns")
    if isinstance(batch, pa.Table):
        return batch
    if isinstance(batch, dict):
        return pa.table(
            {name: column.tolist() if hasattr(column, "tolist") else column for name, column in batch.items()}
        )
    return pa.Table.from_pandas(batch, preserve_index=False)


def in_memory(table: Any) -> Table:
    """Return a pyarrow table as an open Table."""
    return Table(table.schema, table.num_rows, lambda skip: _after(table.to_batches(), skip))


def table_lines(table: Table, skip: int) -> Iterator[Line]:
    """Yield the rows of a table after the first `skip`, each with its place in the record batches."""
    number = skip
    for batch in table.batches(skip):
        columns = [_values(column) for column in batch.columns]
        for index, values in enumerate(zip(*columns, strict=True) if columns else [()] * batch.num_rows):
            row = dict(zip(batch.schema.names, values, strict=True))
            number += 1
            given = {field: _given(value) for field, value in row.items()}
            yield Line(number, _size(row), given, (batch, index))


class InvalidText:
    """Stands for the bytes of a string that is not valid UTF-8."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __str__(self) -> str:
        return self._data.decode("utf-8", "replace")


def _values(column: Any) -> list[Any]:
    """Return a column as Python objects; types that Python lacks, such as nanoseconds, become strings."""
    pa = import_pyarrow("columns")
    in_utc = [pa.timestamp(column.type.unit)] if pa.types.is_timestamp(column.type) else []  # the zone may be unknown
    for kinds in ([], [pa.string()], [*in_utc, pa.string()]):
        try:
            found = column
            for kind in kinds:
                found = found.cast(kind)
            return cast(list[Any], found.to_pylist())
        except (ArithmeticError, ImportError, LookupError, ValueError, NotImplementedError):  # pyarrow's are of these
            continue
    return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        # The error does not say which text in a list or an object is invalid.
        return InvalidText(scalar.as_buffer().to_pybytes() if hasattr(scalar, "as_buffer") else b"\xff")
    except (ArithmeticError, ImportError, LookupError, ValueError, NotImplementedError):
        return str(scalar)


def _given(value: Any) -> Any:
    """Return a value without null fields of objects: in Arrow every object has every field."""
    if isinstance(value, dict):
        return {name: _given(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_given(item) for item in value]
    return value


def _size(value: Any) -> int:
    """Return the approximate size of a value in bytes."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 8


def plain(value: Any) -> Any:
    """Return a column's value as JSON has it: times in ISO 8601, decimals as strings, null for NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if isinstance(value, decimal.Decimal | datetime.timedelta) or not isinstance(value, str | int | bool | None):
        return str(value)
    return value


def rows_of(lines: Sequence[Line]) -> Any:
    """Return a pyarrow table of the rows at the lines' places."""
    pa = import_pyarrow("columns")
    slices: list[Any] = []
    start = 0
    for index in range(1, len(lines) + 1):
        first = lines[start].place
        assert first is not None
        batch, at = first
        here = lines[index].place if index < len(lines) else None
        if here is None or here[0] is not batch or here[1] != at + index - start:
            slices.append(batch.slice(at, index - start))
            start = index
    # Files may differ in which of their columns are nullable.
    whole = [each if each.schema.equals(slices[0].schema) else each.cast(slices[0].schema) for each in slices]
    return pa.Table.from_batches(whole)


def pack_table(table: Any) -> bytes:
    """Return a table as one Arrow stream with its schema; a file may contain several streams in a row."""
    pa = import_pyarrow("columns")
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return cast(bytes, sink.getvalue().to_pybytes())


def unpack_tables(stream: BinaryIO, size: int) -> Iterator[Any]:
    """Yield the tables of a file of `size` bytes that consists of `pack_table`'s streams."""
    pa = import_pyarrow("columns")
    while stream.tell() < size:
        yield pa.ipc.open_stream(stream).read_all()


def column_of(values: list[Any], kind: Any) -> Any:
    """Return values as a pyarrow array of a type; where the type is a list, a single value becomes a list of one."""
    pa = import_pyarrow("columns")
    if pa.types.is_list(kind):
        values = [value if value is None or isinstance(value, list) else [value] for value in values]
    return pa.array(values, kind)


def check_same(schema: Any, other: Any, name: str) -> None:
    """Raise RewardRTError if a file's columns differ from those of the files before it."""
    if [(field.name, field.type) for field in schema] == [(field.name, field.type) for field in other]:
        return
    for field in schema:
        if field.name not in other.names:
            raise RewardRTError(f"{name}: has no column {field.name!r}, as the files before it have")
        if other.field(field.name).type != field.type:
            raise RewardRTError(
                f"{name}: its column {field.name!r} is {other.field(field.name).type}, and {field.type} before"
            )
    raise RewardRTError(
        f"{name}: has other columns than the files before it, or in another order: {', '.join(other.names)}"
    )


def check_names(schema: Any, name: str) -> None:
    """Raise RewardRTError if two columns have the same name."""
    twice = next((each for each in schema.names if schema.names.count(each) > 1), None)
    if twice is not None:
        raise RewardRTError(f"{name}: has two columns with the name {twice!r}; rename one of them")
