"""Write pyarrow tables to Parquet, Arrow or a folder of `datasets`; make tables from lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rewardrt.data.columns import column_of
from rewardrt.data.compression import import_pyarrow

GROUP_ROWS, GROUP_BYTES = 131_072, 64 * 2**20  # size from which a row group or record batch is written


def infer_schema(path: Path, known: dict[str, Any]) -> tuple[Any, list[str]]:
    """Return a schema that fits all rows of a JSONL file, and the names of columns with values of several types.

    Those columns will contain JSON in strings. `known` are columns whose types are given; they come last.
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
                if _has_empty_object(found[name]):  # Parquet cannot store it
                    raise pa.ArrowInvalid("an object without fields")
            except (ValueError, TypeError, NotImplementedError, OverflowError):  # pyarrow's are of these kinds
                mixed.append(name)
    kinds = found | known
    for rows in _object_batches(path):  # check again: the type of all rows together may not fit each value
        for name, kind in kinds.items():
            if name not in mixed:
                try:
                    column_of([row.get(name) for row in rows], kind)
                except (ValueError, TypeError, NotImplementedError, OverflowError):
                    mixed.append(name)
    kinds |= dict.fromkeys(mixed, pa.string())
    return pa.schema([(name, pa.string() if kind == pa.null() else kind) for name, kind in kinds.items()]), mixed


def read_objects(path: Path, schema: Any, mixed: Sequence[str]) -> Iterator[Any]:
    """Yield the rows of a JSONL file as pyarrow tables of a schema; columns in `mixed` become JSON in strings."""
    pa = import_pyarrow("columns")
    for rows in _object_batches(path):
        arrays = []
        for field in schema:
            values = [row.get(field.name) for row in rows]
            if field.name in mixed:
                values = [None if value is None else _as_json(value) for value in values]
            arrays.append(column_of(values, field.type))
        yield pa.Table.from_arrays(arrays, schema=schema)


def _as_json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isascii() or text.encode("utf-8", "ignore").decode() == text else json.dumps(value)


def _has_empty_object(kind: Any) -> bool:
    """Return whether a type contains objects without fields."""
    pa = import_pyarrow("columns")
    if pa.types.is_list(kind):
        return _has_empty_object(kind.value_type)
    if pa.types.is_struct(kind):
        inner = [kind.field(index).type for index in range(kind.num_fields)]
        return not inner or any(map(_has_empty_object, inner))
    return False


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
    """Join tables into larger ones, each of which becomes a row group or record batches."""
    pa = import_pyarrow("columns")
    held: list[Any] = []
    for table in tables:
        held.append(table)
        if sum(map(len, held)) >= GROUP_ROWS or sum(each.nbytes for each in held) >= GROUP_BYTES:
            yield pa.concat_tables(held).combine_chunks()
            held = []
    if held:
        yield pa.concat_tables(held).combine_chunks()
