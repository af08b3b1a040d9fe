"""Recognise files that are not in a supported format, by their first bytes and not by their name.

Without this, such a file would give an error on every line, or on lines that it only seems to have.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import BinaryIO

from rewardrt.errors import RewardRTError

LINE_BYTES = 256 * 2**20  # a longer line is not read into memory: only its first LINE_BYTES + 1 bytes are yielded
HEAD_BYTES = 65536  # bytes read of the first line, because a binary file may have no line break

_PANDAS = "write its rows as JSONL, with pandas: `to_json(FILE, orient='records', lines=True)`"
_UNPACK = "unpack it, as in `{} FILE | rewardrt score BUNDLE -`"
_CONVERT = "convert it: `iconv -f {} -t utf-8 FILE`"
_STARTS: tuple[tuple[bytes, str, str], ...] = (
    (b"BZh", "bzip2", _UNPACK.format("bzcat")),
    (b"\xfd7zXZ\x00", "xz", _UNPACK.format("xzcat")),
    (b"\x04\x22\x4d\x18", "lz4", _UNPACK.format("lz4cat")),
    (b"PK\x03\x04", "a zip archive", _UNPACK.format("unzip -p")),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK.format("7z x -so")),
    (b"FEA1", "a Feather file", _PANDAS),
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
_OBJECT = ("a JSON object over several lines", "put each object on one line: `jq -c . FILE`")


def begins_array(first: bytes, after: bytes) -> bool:
    """Return whether a file is a JSON array of rows, not JSONL whose first row is a list.

    It is an array if the list does not end on the `first` line, or if it contains objects and nothing follows it.
    `after` are the next bytes of the file.
    """
    text = first.removeprefix(codecs.BOM_UTF8).decode(errors="replace").strip()
    if not text.startswith("["):
        return False
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text) or len(first) >= HEAD_BYTES
    except (ValueError, RecursionError):
        return False
    return all(isinstance(item, dict) for item in value) and not after.strip()


def jsonl_lines(stream: BinaryIO, name: str, first: bytes | None = None) -> Iterator[bytes]:
    """Yield the lines of a JSONL stream; raise RewardRTError for another format, saying what it is.

    The first line is checked, and the second if the first does not decide it. `first` are the bytes of the first line
    that were already read, at most HEAD_BYTES.
    """
    first = stream.readline(HEAD_BYTES) if first is None else first
    if found := _binary(first):
        raise _refusal(name, *found)
    if len(first) == HEAD_BYTES and not first.endswith(b"\n"):
        first += stream.readline(LINE_BYTES + 1 - len(first))
    rest = _lines(stream, first)
    second = next(rest, b"") if _may_go_on(first) else b""
    if second.strip() and not second.startswith(b"{"):  # after a row that was cut off, the next line is a row again
        raise _refusal(name, *_OBJECT)
    yield first
    if second:
        yield second
    yield from rest


def _lines(stream: BinaryIO, before: bytes) -> Iterator[bytes]:
    """Yield the lines that follow; of a line that is too long, only LINE_BYTES + 1 bytes."""
    line = before
    while line:
        if len(line) > LINE_BYTES:
            while line and not line.endswith(b"\n"):  # skip the rest of the line
                line = stream.readline(LINE_BYTES)
        line = stream.readline(LINE_BYTES + 1)
        if line:
            yield line


def _refusal(name: str, found: str, remedy: str) -> RewardRTError:
    return RewardRTError(f"{name}: expected rows as JSONL, a JSON array, Parquet or Arrow; found {found}: {remedy}")


def _binary(head: bytes) -> tuple[str, str] | None:
    """Return the format of a file by its first bytes, and what to do with it; None if it may be JSONL."""
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
    """Return the column names in a line of CSV, or an empty set."""
    mark = next((mark for mark in (b"\t", b",", b";") if mark in line), None)
    return {name.strip().strip(b'"') for name in line.split(mark)} if mark else set()


def _may_go_on(first: bytes) -> bool:
    """Return whether the first line may begin an object that continues on the next line."""
    text = first.removeprefix(codecs.BOM_UTF8).decode(errors="replace").strip()
    if not text.startswith("{") or len(text) > 10**6:  # do not parse a very long line twice
        return False
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text)
    except (ValueError, RecursionError):
        return False
    return False
