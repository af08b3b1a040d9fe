"""Check where a checkpoint is read from and a bundle is written to, before anything heavy is imported."""

from __future__ import annotations

import shlex
from pathlib import Path

from rewardrt.bundle import hub
from rewardrt.bundle.folder import MANIFEST
from rewardrt.errors import CheckpointError, ExportError

DESCRIPTIONS = ("config.json", "adapter_config.json")  # a checkpoint's folder has one of these


def find_repository(name: str | Path) -> hub.Repository | None:
    """Return the Hub repository that a checkpoint's name means, or None for a folder.

    `hf://ORG/NAME` is always on the Hub. `ORG/NAME` is a folder if one of that name exists, or if a folder ORG exists,
    because a missing folder in it is then a typing error. Raises HubError for `hf://` with an invalid name.
    """
    repository = hub.parse(name)
    if repository is None and not Path(name).exists() and not Path(name).parent.exists():
        repository = hub.named(str(name))
    return repository


def check_checkpoint(*folders: Path | None) -> None:
    """Raise CheckpointError for a path that is not a folder, or is a bundle; None is skipped."""
    for folder in folders:
        if folder is None:
            continue
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: expected a checkpoint folder, found {_found_at(folder)}")
        if (folder / MANIFEST).is_file() and not any((folder / name).is_file() for name in DESCRIPTIONS):
            raise CheckpointError(
                f"{folder}: a bundle already, which `rewardrt score {shlex.quote(str(folder))} ROWS.jsonl` scores "
                "with; an export takes the checkpoint that it was made of"
            )


def check_target(target: Path, *, force: bool) -> None:
    """Raise ExportError if a bundle may not or cannot be written to this path."""
    try:
        if target.exists() or target.is_symlink():
            if not force:
                raise ExportError(f"{target}: exists already; choose another folder, or replace it with --force")
            if not (target / MANIFEST).is_file() and not (target.is_dir() and not any(target.iterdir())):
                raise ExportError(f"{target}: is not a bundle; --force replaces bundles only")
    except OSError as error:  # a name that the file system does not allow
        raise ExportError(f"{target}: cannot be written ({error.strerror})") from error


def _found_at(folder: Path) -> str:
    """Say what is at a path that should be a folder, and what to give instead."""
    if folder.exists():
        return f"a file; give the folder that it lies in, {folder.parent}"
    repository = hub.named(str(folder))
    if repository is None:
        return "nothing"
    return f"nothing; to download it from the Hugging Face Hub, name it {repository}"
