"""The only reader of JSON from outside: lines of files and bodies of requests.

Python's own reader accepts numbers that JSON does not have, and recurses for every level of nesting. This module checks
limits before anything is built: the levels of nesting, and for a server the number of values, because each value costs
far more memory and time than its bytes.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any, NoReturn

from rewardrt.errors import RowError

MAX_LEVELS = 128  # nested objects and lists; code that recurses over them stays far below Python's recursion limit
_TOO_DEEP = "nested too deeply; expected a JSON object of fewer levels"
_TOO_MANY_DIGITS = "holds an integer of too many digits; write it as a string"
_BETWEEN = re.compile(rb'[^"\[\]{}]+')
_QUOTE, _BACKSLASH = ord('"'), ord("\\")
_OPEN, _CLOSE = frozenset(b"[{"), frozenset(b"]}")


@dataclass(frozen=True)
class Bounds:
    """How much one document may contain.

    `nodes` counts strings, objects and lists; `numbers` counts the other values.
    """

    nodes: int
    numbers: int


class TooManyValuesError(RowError):
    """A document exceeds its bounds; a smaller part of it could be read."""


def read_json(data: bytes, bounds: Bounds | None = None) -> Any:
    """Return the value of a JSON document in UTF-8, or raise RowError saying what is wrong with it."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise RowError(f"expected UTF-8, found the byte 0x{data[error.start]:02x} at byte {error.start + 1}") from None
    if bounds is not None or data.count(b"[") + data.count(b"{") > MAX_LEVELS:
        _scan(data, bounds)
    try:
        return json.loads(text, parse_constant=_refuse_number, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON ({error.msg} at character {error.pos + 1}); expected a JSON object") from None
    except ValueError:  # Python's limit on the digits of an integer
        raise RowError(_TOO_MANY_DIGITS) from None
    except RecursionError:  # the caller was already deep in the stack
        raise RowError(_TOO_DEEP) from None


def _scan(data: bytes, bounds: Bounds | None) -> None:
    """Raise RowError for a document over the bounds; stop where it is not JSON, which `json.loads` then reports.

    Each step handles one string, one bracket or the bytes between them, so other threads often get to run.
    """
    levels = nodes = numbers = at = 0
    while at < len(data):
        byte = data[at]
        if byte == _QUOTE:
            nodes += 1
            at = _string_end(data, at + 1)
            if at < 0:
                return
        elif byte in _OPEN:
            nodes += 1
            levels += 1
            at += 1
            if levels > MAX_LEVELS:
                raise RowError(_TOO_DEEP)
        elif byte in _CLOSE:
            levels -= 1
            at += 1
        else:
            found = _BETWEEN.match(data, at)
            assert found is not None
            numbers += data.count(b",", at, found.end())
            at = found.end()
        if bounds is not None and (nodes > bounds.nodes or numbers > bounds.nodes + bounds.numbers):
            raise TooManyValuesError(
                f"holds too many values; expected at most {bounds.nodes} strings, objects and lists, "
                f"and {bounds.numbers} numbers: send fewer at a time"
            )


def _string_end(data: bytes, start: int) -> int:
    """Return the offset after the end of the string whose contents begin at `start`; -1 if it does not end."""
    at = start
    while (at := data.find(_QUOTE, at)) >= 0:
        escapes = at
        while escapes > start and data[escapes - 1] == _BACKSLASH:
            escapes -= 1
        at += 1
        if (at - 1 - escapes) % 2 == 0:
            return at
    return -1


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        _refuse_number(text)
    return value


def _refuse_number(text: str) -> NoReturn:
    raise RowError(f"holds {text[:40]}, which is no number that JSON can carry; write null or a string")
