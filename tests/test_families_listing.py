"""`rewardrt families` and docs/families.md come from the one table that exports read."""

from __future__ import annotations

import json
from pathlib import Path

from commands import run
from rewardrt_export.families import FAMILIES


def test_the_page_in_docs_is_what_the_command_prints() -> None:
    page = (Path(__file__).parent.parent / "docs" / "families.md").read_text()
    assert run("families", "--markdown").stdout == page, "docs/families.md is old: make docs"


def test_every_family_is_listed_with_its_checkpoints_tap_head_eos_rule_and_output() -> None:
    listed = run("families").stdout
    narrow = run("families", columns=60).stdout
    assert max(map(len, listed.splitlines())) <= 110 and max(map(len, narrow.splitlines())) <= 60
    assert narrow.split() == listed.split()
    rows = {row["name"]: row for row in json.loads(run("families", "--json").stdout)}
    assert list(rows) == list(FAMILIES)
    for family in FAMILIES.values():
        assert f"{family.name}: {family.title}" in " ".join(listed.split())
        row = rows[family.name]
        assert all(row[word] for word in ("examples", "tap", "head", "eos", "output", "maths")), family.name


def test_the_page_about_adding_a_family_shows_a_module_and_its_test_as_they_are() -> None:
    root = Path(__file__).parent.parent
    page = (root / "docs" / "adding-a-family.md").read_text(encoding="utf-8")
    module, test = (block.partition("```")[0] for block in page.split("```python\n")[1:])
    assert module == (root / "export" / "rewardrt_export" / "families" / "mlp_head.py").read_text(encoding="utf-8")
    assert test in (root / "tests" / "test_mlp_heads_and_lm_rows.py").read_text(encoding="utf-8")
