"""The formats in which scored rows are written, as a table.

During scoring, windows of rows are appended to a part file, as lines of JSON or as packed tables; `finish` turns it
into the output. If the lines, compressed or not, already are the output, it only renames the file.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewardrt.data.column_writers import infer_schema, read_objects, write_arrow, write_dataset, write_parquet
from rewardrt.data.columns import unpack_tables
from rewardrt.data.compression import pack_gzip, pack_zstd
from rewardrt.data.outputs import refuse, take_name
from rewardrt.errors import RewardRTError


@dataclass(frozen=True)
class OutputFormat:
    """One format: the suffixes of its file names, and how it is written.

    `pack` compresses lines as they are written. `table` writes pyarrow tables with a schema to a path. `lines` converts
    a file of lines to another path. A format has exactly one of the three.
    """

    suffixes: tuple[str, ...]
    pack: Callable[[bytes], bytes] | None = None
    table: Callable[[Iterator[Any], Any, Path], None] | None = None
    lines: Callable[[Path, Path], None] | None = None


def _write_array(part: Path, target: Path) -> None:
    """Write lines as a JSON array with one item per line."""
    with part.open("rb") as lines, target.open("wb") as file:
        start = b"["
        for line in lines:
            file.write(start + b"\n" + line.rstrip(b"\n"))
            start = b","
        file.write(b"[]\n" if start == b"[" else b"\n]\n")


OUTPUT_FORMATS = {
    "jsonl": OutputFormat((".jsonl", ".ndjson"), pack=lambda data: data),
    "jsonl.gz": OutputFormat((".jsonl.gz", ".gz"), pack=pack_gzip),
    "jsonl.zst": OutputFormat((".jsonl.zst", ".zst"), pack=pack_zstd),
    "json": OutputFormat((".json",), lines=_write_array),
    "parquet": OutputFormat((".parquet", ".pq"), table=write_parquet),
    "arrow": OutputFormat((".arrow", ".feather", ".ipc"), table=write_arrow),
    "datasets": OutputFormat((), table=write_dataset),
}


def format_of(name: str) -> str:
    """Return the format for an output's name; JSONL if its suffix is none of the known ones."""
    for format_name, each in OUTPUT_FORMATS.items():
        if name.lower().endswith(each.suffixes):
            return format_name
    return "jsonl"


def finish(format_name: str, part: Path, target: Path, schema: Any, known: dict[str, Any]) -> list[str]:
    """Turn a complete part file into the output and delete it; return remarks for the user.

    `schema` is that of packed tables, None for lines; `known` are the types of the columns that scoring added to lines.
    Raises RewardRTError, and then the part file is kept.
    """
    each, said = OUTPUT_FORMATS[format_name], list[str]()
    made = target.with_name(f".{target.name}.whole")
    try:
        _remove(made)  # left by a process that ended here
        if each.table is not None or each.lines is not None:
            said = _make(each, part, made, schema, known)
        else:
            made = part
            if each.pack is not None and not part.stat().st_size:
                part.write_bytes(each.pack(b""))
        if target.is_dir():
            raise RewardRTError(f"{target}: is a folder that is there already; delete it, or name another")
        take_name(made, target)
        if made != part:
            part.unlink()
    except OSError as error:
        refuse(target, error)
    except (ValueError, NotImplementedError) as error:  # pyarrow's, of a type that a format does not have
        reason = " ".join(str(error).split())[:200]
        raise RewardRTError(
            f"{target}: cannot be written as {format_name} ({reason}); choose another --format"
        ) from error
    finally:
        if made != part:
            with suppress(OSError):
                _remove(made)
    return said


def _make(each: OutputFormat, part: Path, made: Path, schema: Any, known: dict[str, Any]) -> list[str]:
    """Write a part file in a format that needs all rows; return remarks for the user."""
    if each.lines is not None:
        each.lines(part, made)
        return []
    assert each.table is not None
    if schema is not None:
        with part.open("rb") as stream:
            each.table(unpack_tables(stream, part.stat().st_size), schema, made)
        return []
    schema, mixed = infer_schema(part, known)
    each.table(read_objects(part, schema, mixed), schema, made)
    return [f"the column {name!r} holds values of several types, and is JSON in strings" for name in mixed]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
