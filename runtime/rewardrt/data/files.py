"""JSONL in and out: line n out is line n in, whatever line n holds.

Files are streamed: what is held at a time is one window of rows, whose texts are scored in one call, and the next one,
which is read and tokenized meanwhile.
"""

from __future__ import annotations

import codecs
import errno
import json
import queue
import secrets
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

from rewardrt.data.formats import LINE_BYTES
from rewardrt.data.strict_json import read_json
from rewardrt.errors import RewardRTError, RowError
from rewardrt.scoring.scored import ScoredPair, ScoredRow, error_row, fill_row
from rewardrt.text.fields import unread

WINDOW_ROWS = 4096
FIRST_ROWS = 100  # the first window, after which a file of which no row can be scored is given up
WINDOW_BYTES = 32 * 2**20  # of input lines; the last line of a window may go over

_TOO_DEEP = "nested too deeply; expected a JSON object of fewer levels"

Ready = TypeVar("Ready")  # rows that were made ready to be scored


@dataclass(frozen=True)
class Line:
    """One input line: its number from 1, its size in bytes, and its object or what is wrong with it."""

    number: int
    bytes: int
    row: dict[str, Any] | RowError


@dataclass
class Summary:
    """What was done with a file so far. Texts, tokens and pairs are those of the scored rows."""

    rows: int = 0
    scored: int = 0
    failed: int = 0
    texts: int = 0
    tokens: int = 0
    truncated_texts: int = 0
    pairs: int = 0
    pairs_right: int = 0  # chosen above rejected
    ties: int = 0
    unread: dict[str, int] = field(default_factory=dict)  # fields of text that nothing read: in how many rows

    def add(self, row: dict[str, Any], scored: ScoredRow) -> None:
        """Count one scored row."""
        for name in unread(row):
            self.unread[name] = self.unread.get(name, 0) + 1
        self.scored += 1
        self.texts += len(scored.answers)
        self.tokens += sum(answer.tokens for answer in scored.answers)
        self.truncated_texts += sum(answer.truncated > 0 for answer in scored.answers)
        if isinstance(scored, ScoredPair):
            self.pairs += 1
            self.pairs_right += scored.chosen_reward > scored.rejected_reward
            self.ties += scored.chosen_reward == scored.rejected_reward


def read_lines(lines: Iterable[bytes]) -> Iterator[Line]:
    """Yield one Line for each line of a JSONL stream, blank and damaged ones included."""
    for number, data in enumerate(lines, 1):
        row: dict[str, Any] | RowError
        try:
            if len(data) > LINE_BYTES:
                raise RowError(f"longer than {LINE_BYTES} bytes; expected one JSON object")
            row = _read_row(data.removeprefix(codecs.BOM_UTF8) if number == 1 else data)
        except RowError as error:
            row = RowError(f"line {number}: {error}")
        yield Line(number, len(data), row)


def score_file(
    prepare: Callable[[Iterable[object]], Ready],
    score: Callable[[Ready], list[ScoredRow | RewardRTError]],
    lines: Iterable[Line],
    write: Callable[[bytes], object],
    *,
    labels: Sequence[str] = (),
    window: int = WINDOW_ROWS,
    progress: Callable[[Summary], None] | None = None,
) -> Summary:
    """Score every row and write each, scored or with `error`, in the order of the input.

    `prepare` and `score` are `RewardModel.answers.prepare` and `RewardModel.score_prepared`, or do what they do: an
    error among the rows stays an error. The rows of a window are prepared together, in a thread, one window ahead of
    those that are scored. With `labels` rows come out with their objectives. `progress` is called after each window.

    Raises RewardRTError, before anything is written, when none of the first FIRST_ROWS rows can be scored.
    """

    def prepared(some: list[Line]) -> tuple[list[Line], Ready]:
        return some, prepare(line.row for line in some)

    summary, first_error = Summary(), ""
    for some, ready in _ahead(prepared(some) for some in _windows(lines, window)):
        results = score(ready)
        finished = [_finish(line, result, labels, summary) for line, result in zip(some, results, strict=True)]
        if summary.rows == summary.failed:
            first_error = first_error or json.loads(finished[0])["error"]
        if FIRST_ROWS <= summary.rows == summary.failed:
            raise RewardRTError(
                f"none of the first {summary.rows} rows can be scored, and the rest was not tried; "
                f"the first: {first_error}"
            )
        for data in finished:
            write(data)
        if progress is not None:
            progress(summary)
    return summary


