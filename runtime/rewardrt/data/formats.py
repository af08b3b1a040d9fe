"""What a file is that was given for JSONL, seen by its first bytes and not by its name, from a pipe too.

Each of these would otherwise come out as an error on every line, or on lines that a format only seems to have.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rewardrt.errors import RewardRTError, RowError

LINE_BYTES = 256 * 2**20  # a longer line is not held in memory: what is yielded of it is one byte longer than this
_HEAD_BYTES = 4096  # of the first line, which of a binary file may have no end

_PANDAS = "write its rows as JSONL, with pandas: `to_json(FILE, orient='records', lines=True)`"
_UNPACK = "unpack it, as in `{} FILE | rewardrt score BUNDLE -`"
_CONVERT = "convert it: `iconv -f {} -t utf-8 FILE`"
_STARTS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "gzip", _UNPACK.format("zcat")),
    (b"\x28\xb5\x2f\xfd", "zstd", _UNPACK.format("zstdcat")),
    (b"BZh", "bzip2", _UNPACK.format("bzcat")),
    (b"\xfd7zXZ\x00", "xz", _UNPACK.format("xzcat")),
    (b"\x04\x22\x4d\x18", "lz4", _UNPACK.format("lz4cat")),
    (b"PK\x03\x04", "a zip archive", _UNPACK.format("unzip -p")),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK.format("7z x -so")),
    (b"PAR1", "Parquet", _PANDAS),
    (b"ARROW1", "an Arrow file", _PANDAS),
    (b"FEA1", "a Feather file", _PANDAS),
    (b"\xff\xff\xff\xff", "an Arrow stream", _PANDAS),
    (b"ORC", "ORC", _PANDAS),
    (b"Obj\x01", "Avro", _PANDAS),
    (b"\x89HDF", "HDF5", _PANDAS),
    (b"SQLite format 3\x00", "an SQLite database", _PANDAS),
    (b"\x93NUMPY", "a numpy array", _PANDAS),
    (b"%PDF", "a PDF", "write its rows as JSONL"),
    (b"version https://git-lfs", "a pointer of Git LFS and not the file", "fetch it: `git lfs pull`"),
    (codecs.BOM_UTF32_LE, "UTF-32", _CONVERT.format("utf-32")),
    (codecs.BOM_UTF32_BE, "UTF-32", _CONVERT.format("utf-32")),
    (codecs.BOM_UTF16_LE, "UTF-16", _CONVERT.format("utf-16")),
    (codecs.BOM_UTF16_BE, "UTF-16", _CONVERT.format("utf-16")),
    (b"{\x00", "UTF-16", _CONVERT.format("utf-16le")),
    (b"\x00{", "UTF-16", _CONVERT.format("utf-16be")),
)
_ARRAY = ("a JSON array", "put each of its objects on a line: `jq -c '.[]' FILE`")
_OBJECT = ("a JSON object over several lines", "put each object on one line: `jq -c . FILE`")


def open_input(path: str | Path) -> BinaryIO:
    """Open a file of rows for reading, or raise RowError."""
    try:
        return Path(path).open("rb")
    except IsADirectoryError:
        raise RowError(f"{path}: expected a JSONL file, found a folder; name one file in it") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RowError(f"{path}: cannot be read ({reason}); expected a JSONL file, or - for standard input") from error


def jsonl_lines(stream: BinaryIO, name: str) -> Iterator[bytes]:
    """Yield the lines of a stream that looks like JSONL; for another, raise a RewardRTError that says what it is.

    The first line is looked at, and the second where the first leaves it open.
    """
    first = stream.readline(_HEAD_BYTES)
    if found := _binary(first):
        raise _refusal(name, *found)
    if len(first) == _HEAD_BYTES and not first.endswith(b"\n"):
        first += stream.readline(LINE_BYTES + 1 - len(first))
    kind, sure = _begins(first)
    rest = _lines(stream, first)
    second = next(rest, b"") if kind and not sure else b""
    alone = not second.strip()  # a list on one line is a file of its own if nothing follows
    goes_on = not alone and not second.startswith(b"{")  # a row that was cut off is followed by a row
    if kind and (sure or (alone if kind == _ARRAY else goes_on)):
        raise _refusal(name, *kind)
    yield first
    if second:
        yield second
    yield from rest


def _lines(stream: BinaryIO, before: bytes) -> Iterator[bytes]:
    """Yield the lines that follow; of one that is too long only as much as shows it."""
    line = before
    while line:
        if len(line) > LINE_BYTES:
            while line and not line.endswith(b"\n"):  # what is left of a line that was yielded
                line = stream.readline(LINE_BYTES)
        line = stream.readline(LINE_BYTES + 1)
        if line:
            yield line


def _refusal(name: str, found: str, remedy: str) -> RewardRTError:
    return RewardRTError(f"{name}: expected JSONL, one JSON object a line; found {found}: {remedy}")


def _binary(head: bytes) -> tuple[str, str] | None:
    """Return what a file is by its first bytes, and what to do with it; None for what may be JSONL."""
    if not head:
        return "an empty file", "nothing is there to score; look at what was to write it"
    for start, found, remedy in _STARTS:
        if head.startswith(start):
            return found, remedy
    if b"\x00" in head:
        return "binary data", "name a text file"
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if text.startswith(b"<"):
        return "HTML or XML", "look at it: a download that failed often leaves such a page"
    if text[:1].isalpha() and {b"prompt", b"response", b"chosen", b"text"} & _columns(text):
        return "CSV", _PANDAS
    return None


def _columns(line: bytes) -> set[bytes]:
    """Return the names of columns, if that is what a line holds."""
    mark = next((mark for mark in (b"\t", b",", b";") if mark in line), None)
    return {name.strip().strip(b'"') for name in line.split(mark)} if mark else set()


def _begins(first: bytes) -> tuple[tuple[str, str] | None, bool]:
    """Return what may begin with the first line, other than a row, and whether that is sure without the second line."""
    text = first.removeprefix(codecs.BOM_UTF8).decode(errors="replace").strip()
    kind = {"[": _ARRAY, "{": _OBJECT}.get(text[:1])
    if kind is None or len(text) > 10**6:  # not parsed twice; a row is no list, however long
        return (kind, True) if kind == _ARRAY else (None, False)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return (kind, kind == _ARRAY) if error.pos >= len(text) else (None, False)
    except (ValueError, RecursionError):
        return None, False
    objects = isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    return (_ARRAY if objects else None), False
