"""Score rows and write them: output row n is input row n, whatever it contains.

Files are streamed. Two windows of rows are in memory at a time: one whose texts are scored in one call, and the next
one, which is read and tokenized meanwhile.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from rewardrt.data.lines import Line, to_line
from rewardrt.data.selection import EVERYTHING, Selection
from rewardrt.errors import RewardRTError, RowError
from rewardrt.scoring.scored import ScoredAnswers, ScoredPair, ScoredRow, error_row
from rewardrt.text.fields import unread

WINDOW_ROWS = 4096
FIRST_ROWS = 100  # size of the first window; if none of its rows can be scored, the file is given up
WINDOW_BYTES = 32 * 2**20  # size of a window's input lines; its last line may exceed it

_TOO_DEEP = "nested too deeply; expected a JSON object of fewer levels"

Ready = TypeVar("Ready")  # rows prepared for scoring


@dataclass
class Summary:
    """Counts of a job so far. Texts, tokens and pairs are counted for the scored rows.

    `rows` is the number of rows that were scored or failed; `read` is the number of input rows, which is larger with
    `--group-by`.
    """

    rows: int = 0
    read: int = 0
    scored: int = 0
    failed: int = 0
    left_out: int = 0  # scored, but not kept by the selection
    texts: int = 0
    tokens: int = 0
    truncated_texts: int = 0
    pairs: int = 0
    pairs_right: int = 0  # chosen above rejected
    ties: int = 0
    unread: dict[str, int] = field(default_factory=dict)  # text fields that are not read -> number of rows with them
    shapes: list[str] = field(default_factory=list)  # shapes of the scored rows: single, ranking, pair
    first_error: str = ""  # the first error, if it came before any row was scored

    def count(self, line: Line, result: ScoredRow | RewardRTError, *, kept: bool = True) -> None:
        """Count one row, scored or failed."""
        self.rows += 1
        self.read += max(1, len(line.members))
        if isinstance(result, RewardRTError):
            self.failed += 1
            if not self.scored:
                self.first_error = self.first_error or str(result)
            return
        assert isinstance(line.row, dict)
        for name in unread(line.row):
            self.unread[name] = self.unread.get(name, 0) + 1
        shape = {ScoredPair: "pair", ScoredAnswers: "ranking"}.get(type(result), "single")
        if shape not in self.shapes:
            self.shapes.append(shape)
        self.scored += 1
        self.left_out += not kept
        self.texts += len(result.answers)
        self.tokens += sum(answer.tokens for answer in result.answers)
        self.truncated_texts += sum(answer.truncated > 0 for answer in result.answers)
        if isinstance(result, ScoredPair):
            self.pairs += 1
            self.pairs_right += result.chosen_reward > result.rejected_reward
            self.ties += result.chosen_reward == result.rejected_reward

    def add(self, other: Summary) -> None:
        """Add the counts of other rows."""
        for name, value in vars(other).items():
            if isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)
        self.shapes += [shape for shape in other.shapes if shape not in self.shapes]
        for name, rows in other.unread.items():
            self.unread[name] = self.unread.get(name, 0) + rows


class Encoder(Protocol):
    """Turns scored rows into bytes, and counts them."""

    def __call__(
        self, lines: Sequence[Line], results: Sequence[ScoredRow | RewardRTError], summary: Summary
    ) -> list[bytes]:
        """Return the bytes to write for some rows, in their order."""


def score_file(
    prepare: Callable[[Iterable[object]], Ready],
    score: Callable[[Ready], list[ScoredRow | RewardRTError]],
    lines: Iterable[Line],
    write: Callable[[bytes], object],
    *,
    encode: Encoder | None = None,
    window: int = WINDOW_ROWS,
    progress: Callable[[Summary], None] | None = None,
    summary: Summary | None = None,
    give_up: bool = True,
) -> Summary:
    """Score every row and write each, scored or with `error`, in the order of the input; return the counts.

    `prepare` and `score` do what `RewardModel.answers.prepare` and `RewardModel.score_prepared` do: an error among the
    rows stays an error. The rows of a window are prepared together in a thread, one window ahead of scoring. `encode`
    makes the bytes, by default lines of JSON. `progress` is called after each window, when all of it is written. When a
    job is resumed, `summary` has the counts of the rows before.

    With `give_up`, raises RewardRTError before anything is written if none of the first FIRST_ROWS rows can be scored.
    """
    encode = encode or JsonEncoder()

    def prepared(some: list[Line]) -> tuple[list[Line], Ready]:
        return some, prepare(line.given for line in some)

    summary = summary or Summary()
    for some, ready in _ahead(prepared(some) for some in _windows(lines, window, summary.read > 0)):
        results = score(ready)
        finished = encode(some, results, summary)
        if give_up and FIRST_ROWS <= summary.rows == summary.failed:
            raise RewardRTError(
                f"none of the first {summary.rows} rows can be scored, and the rest was not tried; "
                f"the first: {summary.first_error}"
            )
        for data in finished:
            write(data)
        if progress is not None:
            progress(summary)
    return summary


class JsonEncoder:
    """Encodes each row as a line of JSON, with its scores or with `error`."""

    def __init__(
        self,
        labels: Sequence[str] = (),
        selection: Selection = EVERYTHING,
        finish: Callable[[Any], Any] = lambda value: value,
    ) -> None:
        """Take the names of the objectives, if they are to be written, and what is kept.

        `finish` converts a row's values to values that JSON has.
        """
        self._labels = tuple(labels)
        self._selection = selection
        self._finish = finish

    def __call__(
        self, lines: Sequence[Line], results: Sequence[ScoredRow | RewardRTError], summary: Summary
    ) -> list[bytes]:
        """Return one line for each row that is kept."""
        return [
            written
            for line, result in zip(lines, results, strict=True)
            for written in self._lines(line, result, summary)
        ]

    def _lines(self, line: Line, result: ScoredRow | RewardRTError, summary: Summary) -> list[bytes]:
        try:
            settled = self._selection.settle(line, result, self._labels)
            written = [to_line(self._finish(self._selection.fields(kept))) for kept in settled.kept]
        except RecursionError:  # the thread that parsed it had more stack left
            error = RowError(f"line {line.number}: {_TOO_DEEP}")
            summary.count(line, error)
            return [to_line(error_row({}, str(error)))]
        summary.count(line, settled.outcome, kept=bool(settled.kept))
        return written


_Some = TypeVar("_Some")


def _ahead(source: Iterator[_Some]) -> Iterator[_Some]:
    """Yield an iterator's items; while one item is being processed, a thread fetches the next."""
    answer = _ask(source)
    while True:
        found = answer.get()
        if isinstance(found, BaseException):
            if isinstance(found, StopIteration):
                return
            raise found
        answer = _ask(source)
        yield found


def _ask(source: Iterator[_Some]) -> queue.SimpleQueue[_Some | BaseException]:
    answer: queue.SimpleQueue[_Some | BaseException] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answer.put(next(source))
        except BaseException as error:  # raised again in the thread that waits for the item
            answer.put(error)

    # A daemon thread: waiting for a line of standard input must not delay the end of an interrupted process.
    threading.Thread(target=ask, name="rewardrt-reader", daemon=True).start()
    return answer


def _windows(lines: Iterable[Line], rows: int, goes_on: bool) -> Iterator[list[Line]]:
    """Yield the lines in lists of at most `rows`, and end a list early once it exceeds WINDOW_BYTES.

    The first list has at most FIRST_ROWS, unless the job `goes_on` after earlier rows. Lines read before an error are
    yielded before it is raised.
    """
    some: list[Line] = []
    size, most = 0, rows if goes_on else min(rows, FIRST_ROWS)
    try:
        for line in lines:
            some.append(line)
            size += line.bytes
            if line.whole and (len(some) >= most or size >= WINDOW_BYTES):
                yield some
                some, size, most = [], 0, rows
    except RewardRTError:
        while some and not some[-1].whole:
            some.pop()
        if some:
            yield some
        raise
    if some:
        yield some
