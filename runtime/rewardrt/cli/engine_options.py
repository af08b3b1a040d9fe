"""The option for the folder of TensorRT engines, and the messages while an engine is built."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import click

from rewardrt.cli import toplevel
from rewardrt.display import visible
from rewardrt.machine.engine_cache import VARIABLE


def _name_cache(context: click.Context, option: click.Parameter, folder: str | None) -> None:
    """Set the folder for this process and its child processes."""
    if folder is not None:
        os.environ[VARIABLE] = folder


engine_cache_option = click.option(
    "--engine-cache",
    metavar="DIR",
    callback=_name_cache,
    expose_value=False,
    help=f"Where TensorRT's engines are kept.  [default: ${VARIABLE}, or ~/.cache/rewardrt]",
)


@contextmanager
def engine_log() -> Iterator[None]:
    """Show the progress of building an engine on standard error."""

    class Shown(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            toplevel.say(visible(record.getMessage()))

    log, handler = logging.getLogger("rewardrt.engine"), Shown()
    level, propagates = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagates
