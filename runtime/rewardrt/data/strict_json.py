"""The one reader of JSON that comes from outside: lines of files and bodies of requests.

Python's own reader takes numbers that JSON does not have, and recurses for every level. What is allowed is decided
here, before anything is built: levels, and for a server how many values there may be, because each costs far more
memory and time than its bytes.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any, NoReturn

from rewardrt.errors import RowError

MAX_LEVELS = 128  # of objects and lists inside each other; what recurses over them stays far from Python's own limit
_TOO_DEEP = "nested too deeply; expected a JSON object of fewer levels"
_TOO_MANY_DIGITS = "holds an integer of too many digits; write it as a string"
_BETWEEN = re.compile(rb'[^"\[\]{}]+')
_QUOTE, _BACKSLASH = ord('"'), ord("\\")
_OPEN, _CLOSE = frozenset(b"[{"), frozenset(b"]}")


@dataclass(frozen=True)
class Bounds:
    """How much one document may hold. `nodes` are strings, objects and lists; `numbers` are the other values."""

    nodes: int
    numbers: int


class TooManyValuesError(RowError):
    """A document over its bounds; a part of it may be read."""


def read_json(data: bytes, bounds: Bounds | None = None) -> Any:
    """Return the value of a JSON document in UTF-8, or raise RowError that says what is wrong with it."""
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
    except RecursionError:  # a caller that was already deep
        raise RowError(_TOO_DEEP) from None


def _scan(data: bytes, bounds: Bounds | None) -> None:
    """Raise RowError for a document over the bounds; stops where it cannot be JSON, which its reader then says.

    A step is a string, a bracket or what lies between them, so other threads are let in often.
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
    """Return where a string ends that begins before `start`; -1 where it does not."""
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
