"""Isolate a failing text: repeat failed work on halves until the text at fault is alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

_Given = TypeVar("_Given")
_Made = TypeVar("_Made")


def apart(
    work: Callable[[Sequence[_Given]], Sequence[_Made]],
    things: Sequence[_Given],
    failed: Callable[[BaseException], _Made],
) -> list[_Made]:
    """Do work on all things together; if that fails, on halves, down to the single thing that makes it fail.

    All exceptions are caught, because a panic in a library's Rust code is a BaseException.
    """
    try:
        return list(work(things)) if things else []
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if len(things) == 1:
            return [failed(error)]
    half = len(things) // 2
    return apart(work, things[:half], failed) + apart(work, things[half:], failed)


def place(error: BaseException) -> str:
    """Return the file and line where an error was raised, for the log."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return "?"
    return f"{traceback.tb_frame.f_code.co_filename.rpartition('/')[2]}:{traceback.tb_lineno}"
