"""The outermost layer of the command: its standard streams, and the one rule by which it ends.

| what ended it | on standard error | exit status |
| --- | --- | --- |
| nothing | | that of the command: 0, or 1 |
| an error of ours, or of the command line | one line | 2 |
| the machine: a full disk, no permission, a closed stream, out of memory, a broken installation | one line | 2 |
| the reader of the output has gone, as `head` does | nothing | 1 |
| Ctrl+C; SIGTERM where a job can be gone on with, or leaves something to be removed | one line | 130; 143 |
| anything else: a fault of RewardRT | one line, and one to report it with | 3 |

There is no traceback. The line to report holds versions, the error and the places in the code, and none of the texts
that were scored, nor paths of the machine.
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

OUR_THREADS = "rewardrt-"  # what the names of all threads begin with that RewardRT starts

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
    except BaseException as error:  # nothing may get past this rule, a panic of a library's own base class neither
        # A library that was being imported may have made an error of its own of Ctrl+C.
        made_of_it = interrupted.is_set() and not isinstance(error, KeyboardInterrupt | BrokenPipeError)
        status = _end(KeyboardInterrupt() if made_of_it else error)
    if in_main and signal.getsignal(signal.SIGINT) is interrupt:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _discard_unwritten()
    ours = {each.name for each in set(threading.enumerate()) - before if each.daemon}
    # pyarrow's own threads abort the process too, if an error stopped it while it read.
    at_once = any(name.startswith(OUR_THREADS) for name in ours) or ("pyarrow" in sys.modules and not had_pyarrow)
    _leave(status, at_once=at_once)


def _leave(status: int, *, at_once: bool) -> NoReturn:
    """Exit; `at_once` without Python's own end of daemon threads, while some of ours or of a library's may be there.

    Until Python 3.14 it unwinds the stack of a thread that comes back from a library's code, and C++ code there aborts
    the whole process instead. Such a thread reads ahead of an output that failed, or computes for a server that ends.
    """
    if at_once:
        # Ray's own end crashes beside a thread that waits for Ray; the processes that it started end with this one.
        if "ray" not in sys.modules:
            atexit._run_exitfuncs()
        _discard_unwritten()
        os._exit(status)
    sys.exit(status)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a long job as Ctrl+C does."""


def interruptible(work: Callable[[], _Result], tick: Callable[[], None]) -> _Result:
    """Do some work in a thread, and return or raise what it does; call `tick` meanwhile, several times a second.

    The thread that waits answers Ctrl+C and SIGTERM at once, whatever a library computes: it raises KeyboardInterrupt
    or Terminated, and the process is to end without waiting for the work.
    """
    done: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((True, work()))
        except BaseException as error:  # raised below, where it is waited for
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
    """Let SIGTERM raise Terminated in a job that leaves something to be gone on with, or to be removed."""

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
    """Write lines to standard error, for people; scoring does not depend on whether anybody can read them."""
    with suppress(OSError, ValueError):
        click.echo(visible_lines(message), err=True)


def _invoke(command: click.Command) -> int:
    if "_REWARDRT_COMPLETE" in os.environ:  # a shell asks for completions: click's own business
        command.main(prog_name="rewardrt")
    try:
        # Not command.main(), which has a rule of its own for some errors, and prints where this one does.
        with command.make_context("rewardrt", sys.argv[1:]) as context:
            command.invoke(context)
    except click.exceptions.Exit as end:
        return end.exit_code
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0


def _end(error: BaseException) -> int:
    """Say what ended the command, and return its exit status."""
    if isinstance(error, BrokenPipeError):
        return 1
    if isinstance(error, KeyboardInterrupt | click.Abort):
        status = 143 if isinstance(error, Terminated) else 130
        if threading.current_thread() is threading.main_thread():  # another Ctrl+C: it is said, and Python still ends
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
    """Return what to say of an error that is no fault of RewardRT, or None."""
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
    """Stands for a standard output that was closed before the command began: whoever writes to it is told."""

    buffer = _ClosedBytes()

    def write(self, text: str) -> NoReturn:
        self.buffer.write(text)


def _prepare_streams() -> None:
    """Make the three standard streams usable, whatever the terminal can show and whichever were closed.

    The next files that a process opens take the numbers of its closed streams, and then get what a library writes to
    standard error: /dev/null takes them first.
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
    """Let go of what cannot be written any more, about which Python would complain when it ends."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.close(null)
