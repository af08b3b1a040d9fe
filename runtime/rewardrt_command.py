"""Where the `rewardrt` command begins. Ctrl+C is answered in words before the packages are there, whose import takes
a second: importing anything of `rewardrt` would import them.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType
from typing import NoReturn


def main() -> None:
    """Import the command and run it; how it ends, `rewardrt.cli.toplevel` says."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, as of a job with `&`
        signal.signal(signal.SIGINT, _interrupted)
    from rewardrt.cli.app import main as run

    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


def _interrupted(number: int, frame: FrameType | None) -> NoReturn:
    """End at once: nothing has begun yet, and an exception could be caught by what is imported."""
    with suppress(OSError):
        os.write(2, b"error: interrupted\n")
    os._exit(130)
