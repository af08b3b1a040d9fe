"""What a row of a benchmark contains: recognise its layout, and turn the row into a question for the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rewardrt.errors import RewardRTError, RowError
from rewardrt.evaluate.measures import Measures
from rewardrt.evaluate.results import Results

LOOKED_AT = 20  # number of first rows of a file by which its layout is recognised
ID_CHARACTERS = 64


@dataclass(frozen=True)
class Question:
    """One row of a benchmark: what is scored, and which of the answers are right.

    `row` follows the row contract, with several answers or with steps. `right` says for each answer, in order, whether
    it is right; it is () for steps. For steps, `label` is the index of the first wrong one, or -1 if every step is
    right; for answers it is -1. `subset` is "" if a benchmark has no subsets. Rows with the same `unit` have the same
    prompt; the bootstrap draws them together.
    """

    row: dict[str, Any]
    right: tuple[bool, ...]
    subset: str = ""
    id: str = ""
    unit: str = ""
    label: int = -1


@dataclass(frozen=True)
class Need:
    """A field that a layout requires: its name, and the kind of value it holds, a key of `_HOLDS`."""

    name: str
    holds: str = "text"
    among: frozenset[str] = frozenset()  # the allowed values, unless empty

    def met(self, row: dict[str, Any]) -> bool:
        """Return whether a row has such a field with a value of the right kind."""
        value = row.get(self.name)
        return value is not None and _HOLDS[self.holds](value) and (not self.among or value in self.among)

    def __str__(self) -> str:
        one_of = f", such as {sorted(self.among)[0]!r}" if self.among else ""
        return f"{self.name} ({_WORDS[self.holds]}{one_of})"


@dataclass(frozen=True)
class Layout:
    """One benchmark, or one kind of file: an entry of the table in `benchmarks`.

    `read` makes a question from a row and its file's name without the ending, or raises RowError. `measure` computes
    numbers from the scored rows. `asks_for` says whether answers are rewarded, or the steps of one answer.
    """

    name: str
    title: str
    needs: tuple[Need, ...]
    read: Callable[[dict[str, Any], str], Question]
    measure: Callable[[Results], Measures]
    asks_for: Literal["answers", "steps"] = "answers"
    needs_one_of: tuple[Need, ...] = ()

    def lacks(self, row: dict[str, Any]) -> list[str]:
        """Return the required fields that a row lacks, in words."""
        missing = [str(need) for need in self.needs if not need.met(row)]
        if self.needs_one_of and not any(need.met(row) for need in self.needs_one_of):
            missing.append(" or ".join(map(str, self.needs_one_of)))
        return missing

    @property
    def size(self) -> int:
        """The number of required fields."""
        return len(self.needs) + bool(self.needs_one_of)


def _is_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, str) for item in value)


def _is_turns(value: object) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, dict) for item in value)


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_HOLDS: dict[str, Callable[[object], bool]] = {
    "text": lambda value: isinstance(value, str),
    "texts": _is_texts,
    "three": lambda value: _is_texts(value) and len(value) == 3,  # type: ignore[arg-type]
    "id": lambda value: isinstance(value, str) or _is_number(value),
    "prompt": lambda value: isinstance(value, str) or _is_turns(value),
    "turns": _is_turns,
    "number": _is_number,
    "right": lambda value: _is_number(value) or (isinstance(value, list | tuple) and bool(value)),
}
_WORDS = {
    "text": "a string",
    "texts": "a list of strings",
    "three": "a list of three strings",
    "id": "a string or a whole number",
    "prompt": "a string or messages",
    "turns": "a list of messages",
    "number": "a whole number",
    "right": "a list that says of each answer whether it is right, or the index of the right one",
}


def recognise(rows: Sequence[dict[str, Any]], layouts: Iterable[Layout], name: str) -> Layout:
    """Return the first layout that fits at least half of a file's rows, or else the one that fits most.

    `name` is the file's name. Raises RewardRTError if no row fits any layout; the message names the nearest layout and
    the fields that it also needs.
    """
    known = list(layouts)
    fits = [sum(not layout.lacks(row) for row in rows) for layout in known]
    if any(fits):
        half = (layout for layout, count in zip(known, fits, strict=True) if 2 * count >= len(rows))
        return next(half, known[fits.index(max(fits))])
    if not rows:
        raise RewardRTError(
            f"{name}: none of its first {LOOKED_AT} rows is a JSON object; expected rows of a benchmark"
        )
    row = max(rows, key=len)
    nearest = min(known, key=lambda layout: len(layout.lacks(row)) / layout.size)
    has = ", ".join(sorted(row)[:12]) or "none"
    raise RewardRTError(
        f"{name}: of no known layout; the nearest is that of {nearest.title}, which also needs "
        f"{' and '.join(nearest.lacks(row))}; the fields are {has} (--columns says what a file calls them)"
    )


def prompt_of(row: dict[str, Any], name: str = "prompt") -> dict[str, Any]:
    """Return the prompt of a row as a field of the row contract. Raises RowError."""
    value = row.get(name)
    if value is None and name == "prompt" and row.get("messages") is not None:
        return {"messages": row["messages"]}
    if not _HOLDS["prompt"](value):
        raise RowError(f"{name}: expected a string or messages, found {type(value).__name__}")
    return {"prompt": value}


def texts_of(row: dict[str, Any], name: str) -> list[str]:
    """Return a field that is a list of strings. Raises RowError."""
    value = row.get(name)
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise RowError(f"{name}: expected a list of strings, found {type(value).__name__}")
    return list(value)


def text_of(row: dict[str, Any], name: str) -> str:
    """Return a field that is a string. Raises RowError."""
    value = row.get(name)
    if not isinstance(value, str):
        raise RowError(f"{name}: expected a string, found {type(value).__name__}")
    return value


def number_of(row: dict[str, Any], name: str) -> int:
    """Return a field that is a whole number. Raises RowError."""
    value = row.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise RowError(f"{name}: expected a whole number, found {type(value).__name__}")
    return value


def id_of(row: dict[str, Any], *names: str) -> str:
    """Return the first of these fields that a row has, as a short string."""
    value = next((row[name] for name in names if isinstance(row.get(name), str | int)), "")
    return str(value)[:ID_CHARACTERS]


def unit_of(prompt: object) -> str:
    """Return a hash that is equal for equal prompts."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
