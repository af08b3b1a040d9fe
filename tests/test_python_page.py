"""docs/python.md names every call, property and option of RewardModel and RewardClient."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import rewardrt
from rewardrt import RewardClient, RewardModel

PAGE = (Path(__file__).parent.parent / "docs" / "python.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", PAGE))))


@pytest.mark.parametrize("found", [RewardModel, RewardClient])
def test_the_page_names_every_call_and_option(found: Any) -> None:
    members = {name for name in dir(found) if not name.startswith("_")}
    calls = [getattr(found, name) for name in members if callable(getattr(found, name))]
    calls += [found] if found is RewardClient else []  # a model is made by `load`
    options = {name for call in calls for name in inspect.signature(call).parameters}
    assert members | options - {"self", "items"} <= NAMED, sorted((members | options) - NAMED)


def test_the_page_gives_the_defaults_of_load_and_of_the_client() -> None:
    for call in (RewardModel.load, RewardClient):
        for name, each in inspect.signature(call).parameters.items():
            if each.default is not inspect.Parameter.empty:
                shown = f'`"{each.default}"`' if isinstance(each.default, str) else str(each.default)
                assert f"| `{name}` | {shown} |" in PAGE, name


@pytest.mark.parametrize("name", ["Scored", "ScoredPair", "ScoredAnswers", "Ranked"])
def test_the_page_names_every_field_of_a_result(name: str) -> None:
    found = getattr(rewardrt, name)
    fields = {*found.__dataclass_fields__, *(key for key, value in vars(found).items() if isinstance(value, property))}
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |")]
    missing = {field for field in fields if f"`{field}`" not in row}
    assert missing <= {"answers"} if name in ("Scored", "ScoredPair") else not missing
