"""Progress of a long job on standard error: one changing line on a terminal, or a line every 30 seconds in a log.

The changing line is drawn by tqdm, which `tokenizers` depends on and which supports all kinds of terminals.
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
    """Progress of scoring: rows, share, speed, time left, errors, and the tokens saved by prefix reuse."""

    def __init__(
        self, share: Callable[[float], float], statistics: Callable[[], Statistics], before: Summary | None = None
    ) -> None:
        """Take a function that returns the share, 0..1, for a number of rows, and one that returns the token counts.

        `before` counts the rows that an earlier run has scored.
        """
        self._share, self._statistics = share, statistics
        self._first = self._last = statistics()
        self._start = self._said = time.monotonic()
        self.summary = before or Summary()
        self._rows_before = self.summary.read
        self._bar = _changing_line("{percentage:3.0f}% |{bar:20}| {desc}")

    def __call__(self, summary: Summary) -> None:
        """Take the counts so far."""
        self.summary = summary
        self._last = self._statistics()

    def tick(self) -> None:
        """Show the progress if it is time to."""
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
        """Hide the bar while something else is written to the terminal."""
        if self._bar is None:
            yield
            return
        with self._bar.external_write_mode(file=sys.stderr):
            yield

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def finish(self) -> float:
        """Remove the bar; return the seconds since the start."""
        if self._bar is not None:
            with suppress(OSError, ValueError):
                _wipe(self._bar)
                self._bar.close()
            self._bar = None
        return self.seconds

    def _now(self) -> tuple[float, str]:
        """Return the share of the rows that is done, and the other figures in words.

        Rows are counted when their window is done; the part of the next window that is done is estimated from tokens.
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
    """Shows the steps of a long job inside a `with` block; it is called with each `Step`.

    On a terminal each step has one line with its current part and time; when the next step begins, the line stays, with
    the step's total time. In a log a step has one line when it begins, with the time since the start, and another every
    LOG_SECONDS.
    """

    def __init__(self, *, lasting: bool = True) -> None:
        """Start measuring time.

        Without `lasting`, a step's line is removed when the step ends, and a log only shows steps that take long.
        """
        self._lasting = lasting
        self._start = self._began = self._said = time.monotonic()
        self._step: Step | None = None
        self._lock, self._ended = threading.RLock(), threading.Event()
        self._line = _changing_line("{desc}")
        # A separate thread, because the job may spend minutes inside a library.
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
        """Seconds since the start."""
        return time.monotonic() - self._start

    def __call__(self, step: Step) -> None:
        """Take the beginning of a step, a part of it, or a note."""
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
        """Write a lasting line above the changing one."""
        if self._line is not None:
            with suppress(OSError, ValueError):
                _wipe(self._line)
        toplevel.say(words)


def _changing_line(layout: str) -> Any:
    """Return a tqdm line with this layout if standard error is a terminal, else None."""
    if not sys.stderr.isatty():
        return None
    with suppress(ImportError):
        from tqdm import tqdm

        return tqdm(
            total=100.0, bar_format=layout, file=sys.stderr, leave=False, mininterval=BAR_SECONDS, dynamic_ncols=True
        )
    return None


def _wipe(line: Any) -> None:
    """Clear the line, including what the terminal itself has written to it, such as `^C`."""
    line.display(" " * (width_of(sys.stderr) - 1))
    line.clear()


def duration(seconds: float) -> str:
    """Return a time in words: 3.1 s, 75 s, 2 min 5 s, 1 h 2 min."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    if whole >= 100:
        return f"{whole // 60} min {whole % 60} s"
    return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
