"""How far a long job is: a bar on a terminal, a line every half minute in a log; always on standard error.

The bar is tqdm's, which `tokenizers` brings with it: it knows terminals of every kind, and nothing has to be installed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from rewardrt.cli import toplevel
from rewardrt.data.files import Summary
from rewardrt.scoring.prefix import Statistics

LOG_SECONDS = 30.0
BAR_SECONDS = 0.2


class Progress:
    """Rows, share, speed, time left, errors and what prefixes saved, of the rows that a `Summary` counts."""

    def __init__(self, share: Callable[[], float], statistics: Callable[[], Statistics], before: int = 0) -> None:
        """Take what tells the share that was read, from 0 to 1, and the tokens; `before` rows were scored earlier."""
        self._share, self._statistics = share, statistics
        self._first = statistics()
        self._start = self._said = time.monotonic()
        self._from: float | None = 0.0 if not before else None  # the share that was read before
        self.summary = Summary(rows=before, read=before)
        self._bar: Any = None
        if sys.stderr.isatty():
            with suppress(ImportError):
                from tqdm import tqdm

                layout = "{percentage:3.0f}% |{bar}| {desc} [{elapsed}<{remaining}]"
                self._bar = tqdm(total=100.0, bar_format=layout, file=sys.stderr, leave=False, mininterval=BAR_SECONDS)

    def __call__(self, summary: Summary) -> None:
        """Take what was done so far."""
        self.summary = summary
        if self._from is None:
            self._from = self._share()

    def tick(self) -> None:
        """Show it, if it is time to."""
        if self._bar is not None:
            with suppress(OSError, ValueError):  # scoring goes on without a terminal
                self._bar.set_description_str(self._words(), refresh=False)
                self._bar.update(100.0 * self._share() - self._bar.n)
                self._bar.refresh()
        elif time.monotonic() - self._said >= LOG_SECONDS:
            self._said = time.monotonic()
            share = self._share()
            done = share - self._from if self._from is not None else 0.0
            left = f", {_duration(self.seconds * (1 - share) / done)} left" if done > 0.01 else ""
            toplevel.say(f"{share:.0%}, {self._words()}{left}")

    @property
    def seconds(self) -> float:
        """The seconds since the start."""
        return time.monotonic() - self._start

    def finish(self) -> float:
        """Take the bar away, and return the seconds since the start."""
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.close()
        return self.seconds

    def _words(self) -> str:
        now = self._statistics()
        given, computed = now.given - self._first.given, now.computed - self._first.computed
        words = [f"{self.summary.read:,} rows", f"{given / max(self.seconds, 1e-9):,.0f} tokens/s"]
        if self.summary.failed:
            words.append(f"{self.summary.failed:,} errors")
        if given > computed:
            words.append(f"{1 - computed / given:.0%} of tokens reused")
        return ", ".join(words)


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.0f} min" if minutes >= 1 else f"{seconds:.0f} s"
