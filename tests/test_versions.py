"""The oldest and the newest libraries that the project allows are those that are tested: see the Makefile."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins(name: str) -> dict[str, str]:
    """Return the versions of a file of constraints, by names in pip's normal form."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {re.sub("[-_.]+", "-", name).lower(): version for name, version in pairs}


def lowest(requirements: list[str]) -> dict[str, str]:
    """Return what each requirement has after `>=`."""
    found = [re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)(?:,.*)?", line) for line in requirements]
    return {match[1].lower(): match[2] for match in found if match is not None}


def as_numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


RUNTIME = lowest(
    [
        *PROJECT["dependencies"],
        *(line for name in ("cpu", "serve", "data", "hub") for line in PROJECT["optional-dependencies"][name]),
    ]
)


@pytest.mark.parametrize("name", sorted(RUNTIME))
def test_the_oldest_release_that_is_allowed_is_the_one_that_is_tested(name: str) -> None:
    """A bound of two numbers means the first release of these numbers on the index."""
    bound, tested = as_numbers(RUNTIME[name]), as_numbers(pins("constraints-oldest.txt")[name])
    assert tested[: len(bound)] == bound
    assert tested[len(bound) :] in ((), (0,)) or (name, tested) == ("onnxruntime", (1, 24, 1))  # there is no 1.24.0


def test_the_whole_suite_runs_on_the_oldest_transformers() -> None:
    bound = lowest(PROJECT["optional-dependencies"]["export"])["transformers"]
    assert pins("constraints.txt")["transformers"] == f"{bound}.0"


def test_the_newest_are_not_older_than_the_pins() -> None:
    usual, newest = pins("constraints.txt"), pins("constraints-newest.txt")
    assert newest.keys() == {"onnxruntime", "tokenizers", "transformers"}
    assert all(as_numbers(newest[name]) >= as_numbers(usual[name]) for name in newest)
