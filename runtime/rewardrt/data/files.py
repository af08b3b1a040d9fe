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
from rewardrt.scoring.pairwise import settle
from rewardrt.text.fields import unread
from rewardrt.text.rendering import Item
from rewardrt.text.rows import Row, Scored, error_row, fill_row, parse_row

WINDOW_ROWS = 4096
FIRST_ROWS = 100  # the first window, after which a file of which no row can be scored is given up
WINDOW_BYTES = 32 * 2**20  # of input lines; the last line of a window may go over

_TOO_DEEP = "nested too deeply; expected a JSON object of fewer levels"

Prepared = TypeVar("Prepared")


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

    def add(self, row: dict[str, Any], parsed: Row, scores: list[Scored]) -> None:
        """Count one scored row."""
        for name in unread(row):
            self.unread[name] = self.unread.get(name, 0) + 1
        self.scored += 1
        self.texts += len(scores)
        self.tokens += sum(score.tokens for score in scores)
        self.truncated_texts += sum(score.truncated > 0 for score in scores)
        if parsed.kind == "pair":
            self.pairs += 1
            self.pairs_right += scores[0].reward > scores[1].reward
            self.ties += scores[0].reward == scores[1].reward


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
    score: Callable[[Prepared], list[Scored | RewardRTError]],
    lines: Iterable[Line],
    write: Callable[[bytes], object],
    *,
    prepare: Callable[[list[Item]], Prepared],
    labels: Sequence[str] = (),
    parse: Callable[[object], Row] = parse_row,
    window: int = WINDOW_ROWS,
    progress: Callable[[Summary], None] | None = None,
) -> Summary:
    """Score every row and write each, scored or with `error`, in the order of the input.

    `parse` says which texts the model scores for a row. `prepare` gets all texts of a window at once, and `score` what
    it made of them; it answers for each in the same order. Reading, parsing and preparing are done in a thread, one
    window ahead of the scoring. With `labels` rows come out with their objectives. `progress` is called after each
    window.

    Raises RewardRTError, before anything is written, when none of the first FIRST_ROWS rows can be scored.
    """

    def prepared(some: list[Line]) -> tuple[list[Line], list[Row | RowError], Prepared | None]:
        parsed = [_parse(line, parse) for line in some]
        items = [item for row in parsed if isinstance(row, Row) for item in row.items]
        return some, parsed, prepare(items) if items else None

    summary, first_error = Summary(), ""
    for some, parsed, texts in _ahead(prepared(some) for some in _windows(lines, window)):
        results = iter(score(texts) if texts is not None else [])
        finished: list[bytes] = []
        for line, row in zip(some, parsed, strict=True):
            own = [next(results) for _ in row.items] if isinstance(row, Row) else []
            finished.append(_finish(line, row, own, labels, summary))
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


def _parse(line: Line, parse: Callable[[object], Row]) -> Row | RowError:
    if isinstance(line.row, RowError):
        return line.row
    try:
        return parse(line.row)
    except RowError as error:
        return error


def _finish(
    line: Line,
    parsed: Row | RowError,
    results: list[Scored | RewardRTError],
    labels: Sequence[str],
    summary: Summary,
) -> bytes:
    """Return the line to write, and count it."""
    summary.rows += 1
    row = {} if isinstance(line.row, RowError) else line.row
    try:
        if isinstance(parsed, RowError):
            message = str(parsed)
        else:
            scores = [result for result in results if isinstance(result, Scored)]
            if len(scores) == len(results):
                scores = settle(parsed, scores)
                written = to_line(fill_row(row, parsed, scores, labels))
                summary.add(row, parsed, scores)
                return written
            failed = [(index, result) for index, result in enumerate(results) if isinstance(result, RewardRTError)]
            message = "; ".join(f"{parsed.label(index)}{error}" for index, error in failed)
        written = to_line(error_row(row, message))
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
