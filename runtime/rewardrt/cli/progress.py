"""How far a long job is: one line that changes on a terminal, a line every half minute in a log; on standard error.

That line is tqdm's, which `tokenizers` brings with it: it knows terminals of every kind.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

from rewardrt.cli import toplevel
from rewardrt.cli.output import columns, one_line, width_of
from rewardrt.data.files import Summary
from rewardrt.scoring.prefix import Statistics
from rewardrt.steps import Step

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
        self._bar = _changing_line("{percentage:3.0f}% |{bar:20}| {desc}")

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

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the bar away while something else is written to the terminal."""
        if self._bar is None:
            yield
            return
        with self._bar.external_write_mode(file=sys.stderr):
            yield

    @property
    def seconds(self) -> float:
        """The seconds since the start."""
        return time.monotonic() - self._start

    def finish(self) -> float:
        """Take the bar away, and return the seconds since the start."""
        if self._bar is not None:
            with suppress(OSError, ValueError):
                _wipe(self._bar)
                self._bar.close()
            self._bar = None
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
            words.insert(0, f"{duration(self.seconds * (1 - share) / (share - before))} left")
        if self.summary.failed:
            words.append(f"{self.summary.failed:,} errors")
        if given > computed:
            words.append(f"{1 - computed / given:.0%} of tokens reused")
        return share, ", ".join(words)


class Steps:
    """The steps of a long job, in a `with` block; called with each `Step`.

    On a terminal a step has one line, with its part and its time, which stays with its whole time when the next begins.
    In a log it has one line when it begins, with the time since the start, and further ones every LOG_SECONDS.
    """

    def __init__(self, *, lasting: bool = True) -> None:
        """Begin to count the time; without `lasting`, steps are shown only while they last, and in a log if long."""
        self._lasting = lasting
        self._start = self._began = self._said = time.monotonic()
        self._step: Step | None = None
        self._lock, self._ended = threading.RLock(), threading.Event()
        self._line = _changing_line("{desc}")
        # A thread of its own: the job may be in a library for minutes.
        self._thread = threading.Thread(target=self._tick, name=f"{toplevel.OUR_THREADS}steps", daemon=True)

    def __enter__(self) -> Steps:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        with self._lock:
            self._end_step(stopped=error is not None)
            if self._line is not None:
                with suppress(OSError, ValueError):
                    _wipe(self._line)
                    self._line.close()

    @property
    def seconds(self) -> float:
        """The seconds since the start."""
        return time.monotonic() - self._start

    def __call__(self, step: Step) -> None:
        """Take a step that begins, a part of it, or a note."""
        with self._lock:
            if step.note:
                self._say(step.name)
                return
            if self._step is None or step.name != self._step.name:
                self._end_step()
                self._began = self._said = time.monotonic()
                if self._line is None and self._lasting:
                    toplevel.say(f"[{duration(self.seconds)}] {step.name}")
            self._step = step

    def _tick(self) -> None:
        while not self._ended.wait(BAR_SECONDS):
            with self._lock:
                if self._step is None:
                    continue
                now = time.monotonic()
                if self._line is not None:
                    self._show(self._step, now - self._began)
                elif now - self._said >= LOG_SECONDS:
                    self._said = now
                    toplevel.say(f"[{duration(self.seconds)}] {self._step}, for {duration(now - self._began)}")

    def _show(self, step: Step, seconds: float) -> None:
        end = ": " + ", ".join(filter(None, (step.part, duration(seconds))))
        words = one_line(step.name, width_of(sys.stderr) - columns(end) - 1) + end
        with suppress(OSError, ValueError):
            self._line.set_description_str(words)

    def _end_step(self, *, stopped: bool = False) -> None:
        if self._step is not None and self._line is not None and self._lasting:
            seconds = duration(time.monotonic() - self._began)
            self._say(f"{self._step}, stopped after {seconds}" if stopped else f"{self._step.name}: {seconds}")
        self._step = None

    def _say(self, words: str) -> None:
        """Write a line that stays, above the one that changes."""
        if self._line is not None:
            with suppress(OSError, ValueError):
                _wipe(self._line)
        toplevel.say(words)


def _changing_line(layout: str) -> Any:
    """Return tqdm's line in a layout of its own where standard error is a terminal, else None."""
    if not sys.stderr.isatty():
        return None
    with suppress(ImportError):
        from tqdm import tqdm

        return tqdm(
            total=100.0, bar_format=layout, file=sys.stderr, leave=False, mininterval=BAR_SECONDS, dynamic_ncols=True
        )
    return None


def _wipe(line: Any) -> None:
    """Take the line away, and with it what the terminal has written at its end: `^C`."""
    line.display(" " * (width_of(sys.stderr) - 1))
    line.clear()


def duration(seconds: float) -> str:
    """Return a time as people say it: 3.1 s, 75 s, 2 min 5 s, 1 h 2 min."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    if whole >= 100:
        return f"{whole // 60} min {whole % 60} s"
    return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
