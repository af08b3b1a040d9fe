"""Where bytes go: a file that takes its name when it is whole, a device, or standard output."""

from __future__ import annotations

import errno
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NoReturn

from rewardrt.errors import RewardRTError


class Output:
    """Bytes on their way to a file or to standard output; what stops them is a RewardRTError that names the place."""

    def __init__(self, name: str | Path, file: BinaryIO) -> None:
        self._name = name
        self._file = file

    def write(self, data: bytes) -> None:
        """Write all of the bytes, now or with the next flush."""
        with self._named():
            self._file.write(data)

    def flush(self) -> None:
        """Have everything written that was given so far."""
        with self._named():
            self._file.flush()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # the reader of our output has had enough
            raise
        except (OSError, ValueError) as error:  # ValueError: it was closed meanwhile
            refuse(self._name, error)


@contextmanager
def open_output(path: str | Path | None) -> Iterator[Output]:
    """Open the output for writing bytes: a file, or standard output for None and "-".

    A file is written under another name in its folder, and takes its own name when the block ends well. What is there
    but is not a plain file, such as /dev/null, is written to directly.
    """
    if path is None or str(path) == "-":
        sys.stdout.flush()  # what was printed before comes before
        output = Output("standard output", sys.stdout.buffer)
        yield output
        output.flush()
        return
    try:
        target = Path(path).resolve()
        in_place = target.exists() and not target.is_file()
        name = target if in_place else target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        file = name.open("wb" if in_place else "xb")
    except (OSError, ValueError) as error:
        refuse(path, error)
    try:
        try:
            output = Output(path, file)
            yield output
            output.flush()
        finally:
            with suppress(OSError):  # of a full disk, which the block was told of, or is told by the line above
                file.close()
        if not in_place:
            try:
                take_name(name, target)
            except OSError as error:
                refuse(path, error)
    except BaseException:
        if not in_place:
            with suppress(OSError):
                name.unlink()
        raise


def take_name(made: Path, target: Path) -> None:
    """Let what was made take the name of the output, in the place of a file that is there. Raises OSError."""
    if target.is_file():
        made.chmod(target.stat().st_mode & 0o777)  # what was private stays private
    made.replace(target)


def refuse(path: str | Path, error: Exception) -> NoReturn:
    """Raise the RewardRTError of a place that cannot be written."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = "make room, or write to another disk"
    elif str(path) == "standard output":
        remedy = "send it to a file or a program that reads it"
    else:
        remedy = "name a file in a writable folder"
    raise RewardRTError(f"{path}: cannot be written ({reason}); {remedy}") from error
