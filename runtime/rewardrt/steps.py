"""Progress reports of a long job: the current step, and how much of it is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One step of a job, reported when it begins and again for each countable part of it.

    A note reports something that the job chose or found out; it takes no time.
    """

    name: str
    at: int = 0  # number of the current part, from 1
    of: int = 0  # number of parts; 0: the parts are not counted
    unit: str = ""  # what is counted: "text", "weight"
    note: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {self.part}" if self.of else self.name

    @property
    def part(self) -> str:
        """The current part in words, such as "text 3 of 37"; "" if the parts are not counted."""
        return f"{self.unit} {self.at} of {self.of}" if self.of else ""


Progress = Callable[[Step], None]
Count = Callable[[int, int], None]  # takes the number of the current part, from 1, and the number of parts


def begin(progress: Progress, name: str, unit: str = "part") -> Count:
    """Report that a step begins; return the function that reports each of its parts."""
    progress(Step(name))
    return lambda at, of: progress(Step(name, at, of, unit))


def silent(step: Step) -> None:
    """Ignore a step: the `Progress` of a job that reports nothing."""


def uncounted(at: int, of: int) -> None:
    """Ignore a part: the `Count` of a step that reports no parts."""
