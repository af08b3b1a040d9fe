"""docs/reference is what `site/reference.py` writes of `--help` and the docstrings: an old page fails here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", ["command.md", "python.md"])
def test_the_reference_is_what_help_and_docstrings_say(tmp_path: Path, page: str) -> None:
    subprocess.run([sys.executable, ROOT / "site" / "reference.py", tmp_path], check=True, timeout=100)
    assert (tmp_path / page).read_text() == (ROOT / "docs" / "reference" / page).read_text(), "make docs writes it anew"
