"""A folder of TensorRT engines, built once and shared by all later processes.

An entry is a folder named by a hash of everything that its engine depends on. It is written to a temporary folder, with
a list of its files and their SHA-256, and then renamed into place. An entry whose files do not match its list is built
again. One process builds while the others wait on a file lock, which the operating system releases if its holder dies.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "REWARDRT_ENGINE_CACHE"  # environment variable that names the folder; `--engine-cache` sets it
CONTENTS = "contents.json"  # the list of files, written last: a folder without it is not an entry
RUNTIME = "runtime"  # subfolder for files that a provider adds while it runs; the list of files leaves them out
WAIT_SECONDS = 3600.0
Say = Callable[[str], None]


class CacheError(Exception):
    """The folder cannot store an entry; the message says why, and what to do."""


def root() -> Path:
    """Return the folder of all entries: the environment variable `VARIABLE`, or else a folder in the user's cache."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "rewardrt"


@dataclass(frozen=True)
class Key:
    """Everything that an engine depends on, as (name, text) pairs: the bundle's hash, GPU, driver, versions, shapes."""

    parts: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        """The name of the entry's folder: the first 32 hexadecimal digits of the SHA-256 of the parts."""
        return hashlib.sha256(json.dumps(self.parts).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Entry:
    """The folder of one cache entry, which may or may not exist yet."""

    folder: Path

    @classmethod
    def of(cls, key: Key) -> Entry:
        """Return the entry of a key in the cache of this process."""
        return cls(root() / key.name)

    def is_whole(self) -> bool:
        """Whether every listed file exists with its recorded SHA-256."""
        try:
            listed = json.loads((self.folder / CONTENTS).read_text(encoding="utf-8"))["files"]
            return bool(listed) and all(_sha256(self.folder / name) == sha256 for name, sha256 in listed.items())
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            return False

    def is_there(self) -> bool:
        """Whether the entry was written completely once; its files may have changed since."""
        return (self.folder / CONTENTS).is_file()

    def obtain(self, key: Key, build: Callable[[Path], None], say: Say = lambda line: None) -> None:
        """Make sure that the entry is complete: use it, wait for the process that is building it, or call `build`.

        `build` is given an empty folder and writes the engine into it. Raises CacheError if the cache cannot be
        written, and whatever `build` raises.
        """
        if self.is_whole():
            return
        try:
            with _locked(self.folder.with_suffix(".lock"), say):
                if self.is_whole():  # the process that had the lock built it
                    return
                if self.folder.exists():
                    say(f"{self.folder}: not whole, or changed; the engine is built anew")
                self._make(key, build)
        except OSError as error:
            raise CacheError(
                f"{self.folder.parent}: engines cannot be kept there ({error.strerror or error}); "
                "name another folder by --engine-cache"
            ) from error

    def _make(self, key: Key, build: Callable[[Path], None]) -> None:
        made = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}.", dir=self.folder.parent))
        try:
            try:
                build(made)
            except Exception:
                (made / "room").write_bytes(bytes(2**20))  # OSError if the disk is full: libraries rarely say so
                raise
            files = sorted(path for path in made.rglob("*") if path.is_file() and RUNTIME not in path.parts)
            listed = {path.relative_to(made).as_posix(): _sha256(path) for path in files}
            text = json.dumps({"made_for": dict(key.parts), "files": listed}, indent=2)
            (made / CONTENTS).write_text(text + "\n", encoding="utf-8")
            if self.folder.exists():
                shutil.rmtree(self.folder)
            made.rename(self.folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)


def holds(identity: str) -> bool:
    """Whether the cache has an entry for this identity (hash of graph and weights), for this machine or another one."""
    try:
        return any(_made_for(path).get("identity") == identity for path in root().glob(f"*/{CONTENTS}"))
    except OSError:
        return False


def _made_for(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["made_for"]
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


@contextlib.contextmanager
def _locked(path: Path, say: Say) -> Iterator[None]:
    """Hold a file lock inside the block. Raises TimeoutError, an OSError, if another process keeps it too long."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # an engine is code: only its owner may write here
    with path.open("a+b") as file:
        deadline, waited = time.monotonic() + WAIT_SECONDS, False
        while not _lock(file.fileno()):
            if not waited:
                say("another process is building this engine; waiting for it")
                waited = True
            if time.monotonic() > deadline:
                raise TimeoutError(f"another process has had {path} for {WAIT_SECONDS:g} s")
            time.sleep(0.1)
        yield  # closing the file gives the lock back


def _lock(descriptor: int) -> bool:
    """Try to take the lock of an open file; return whether it was free."""
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
