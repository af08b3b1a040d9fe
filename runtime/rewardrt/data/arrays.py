"""The items of a JSON array one by one, for arrays of any length and any layout over lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

from rewardrt.data.formats import LINE_BYTES
from rewardrt.errors import RewardRTError

_CHUNK = 2**20
_OUTSIDE, _INSIDE = re.compile(rb'["\[\]{},]'), re.compile(rb'["\\]')  # bytes to stop at outside and inside a string


def array_items(stream: BinaryIO, name: str, first: bytes = b"") -> Iterator[bytes]:
    """Yield the bytes of each item of the JSON array in a stream, without parsing the items.

    `first` are bytes of the stream that were already read. Raises RewardRTError if the array does not end, if something
    follows it, or if an item is longer than LINE_BYTES.
    """
    data, at, start = first, 0, 0  # the buffer, the offset scanned to, the offset of the current item
    depth, in_string, items = 0, False, 0
    while True:
        found = (_INSIDE if in_string else _OUTSIDE).search(data, at)
        if found is None or (data[found.start()] == ord("\\") and found.end() == len(data)):
            more = stream.read(_CHUNK)
            if not more:
                raise RewardRTError(f"{name}: ends within the array, after item {items}; is the file whole?")
            if len(data) - start > LINE_BYTES:
                raise RewardRTError(f"{name}: item {items + 1} is longer than {LINE_BYTES} bytes")
            at = (len(data) if found is None else found.start()) - start
            data, start = data[start:] + more, 0
            continue
        mark, at = data[found.start()], found.end()
        if in_string:
            at += mark == ord("\\")
            in_string = mark == ord("\\")
        elif mark == ord('"'):
            in_string = True
        elif mark in b"[{":
            depth += 1
            start = at if depth == 1 else start
        elif mark in b"]}":
            depth -= 1
        if mark == ord(",") and depth == 1 and not in_string:
            items += 1
            yield data[start : found.start()]
            start = at
        elif depth == 0 and not in_string:
            last = data[start : found.start()]
            if last.strip() or items:
                yield last
            if (data[at:] + stream.read(_CHUNK)).strip():
                raise RewardRTError(f"{name}: something follows the array; expected one array, or one object a line")
            return
