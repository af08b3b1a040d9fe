"""Find a bundle's manifest, or say what the folder is instead and what to type then."""

from __future__ import annotations

import shlex
from pathlib import Path

from rewardrt.errors import BundleError

MANIFEST = "reward.json"


def find_manifest(folder: Path) -> Path:
    """Return the path of a bundle folder's manifest, or raise BundleError saying what the folder is instead."""
    file = folder / MANIFEST
    if folder.is_dir():
        if file.exists() or file.is_symlink():
            return file
        named = shlex.quote(str(folder))
        if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise BundleError(f"{folder}: a checkpoint, not a bundle; make one of it: `rewardrt export {named} BUNDLE`")
        raise BundleError(f"{file}: no such file; {folder} is not a bundle, which `rewardrt export` makes")
    if not folder.exists():
        raise BundleError(
            f"{folder}: expected a bundle folder, found nothing; `rewardrt export CHECKPOINT BUNDLE` makes one"
        )
    inside = f": give its folder, {folder.parent}" if folder.name == MANIFEST else ""
    raise BundleError(f"{folder}: expected a bundle folder, found a file{inside}")
