"""Files with columns: Parquet, and Arrow's file and stream formats, read in batches and written by pyarrow.

The only home of pyarrow beside `compression` and `inputs`, and imported where it is used: the extra `data`.
"""

from __future__ import annotations

import datetime
import decimal
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from rewardrt.data.compression import import_pyarrow, reading
from rewardrt.data.inputs import InputFile
from rewardrt.data.lines import Line
from rewardrt.errors import RewardRTError

PARQUET, ARROW_FILE, ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
BATCH_ROWS = 512  # that are turned to objects at a time
GROUP_ROWS, GROUP_BYTES = 131_072, 64 * 2**20  # of a row group, or record batch, that is written


@dataclass(frozen=True)
class Table:
    """An open file with columns: its schema, its rows if that is known, and its batches from a row on."""

    schema: Any
    rows: int | None
    batches: Callable[[int], Iterator[Any]]


def is_table(head: bytes) -> bool:
    """Return whether a file that begins so has columns."""
    return head.startswith((PARQUET, ARROW_FILE, ARROW_STREAM))


def open_table(file: InputFile, head: bytes) -> Table:
    """Open a file that begins with `head`. Raises RewardRTError for one that is damaged, and MissingExtraError."""
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
    """Return a pyarrow table of a table, a data frame of pandas, or columns by their names."""
    pa = import_pyarrow("columns")
    if isinstance(batch, pa.Table):
        return batch
    if isinstance(batch, dict):
        return pa.table(
            {name: column.tolist() if hasattr(column, "tolist") else column for name, column in batch.items()}
        )
    return pa.Table.from_pandas(batch, preserve_index=False)


def in_memory(table: Any) -> Table:
    """Return a pyarrow table as an open one."""
    return Table(table.schema, table.num_rows, lambda skip: _after(table.to_batches(), skip))


def table_lines(table: Table, skip: int) -> Iterator[Line]:
    """Yield the rows of a table after the first `skip`, each with its place."""
    number = skip
    for batch in table.batches(skip):
        for index, row in enumerate(batch.to_pylist()):
            number += 1
            given = {field: _given(value) for field, value in row.items()}
            yield Line(number, _size(row), given, (batch, index))


