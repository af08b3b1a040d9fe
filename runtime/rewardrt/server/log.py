"""The log: lines that clients cannot forge, and that scoring never waits for.

A thread writes them to standard error. If it cannot write, or not fast enough, lines are lost; their number is logged
when writing works again.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from dataclasses import dataclass
from time import gmtime, monotonic, sleep, strftime

WAITING_LINES = 10_000
LINE_CHARACTERS = 20_000
GATHER_SECONDS = 0.02  # lines logged within this time are written together


@dataclass
class Record:
    """One request, for its line in the log. `path` is as sent."""

    method: str
    path: str
    client: str
    protocol: str = "-"
    model: str = "-"
    status: int = 0
    texts: int = 0
    tokens: int = 0
    truncated: int = 0
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0
    seconds: float = 0.0
    error: str = ""

    def line(self) -> str:
        """Return the log line. It contains none of the scored texts; the error may name a field."""
        error = f" error={self.error[:300]!r}" if self.error else ""
        return (
            f"{strftime('%Y-%m-%dT%H:%M:%SZ', gmtime())} {quoted(self.method)} {quoted(self.path)} {self.status} "
            f"protocol={self.protocol} model={quoted(self.model)} texts={self.texts} tokens={self.tokens} "
            f"truncated={self.truncated} queue_ms={self.queue_seconds * 1e3:.1f} "
            f"compute_ms={self.compute_seconds * 1e3:.1f} total_ms={self.seconds * 1e3:.1f} "
            f"client={quoted(self.client)}{error}"
        )


def quoted(value: str) -> str:
    """Return one word of a log line; a value with white space, quotes or control characters is written as by repr()."""
    word = value[:200]
    if word.isascii() and word.isprintable() and not set(word) & set(" \"'\\="):
        return word or "-"
    return repr(word)


class Log:
    """Writes lines to a file descriptor in a thread.

    `write` may be called from any thread; it never waits or raises.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self._descriptor = descriptor
        self._lines: deque[str] = deque()
        self._lost = 0
        self._some = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._busy = False

    def write(self, line: str) -> None:
        """Add one line to the queue."""
        if len(self._lines) >= WAITING_LINES:
            self._lost += 1
            return
        self._lines.append(line[:LINE_CHARACTERS])
        if not self._some.is_set():
            self._some.set()
            if self._thread is None:
                self._start()

    def flush(self, seconds: float = 1.0) -> None:
        """Wait until the queued lines are written, for at most `seconds`."""
        end = monotonic() + seconds
        while (self._lines or self._busy) and self._thread is not None and monotonic() < end:
            sleep(0.005)

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="rewardrt-log", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            self._some.wait()
            sleep(GATHER_SECONDS)
            self._some.clear()
            self._busy = True
            lines = [self._lines.popleft() for _ in range(len(self._lines))]
            lost, self._lost = self._lost, 0
            if lost:
                lines.insert(0, f"warning: {lost} lines of the log are lost; it could not be written as fast")
            if lines and not self._put("".join(f"{line}\n" for line in lines)):
                self._lost += len(lines) - (lost > 0) + lost
            self._busy = False

    def _put(self, text: str) -> bool:
        data = text.encode("utf-8", "backslashreplace")
        try:
            descriptor = self._descriptor if self._descriptor is not None else sys.stderr.fileno()
            while data:
                data = data[os.write(descriptor, data) :]
        except (OSError, ValueError, AttributeError):  # a full disk, a closed pipe, no standard error at all
            return False
        return True


LOG = Log()


def log(line: str) -> None:
    """Queue one line for standard error."""
    LOG.write(line)
