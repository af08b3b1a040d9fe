"""Where output bytes go: a file that gets its name only when it is complete, a device, or standard output."""

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
    """Writes bytes to a file or to standard output; a failure is a RewardRTError that names the destination."""

    def __init__(self, name: str | Path, file: BinaryIO) -> None:
        self._name = name
        self._file = file

    def write(self, data: bytes) -> None:
        """Write all the bytes, now or at the next flush. Raises RewardRTError."""
        with self._named():
            self._file.write(data)

    def flush(self) -> None:
        """Write out everything given so far. Raises RewardRTError."""
        with self._named():
            self._file.flush()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # the reader of our output has closed it
            raise
        except (OSError, ValueError) as error:  # ValueError: the file was closed meanwhile
            refuse(self._name, error)


@contextmanager
def open_output(path: str | Path | None) -> Iterator[Output]:
    """Open the output for writing bytes: a file, or standard output for None and "-".

    A file is written under a temporary name in its folder, and renamed when the block ends without an error. If the
    path exists and is not a regular file, such as /dev/null, it is written directly. Raises RewardRTError.
    """
    if path is None or str(path) == "-":
        sys.stdout.flush()  # keep the order of what was printed before
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
            with suppress(OSError):  # a full disk: the block has already raised for it
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
    """Rename a finished file to the output's name, replacing an existing file. Raises OSError."""
    if target.is_file():
        made.chmod(target.stat().st_mode & 0o777)  # a private file stays private
    made.replace(target)


def refuse(path: str | Path, error: Exception) -> NoReturn:
    """Raise a RewardRTError for a path that cannot be written."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = "make room, or write to another disk"
    elif str(path) == "standard output":
        remedy = "send it to a file or a program that reads it"
    else:
        remedy = "name a file in a writable folder"
    raise RewardRTError(f"{path}: cannot be written ({reason}); {remedy}") from error
