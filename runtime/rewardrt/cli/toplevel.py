"""The outermost layer of the command: its standard streams, and how it ends.

| cause of the end | standard error | exit status |
| --- | --- | --- |
| success | | the command's own: 0, or 1 |
| an error of ours, or of the command line | one line | 2 |
| the machine: a full disk, no permission, a closed stream, out of memory, a broken installation | one line | 2 |
| the reader of the output has closed it, as `head` does | nothing | 1 |
| Ctrl+C; SIGTERM, if the job can be resumed or has files to remove | one line | 130; 143 |
| anything else: a bug of RewardRT | one line, and one line for a report | 3 |

There is never a traceback. The line for a report contains versions, the error and places in the code. It contains none
of the scored texts and no paths of the machine.
"""

from __future__ import annotations

import atexit
import errno
import io
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, TypeVar, cast

import click

from rewardrt.cli.fault import PACKAGES, report, where_to_report
from rewardrt.display import visible, visible_lines
from rewardrt.errors import RewardRTError

_Result = TypeVar("_Result")

OUR_THREADS = "rewardrt-"  # prefix of the names of all threads that RewardRT starts

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than this process may write",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EROFS: "the file system is read-only",
    errno.ENOENT: "a file or folder is missing",
    errno.EMFILE: "too many open files",
    errno.ENFILE: "too many open files",
    errno.ENOMEM: "out of memory",
    errno.EBADF: "a stream is closed",
    errno.EIO: "the disk or terminal failed",
}


def run(command: click.Command) -> NoReturn:
    """Run a command line in this process, and exit."""
    before, had_pyarrow, status = set(threading.enumerate()), "pyarrow" in sys.modules, 0
    interrupted = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        interrupted.set()
        raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()
    try:
        if in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, interrupt)
        _prepare_streams()
        status = _invoke(command)
        sys.stdout.flush()
        if interrupted.is_set():
            raise KeyboardInterrupt
    except BaseException as error:  # also panics of libraries, which are BaseExceptions
        # During an import, a library may have turned Ctrl+C into an error of its own.
        made_of_it = interrupted.is_set() and not isinstance(error, KeyboardInterrupt | BrokenPipeError)
        status = _end(KeyboardInterrupt() if made_of_it else error)
    if in_main and signal.getsignal(signal.SIGINT) is interrupt:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _discard_unwritten()
    ours = {each.name for each in set(threading.enumerate()) - before if each.daemon}
    # pyarrow's own threads abort the process too, if an error stopped it while reading.
    at_once = any(name.startswith(OUR_THREADS) for name in ours) or ("pyarrow" in sys.modules and not had_pyarrow)
    _leave(status, at_once=at_once)


def _leave(status: int, *, at_once: bool) -> NoReturn:
    """Exit; with `at_once`, without Python's finalization, if daemon threads of ours or of a library may still run.

    Before Python 3.14, finalization unwinds the stack of a daemon thread that returns from a library's code; if there
    is C++ code on the stack, that aborts the whole process. Such a thread may be reading ahead for an output that
    failed, or computing for a server that ends.
    """
    if at_once:
        # Ray's exit handler crashes while a thread waits for Ray; its processes end with this one anyway.
        if "ray" not in sys.modules:
            atexit._run_exitfuncs()
        _discard_unwritten()
        os._exit(status)
    sys.exit(status)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a long job in the same way as Ctrl+C."""


def interruptible(work: Callable[[], _Result], tick: Callable[[], None]) -> _Result:
    """Do work in a thread and return its result or raise its error; call `tick` several times a second meanwhile.

    The waiting thread reacts to Ctrl+C and SIGTERM at once, whatever a library is computing: it raises
    KeyboardInterrupt or Terminated, and the process should end without waiting for the work.
    """
    done: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((True, work()))
        except BaseException as error:  # raised again below
            done.put((False, error))

    with sigterm_interrupts():
        threading.Thread(target=run, name=f"{OUR_THREADS}score", daemon=True).start()
        while True:
            try:
                good, found = done.get(timeout=0.2)
                break
            except queue.Empty:
                tick()
    if not good:
        raise found
    return cast(_Result, found)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Make SIGTERM raise Terminated, for a job that can be resumed or has files to remove."""

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, terminate) if in_main else None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def say(message: str) -> None:
    """Write lines for people to standard error; failing to write them never stops the command."""
    with suppress(OSError, ValueError):
        click.echo(visible_lines(message), err=True)


def _invoke(command: click.Command) -> int:
    if "_REWARDRT_COMPLETE" in os.environ:  # shell completion is handled by click
        command.main(prog_name="rewardrt")
    try:
        # Not command.main(), which handles and prints some errors in its own way.
        with command.make_context("rewardrt", sys.argv[1:]) as context:
            command.invoke(context)
    except click.exceptions.Exit as end:
        return end.exit_code
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0


def _end(error: BaseException) -> int:
    """Report what ended the command; return its exit status."""
    if isinstance(error, BrokenPipeError):
        return 1
    if isinstance(error, KeyboardInterrupt | click.Abort):
        status = 143 if isinstance(error, Terminated) else 130
        if threading.current_thread() is threading.main_thread():  # a second Ctrl+C while Python exits
            signal.signal(signal.SIGINT, lambda number, frame: os._exit(status))
        say(": ".join(["error: interrupted", *filter(None, [str(error)])]))
        return status
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        say(error.format_message())
        return 2
    if (reason := _reason(error)) is not None:
        say(f"error: {visible(reason)}")
        return 2
    say(f"error: a fault of RewardRT itself ({type(error).__name__}), not of what it was given; {where_to_report()}")
    say(f"report: {visible(report(error))}")
    return 3


def _reason(error: BaseException) -> str | None:
    """Return the message for an error that is not a bug of RewardRT, or None."""
    if isinstance(error, RewardRTError):
        return str(error)
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx is not None else "rewardrt"
        return f"{error.format_message()} (see `{path} --help`)"
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, MemoryError):
        return "out of memory: this machine, or the limit of this process, has no more to give"
    if isinstance(error, ImportError) and not (error.name or "").startswith(PACKAGES):
        return f"a package that RewardRT needs does not import ({error}); install rewardrt anew in this environment"
    if isinstance(error, OSError) and error.errno is not None:
        if "temporary directory" in str(error.strerror):
            return "no writable temporary folder; set the variable TMPDIR to one"
        named = f"{error.filename}: " if isinstance(error.filename, str) else ""
        reason = _REASONS.get(error.errno, "the system refuses it")
        return f"{named}{reason} ({error.strerror})"
    return None


class _ClosedBytes(io.RawIOBase):
    def writable(self) -> bool:
        return True

    def write(self, data: object) -> NoReturn:
        raise OSError(errno.EBADF, "it was closed before the command began")


class _ClosedOutput(io.TextIOBase):
    """Replaces a standard output that was closed before the command began; writing to it raises OSError."""

    buffer = _ClosedBytes()

    def write(self, text: str) -> NoReturn:
        self.buffer.write(text)


def _prepare_streams() -> None:
    """Make the three standard streams usable, even if some were closed or the terminal cannot show some characters.

    If a standard stream is closed, the next file that the process opens gets its number, and then receives what a
    library writes to standard error. So /dev/null is opened for these numbers first.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = _ClosedOutput()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _discard_unwritten() -> None:
    """Discard output that cannot be written any more, which Python would complain about at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.close(null)
