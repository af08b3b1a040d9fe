"""What a long job tells whoever waits for it: the step that it is at, and how much of that is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """A step of a job, said when it begins, and again with each part of it that can be counted.

    A note is something that the job chose or found out; it takes no time.
    """

    name: str
    at: int = 0  # the part that is worked at, from 1
    of: int = 0  # how many there are; 0: they are not counted
    unit: str = ""  # what is counted: "text", "weight"
    note: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {self.part}" if self.of else self.name

    @property
    def part(self) -> str:
        """The part that is worked at, in words; "" where they are not counted."""
        return f"{self.unit} {self.at} of {self.of}" if self.of else ""


Progress = Callable[[Step], None]
Count = Callable[[int, int], None]  # takes the part that is worked at, from 1, and how many there are


def begin(progress: Progress, name: str, unit: str = "part") -> Count:
    """Say that a step begins, and return what its parts are counted with."""
    progress(Step(name))
    return lambda at, of: progress(Step(name, at, of, unit))


def silent(step: Step) -> None:
    """Tell nobody."""


def uncounted(at: int, of: int) -> None:
    """Count for nobody."""
