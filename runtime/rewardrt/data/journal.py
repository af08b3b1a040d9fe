"""An unfinished output, and a journal of the part of it that is safely on disk.

Until OUTPUT is complete, there are two files next to it. `OUTPUT.part` has what was written so far. `OUTPUT.journal`
has lines of JSON: first what the job is, then for each window of rows the size of the part file after it. When the job
is resumed, the part file is cut to the last size in the journal, because the process may have ended at any moment.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, cast

from rewardrt.data.files import Summary
from rewardrt.data.inputs import UNFINISHED
from rewardrt.data.outputs import refuse
from rewardrt.errors import RewardRTError

PART, JOURNAL = UNFINISHED


class Unfinished:
    """The part file and the journal of one output, locked against other processes."""

    def __init__(self, target: Path, identity: dict[str, Any], *, resume: bool) -> None:
        """Begin the output, or with `resume` continue it. Raises RewardRTError.

        `identity` is what has to be equal for the output to be continued: the bundle, the inputs, the options.
        """
        self.target = target
        self.part = target.with_name(target.name + PART)
        self.journal = target.with_name(target.name + JOURNAL)
        self.summary = Summary()
        self._file: BinaryIO
        self._log: BinaryIO
        self._tidy()
        there = self.part.exists() or self.journal.exists()
        if there and not resume:
            raise RewardRTError(
                f"{self.part}: an unfinished output is there ({_rows(self.journal)}); "
                "go on with it by --resume, or delete it and its .journal"
            )
        if resume and not there and target.exists():
            raise RewardRTError(f"{target}: is whole, there is nothing to resume; leave out --resume to score anew")
        try:
            if there:
                self._go_on(identity)
            else:
                self._begin(identity)
        except OSError as error:
            refuse(self.target, error)

    @property
    def safe_rows(self) -> int:
        """The number of input rows that are safely on disk."""
        return self._safe

    def write(self, data: bytes) -> None:
        """Write a part of the output; it is safe after the next `commit`."""
        try:
            self._file.write(data)
        except OSError as error:
            refuse(self.target, error)

    def commit(self, summary: Summary) -> None:
        """Force everything written so far to disk, and record it in the journal."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            record = {"bytes": self._file.tell(), "summary": asdict(summary)}
            self._log.write(json.dumps(record).encode() + b"\n")
            self._log.flush()
            os.fsync(self._log.fileno())
        except OSError as error:
            refuse(self.target, error)
        self._safe = summary.read

    def close(self) -> None:
        """Close the files. They are kept, unless nothing in them is safe."""
        for file in (self._file, self._log):
            with suppress(OSError):  # a full disk, which was reported before
                file.close()
        if not self._safe:
            self.forget()

    def forget(self) -> None:
        """Delete both files."""
        for path in (self.part, self.journal):
            with suppress(OSError):
                path.unlink()

    def _tidy(self) -> None:
        """Delete the files of a process that ended before its first row was safe, or after its output was complete."""
        with suppress(OSError), self.journal.open("rb") as journal:
            _lock(journal, self.part)  # another process may be doing this now
            if b"\n" not in journal.read():
                self.forget()
            elif not self.part.exists() and self.target.exists():
                self.journal.unlink()

    def _begin(self, identity: dict[str, Any]) -> None:
        self._file, self._safe = self.part.open("xb"), 0
        try:
            self._log = self.journal.open("xb")
            _lock(self._log, self.part)
            self._log.write(json.dumps({"job": identity}).encode() + b"\n")
            self._log.flush()
        except BaseException:
            self.forget()
            raise

    def _go_on(self, identity: dict[str, Any]) -> None:
        if not (self.part.exists() and self.journal.exists()):
            raise RewardRTError(
                f"{self.target}: of an unfinished output only one of {self.part.name} and {self.journal.name} is "
                "there; delete it and begin anew"
            )
        self._log = self.journal.open("r+b")
        try:
            self._read_on(identity)
        except BaseException:
            self._log.close()
            raise

    def _read_on(self, identity: dict[str, Any]) -> None:
        _lock(self._log, self.part)
        job, records, end = _read(self.journal)
        if (difference := changed(job, identity)) is not None:
            raise RewardRTError(
                f"{self.part}: was begun with {difference}; go on with what it was begun with, or delete it and its "
                ".journal"
            )
        self._file = self.part.open("r+b")
        size = self.part.stat().st_size
        good = [record for record in records if record["bytes"] <= size]
        last: dict[str, Any] = good[-1] if good else {"bytes": 0, "summary": {}}
        self._file.truncate(last["bytes"])
        self._file.seek(0, os.SEEK_END)
        self._log.truncate(end)
        self._log.seek(0, os.SEEK_END)
        self.summary = Summary(**last["summary"])
        self._safe = self.summary.read


@contextmanager
def unfinished(target: Path, identity: dict[str, Any], *, resume: bool) -> Iterator[Unfinished]:
    """Begin or continue an output; afterwards its part file is kept, unless it was renamed or is empty."""
    output = Unfinished(target, identity, resume=resume)
    try:
        yield output
    finally:
        output.close()


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """Return a journal's job, its complete lines, and the offset where they end; the last line may be truncated."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    try:
        lines = [json.loads(line) for line in data[:end].splitlines()]
        return cast(dict[str, Any], lines[0]["job"]), lines[1:], end
    except (ValueError, IndexError, KeyError, TypeError):
        raise RewardRTError(f"{path}: not a journal of this version; delete it and the .part, and begin anew") from None


def _rows(journal: Path) -> str:
    try:
        records = _read(journal)[1]
    except (OSError, RewardRTError):
        return "its journal cannot be read"
    rows = records[-1]["summary"]["read"] if records else 0
    return f"{rows} rows are safe"


def changed(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Return how a job differs from an earlier one, in words; None if it does not."""
    now = json.loads(json.dumps(now))
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            old = json.dumps(before.get(name), ensure_ascii=False)
            new = json.dumps(now.get(name), ensure_ascii=False)
            if name in ("bundle", "inputs"):
                return f"{'another bundle' if name == 'bundle' else 'other inputs, or inputs that were changed since'}"
            return f"{name} {old[:80]} and not {new[:80]}"
    return None


def _lock(file: BinaryIO, part: Path) -> None:
    """Lock the journal against other processes for as long as it is open here. Raises RewardRTError."""
    try:
        import fcntl
    except ImportError:  # Windows, where open files cannot be renamed
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RewardRTError(f"{part}: another process is writing it") from None
    except OSError:  # a file system without locks
        return
