"""Read the text files of a checkpoint folder; recognise the pointer files that git-lfs leaves in place of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rewardrt.errors import CheckpointError

LOGIT_SCORE = "1_LogitScore/config.json"  # written by sentence-transformers' module for scores that are logits
_POINTER = b"version https://git-lfs"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or raise CheckpointError naming the file."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_text(path: Path) -> str:
    """Read a text file, or raise CheckpointError naming it."""
    check_pointer(path)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a checkpoint folder needs it") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as text ({error})") from error


def check_pointer(path: Path) -> None:
    """Raise CheckpointError for a pointer file, which git-lfs leaves if a file was not fetched."""
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(_POINTER)) == _POINTER
    except OSError:  # reading the file will report it
        return
    if is_pointer:
        raise CheckpointError(f"{path}: a git-lfs pointer and not the file itself; run `git lfs pull` in its folder")
