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

    def __init__(
        self, share: Callable[[float], float], statistics: Callable[[], Statistics], before: Summary | None = None
    ) -> None:
        """Take what tells the share, from 0 to 1, that so many rows are, and the tokens so far.

        `before` is of the rows that were scored in an earlier run.
        """
        self._share, self._statistics = share, statistics
        self._first = self._last = statistics()
        self._start = self._said = time.monotonic()
        self.summary = before or Summary()
        self._rows_before = self.summary.read
        self._bar: Any = None
        if sys.stderr.isatty():
            with suppress(ImportError):
                from tqdm import tqdm

                layout = "{percentage:3.0f}% |{bar:20}| {desc}"
                self._bar = tqdm(total=100.0, bar_format=layout, file=sys.stderr, leave=False, mininterval=BAR_SECONDS)

    def __call__(self, summary: Summary) -> None:
        """Take what was done so far."""
        self.summary = summary
        self._last = self._statistics()

    def tick(self) -> None:
        """Show it, if it is time to."""
        if self._bar is not None:
            with suppress(OSError, ValueError):  # scoring goes on without a terminal
                share, words = self._now()
                self._bar.set_description_str(words, refresh=False)
                self._bar.n = min(100.0, 100.0 * share)
                self._bar.refresh()
        elif time.monotonic() - self._said >= LOG_SECONDS:
            self._said = time.monotonic()
            share, words = self._now()
            toplevel.say(f"{share:.0%}, {words}")

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

    def _now(self) -> tuple[float, str]:
        """Return the share of the rows that is done, and all else in words.

        Rows are counted when a window of them is done; how much of the next one is, the tokens tell.
        """
        now = self._statistics()
        given, computed = now.given - self._first.given, now.computed - self._first.computed
        rows = float(self.summary.read)
        if self.summary.tokens:
            rows += (now.given - self._last.given) * self.summary.read / self.summary.tokens
        share, before = self._share(rows), self._share(self._rows_before)
        words = [f"{self.summary.read:,} rows", f"{given / max(self.seconds, 1e-9):,.0f} tokens/s"]
        if share - before > 0.001:
            words.insert(0, f"{_duration(self.seconds * (1 - share) / (share - before))} left")
        if self.summary.failed:
            words.append(f"{self.summary.failed:,} errors")
        if given > computed:
            words.append(f"{1 - computed / given:.0%} of tokens reused")
        return share, ", ".join(words)


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.0f} min" if minutes >= 1 else f"{seconds:.0f} s"