def _given(value: Any) -> Any:
    """Return a value without the fields of objects that are null: Arrow has every field in every object."""
    if isinstance(value, dict):
        return {name: _given(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_given(item) for item in value]
    return value


def _size(value: Any) -> int:
    """Return about how many bytes a value has."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 8


def plain(value: Any) -> Any:
    """Return a value of a column as JSON has it: times in ISO 8601, decimals as strings, no number for NaN."""
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
    """Return a pyarrow table of the rows that lines have their places in."""
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
    return pa.Table.from_batches(slices)


def pack_table(table: Any) -> bytes:
    """Return a table as one Arrow stream, with its schema; streams may follow each other in a file."""
    pa = import_pyarrow("columns")
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return cast(bytes, sink.getvalue().to_pybytes())


def unpack_tables(stream: BinaryIO, size: int) -> Iterator[Any]:
    """Yield the tables of a file that `pack_table` wrote."""
    pa = import_pyarrow("columns")
    while stream.tell() < size:
        yield pa.ipc.open_stream(stream).read_all()


def infer_schema(path: Path, known: dict[str, Any]) -> tuple[Any, list[str]]:
    """Return a schema that all rows of a JSONL file fit in, and the columns whose values are of no one type.

    Those are columns of JSON in strings. `known` are types of columns that are not to be guessed, and come last.
    """
    pa = import_pyarrow("columns")
    found: dict[str, Any] = {}
    mixed: list[str] = []
    for rows in _object_batches(path):
        for name in {name: None for row in rows for name in row if name not in known}:
            if name in mixed:
                continue
            try:
                kind = pa.array([row.get(name) for row in rows]).type
                schemas = [pa.schema([(name, each)]) for each in (found.get(name), kind) if each is not None]
                found[name] = pa.unify_schemas(schemas, promote_options="permissive").field(name).type
            except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
                mixed.append(name)
                found[name] = pa.string()
    found = {name: pa.string() if kind == pa.null() else kind for name, kind in found.items()}
    return pa.schema(list((found | known).items())), mixed


def read_objects(path: Path, schema: Any, mixed: Sequence[str]) -> Iterator[Any]:
    """Yield the rows of a JSONL file as tables of a schema."""
    pa = import_pyarrow("columns")
    for rows in _object_batches(path):
        arrays = []
        for field in schema:
            values = [row.get(field.name) for row in rows]
            if field.name in mixed:
                values = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
            arrays.append(column_of(values, field.type))
        yield pa.Table.from_arrays(arrays, schema=schema)


def column_of(values: list[Any], kind: Any) -> Any:
    """Return values as an array; of a file with rows of several shapes, one number is a list of one."""
    pa = import_pyarrow("columns")
    if pa.types.is_list(kind):
        values = [value if value is None or isinstance(value, list) else [value] for value in values]
    return pa.array(values, kind)


def _object_batches(path: Path) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    size = 0
    with path.open("rb") as lines:
        for line in lines:
            rows.append(json.loads(line))
            size += len(line)
            if len(rows) >= 4096 or size > 2**23:
                yield rows
                rows, size = [], 0
    if rows:
        yield rows


def write_parquet(tables: Iterator[Any], schema: Any, target: Path) -> None:
    """Write tables of one schema as a Parquet file."""
    import pyarrow.parquet as pq

    with pq.ParquetWriter(target, schema, compression="zstd") as writer:
        for table in _grouped(tables):
            writer.write_table(table, row_group_size=len(table))


def write_arrow(tables: Iterator[Any], schema: Any, target: Path) -> None:
    """Write tables of one schema as an Arrow file."""
    pa = import_pyarrow("columns")
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for table in _grouped(tables):
            writer.write_table(table)


def write_dataset(tables: Iterator[Any], schema: Any, target: Path) -> None:
    """Write tables of one schema as a folder that `datasets.load_from_disk` reads."""
    pa = import_pyarrow("columns")
    name = "data-00000-of-00001.arrow"
    target.mkdir()
    with pa.OSFile(str(target / name), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for table in _grouped(tables):
            writer.write_table(table)
    state: dict[str, Any] = {
        "_data_files": [{"filename": name}], "_fingerprint": "rewardrt", "_format_columns": None,
        "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": None,
    }  # fmt: skip
    info = {"citation": "", "description": "", "features": None, "homepage": "", "license": ""}
    (target / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    (target / "dataset_info.json").write_text(json.dumps(info, indent=2), encoding="utf-8")


def _grouped(tables: Iterator[Any]) -> Iterator[Any]:
    """Join tables to ones of some size: each becomes a row group, or record batches."""
    pa = import_pyarrow("columns")
    held: list[Any] = []
    for table in tables:
        held.append(table)
        if sum(map(len, held)) >= GROUP_ROWS or sum(each.nbytes for each in held) >= GROUP_BYTES:
            yield pa.concat_tables(held).combine_chunks()
            held = []
    if held:
        yield pa.concat_tables(held).combine_chunks()


def check_same(schema: Any, other: Any, name: str) -> None:
    """Raise RewardRTError where a file has other columns than those before it."""
    if schema.equals(other):
        return
    for field in schema:
        if field.name not in other.names:
            raise RewardRTError(f"{name}: has no column {field.name!r}, as the files before it have")
        if not other.field(field.name).equals(field):
            raise RewardRTError(
                f"{name}: its column {field.name!r} is {other.field(field.name).type}, and {field.type} before"
            )
    raise RewardRTError(f"{name}: has other columns than the files before it ({', '.join(other.names)})")
