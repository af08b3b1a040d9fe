"""The folder in which a bundle is made, and how it gets into its place: whole, or not at all."""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rewardrt.bundle.manifest import Bundle, read_bundle
from rewardrt.errors import ExportError
from rewardrt_export.places import check_target

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS)


@contextlib.contextmanager
def workplace(target: Path, *, force: bool) -> Iterator[Path]:
    """Yield a new folder next to the target, which is removed at the end unless it was renamed to the target.

    It is inside a temporary folder of its own. A bundle that it replaces is moved there too, and the temporary folder
    is always removed at the end.
    """
    check_target(target, force=force)
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ExportError(f"{target}: cannot be written ({error.strerror})") from error
    try:
        try:
            folder = place / "bundle"  # mkdtemp's folder is private; other users should be able to read a bundle
            folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(place, ignore_errors=True)
            for parent in made:
                with contextlib.suppress(OSError):  # not empty if the bundle is in it
                    parent.rmdir()
    except OSError as error:
        raise ExportError(_say_os_error(error, target)) from error
    except KeyboardInterrupt as end:  # possibly a second one, during the removal of the folder
        left = f"{place} was left behind: delete it" if place.exists() else "nothing was left behind"
        raise type(end)(left) from None


def _say_os_error(error: OSError, target: Path) -> str:
    """Describe an error of the operating system; for a full disk, say where."""
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in FULL or error.errno is None:  # numpy's errors have no errno
        return (
            f"{target}: cannot be written whole ({reason}); nothing was left behind: make room, or choose another disk"
        )
    return f"the export was stopped by the system: {reason}{f' ({error.filename})' if error.filename else ''}"


def move(folder: Path, target: Path) -> Bundle:
    """Move the new bundle into place; if that fails or is interrupted, restore the old one."""
    replaced = folder.with_name("replaced")
    try:
        if target.exists():
            target.rename(replaced)
        folder.rename(target)
    except BaseException:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise
    return read_bundle(target, check_hashes=False)
