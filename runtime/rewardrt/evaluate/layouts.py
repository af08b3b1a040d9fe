"""What a row of a benchmark is: how its layout is recognised, and the question that a model is asked with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rewardrt.errors import RewardRTError, RowError
from rewardrt.evaluate.measures import Measures
from rewardrt.evaluate.results import Results

LOOKED_AT = 20  # the first rows of a file, which tell its layout
ID_CHARACTERS = 64


@dataclass(frozen=True)
class Question:
    """One row of a benchmark: what is scored, and which of the answers are right.

    `row` is a row of the row contract with several answers, or with steps. `right` says of each answer, in the order of
    the row, whether it is a right one; of steps it is (). `label` is the index of the first wrong step, -1 where every
    step is right, and -1 of answers. `subset` is "" where a benchmark has none. Rows of one `unit` have the same
    prompt: they are drawn together when an interval is made.
    """

    row: dict[str, Any]
    right: tuple[bool, ...]
    subset: str = ""
    id: str = ""
    unit: str = ""
    label: int = -1


@dataclass(frozen=True)
class Need:
    """A field that a layout needs: its name, and what it holds, of which `_HOLDS` knows the meaning."""

    name: str
    holds: str = "text"
    among: frozenset[str] = frozenset()  # where not empty, the values that it may have

    def met(self, row: dict[str, Any]) -> bool:
        """Return whether a row has such a field."""
        value = row.get(self.name)
        return value is not None and _HOLDS[self.holds](value) and (not self.among or value in self.among)

    def __str__(self) -> str:
        one_of = f", such as {sorted(self.among)[0]!r}" if self.among else ""
        return f"{self.name} ({_WORDS[self.holds]}{one_of})"


@dataclass(frozen=True)
class Layout:
    """One benchmark, or kind of file: a row of the table in `benchmarks`.

    `read` makes a question of a row and the name of its file without its ending, or raises RowError. `measure` makes
    numbers of what became of the rows. `asks_for` says whether answers are rewarded, or the steps of one.
    """

    name: str
    title: str
    needs: tuple[Need, ...]
    read: Callable[[dict[str, Any], str], Question]
    measure: Callable[[Results], Measures]
    asks_for: Literal["answers", "steps"] = "answers"
    needs_one_of: tuple[Need, ...] = ()

    def lacks(self, row: dict[str, Any]) -> list[str]:
        """Return what a row would have to have, and has not."""
        missing = [str(need) for need in self.needs if not need.met(row)]
        if self.needs_one_of and not any(need.met(row) for need in self.needs_one_of):
            missing.append(" or ".join(map(str, self.needs_one_of)))
        return missing

    @property
    def size(self) -> int:
        """How many fields it needs."""
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
    """Return the first of the layouts that half of the rows of a file have, or else the one that most have.

    `name` is that of the file. Raises RewardRTError where no row has any, with the nearest and what it needs besides.
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
    """Return the strings of a list. Raises RowError."""
    value = row.get(name)
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise RowError(f"{name}: expected a list of strings, found {type(value).__name__}")
    return list(value)


def text_of(row: dict[str, Any], name: str) -> str:
    """Return a string. Raises RowError."""
    value = row.get(name)
    if not isinstance(value, str):
        raise RowError(f"{name}: expected a string, found {type(value).__name__}")
    return value


def number_of(row: dict[str, Any], name: str) -> int:
    """Return a whole number. Raises RowError."""
    value = row.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise RowError(f"{name}: expected a whole number, found {type(value).__name__}")
    return value


def id_of(row: dict[str, Any], *names: str) -> str:
    """Return the first of some fields that a row has, as a short string."""
    value = next((row[name] for name in names if isinstance(row.get(name), str | int)), "")
    return str(value)[:ID_CHARACTERS]


def unit_of(prompt: object) -> str:
    """Return what stands for a prompt: the same for the same one."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