class Output:
    """Bytes on their way to a file or to standard output; what stops them is a RewardRTError that names the place."""

    def __init__(self, name: str | Path, file: BinaryIO) -> None:
        self._name = name
        self._file = file

    def write(self, data: bytes) -> None:
        """Write all of the bytes, now or with the next flush."""
        with self._named():
            self._file.write(data)

    def flush(self) -> None:
        """Have everything written that was given so far."""
        with self._named():
            self._file.flush()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # the reader of our output has had enough
            raise
        except (OSError, ValueError) as error:  # ValueError: it was closed meanwhile
            _refuse(self._name, error)


@contextmanager
def open_output(path: str | Path | None) -> Iterator[Output]:
    """Open the output for writing bytes: a file, or standard output for None and "-".

    A file is written under another name in its folder, and takes its own name when the block ends well. What is there
    but is not a plain file, such as /dev/null, is written to directly.
    """
    if path is None or str(path) == "-":
        sys.stdout.flush()  # what was printed before comes before
        output = Output("standard output", sys.stdout.buffer)
        yield output
        output.flush()
        return
    try:
        target = Path(path).resolve()
        in_place = target.exists() and not target.is_file()
        name = target if in_place else target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        file = name.open("wb" if in_place else "xb")
    except (OSError, ValueError) as error:
        _refuse(path, error)
    try:
        try:
            output = Output(path, file)
            yield output
            output.flush()
        finally:
            with suppress(OSError):  # of a full disk, which the block was told of, or is told by the line above
                file.close()
        if not in_place:
            try:
                if target.exists():
                    name.chmod(target.stat().st_mode & 0o777)  # what was private stays private
                name.replace(target)
            except OSError as error:
                _refuse(path, error)
    except BaseException:
        if not in_place:
            with suppress(OSError):
                name.unlink()
        raise


def _read_row(data: bytes) -> dict[str, Any]:
    """Return the object on one line, or raise RowError."""
    if not data.strip():
        raise RowError("blank line; expected a JSON object")
    row = read_json(data)
    if not isinstance(row, dict):
        raise RowError(f"expected a JSON object, found {type(row).__name__}")
    return row


_Some = TypeVar("_Some")


def _ahead(source: Iterator[_Some]) -> Iterator[_Some]:
    """Yield what an iterator gives; while one item is worked on, a thread asks for the next one."""
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
        except BaseException as error:  # it is raised where the item is waited for
            answer.put(error)

    # A daemon: one that waits for a line of standard input must not hold up the end of an interrupted process.
    threading.Thread(target=ask, name="rewardrt-reader", daemon=True).start()
    return answer


def _windows(lines: Iterable[Line], rows: int) -> Iterator[list[Line]]:
    """Yield the lines in lists of at most `rows`, first FIRST_ROWS, cut earlier once a list is over WINDOW_BYTES."""
    some: list[Line] = []
    size, most = 0, min(rows, FIRST_ROWS)
    for line in lines:
        some.append(line)
        size += line.bytes
        if len(some) >= most or size >= WINDOW_BYTES:
            yield some
            some, size, most = [], 0, rows
    if some:
        yield some


def _finish(line: Line, result: ScoredRow | RewardRTError, labels: Sequence[str], summary: Summary) -> bytes:
    """Return the line to write, and count it."""
    summary.rows += 1
    row = {} if isinstance(line.row, RowError) else line.row
    try:
        if not isinstance(result, RewardRTError):
            written = to_line(fill_row(row, result, labels))
            summary.add(row, result)
            return written
        written = to_line(error_row(row, str(result)))
    except RecursionError:  # the thread that read it had more room
        written = to_line(error_row({}, f"line {line.number}: {_TOO_DEEP}"))
    summary.failed += 1
    return written


def to_line(row: dict[str, Any]) -> bytes:
    """Return one line of JSON, in UTF-8."""
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate in a field that is not scored: only an escape can carry it
        return json.dumps(row, allow_nan=False).encode() + b"\n"


def _refuse(path: str | Path, error: Exception) -> NoReturn:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = "make room, or write to another disk"
    elif str(path) == "standard output":
        remedy = "send it to a file or a program that reads it"
    else:
        remedy = "name a file in a writable folder"
    raise RewardRTError(f"{path}: cannot be written ({reason}); {remedy}") from error
