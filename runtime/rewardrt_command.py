"""Entry point of the `rewardrt` command: handle Ctrl+C even while packages are being imported.

The imports take a second. Nothing of `rewardrt` may be imported before the handler is set, because that would import
those packages.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType
from typing import NoReturn


def main() -> None:
    """Import the command and run it; `rewardrt.cli.toplevel` decides how it ends."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is ignored in a background job
        signal.signal(signal.SIGINT, _interrupted)
    from rewardrt.cli.app import main as run

    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


def _interrupted(number: int, frame: FrameType | None) -> NoReturn:
    """End at once: nothing has begun yet, and a module that is being imported could catch an exception."""
    with suppress(OSError):
        os.write(2, b"error: interrupted\n")
    os._exit(130)
