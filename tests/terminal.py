"""Run a program as at a terminal of so many columns, and see what stands on its screen at the end."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

COMMAND = [sys.executable, "-c", "from rewardrt_command import main; main()"]


@dataclass(frozen=True)
class Shown:
    """How a program ended, all that it wrote, and the lines that are left on the screen."""

    returncode: int
    written: str
    lines: list[str]


def at_terminal(
    command: Sequence[str],
    columns: int = 80,
    *,
    interrupt_after: str | None = None,
    environment: Mapping[str, str] = {},
) -> Shown:
    """Run a command whose three streams are a terminal; press Ctrl+C once it has written `interrupt_after`."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env=kept | {"PYTHONUTF8": "1", "TERM": "xterm"} | environment,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0) and None,  # noqa: PLW1509 - Ctrl+C comes from it
    )  # fmt: skip
    os.close(theirs)
    data, end = b"", time.monotonic() + 120
    with process:
        while time.monotonic() < end:
            if interrupt_after is not None and interrupt_after.encode() in data:
                os.write(ours, b"\x03")
                interrupt_after = None
            if not select.select([ours], [], [], 0.1)[0]:
                continue
            try:
                data += (part := os.read(ours, 65_536))
            except OSError:  # nobody has the terminal any more
                break
            if not part:
                break
        else:
            os.killpg(process.pid, signal.SIGKILL)
    os.close(ours)
    text = data.decode()
    return Shown(process.returncode, text, screen(text))


def screen(text: str) -> list[str]:
    """Return the lines of a terminal that is wide enough: a carriage return goes back, and what follows overwrites."""
    lines = []
    for line in text.split("\n"):
        shown: list[str] = []
        place = 0
        for character in line:
            if character == "\r":
                place = 0
                continue
            shown[place : place + 1] = [character]
            place += 1
        lines.append("".join(shown).rstrip())
    while lines and not lines[-1]:
        lines.pop()
    return lines
