"""Which of the scored rows are kept, and which input rows are joined before: a data filter.

`--group-by FIELD` joins consecutive rows with the same FIELD into one row with `responses`. The prompt and the fields
that belong to it stay as they are. Every other field becomes a list with one value for each answer. If only the best
answer is kept (`--best`), its own input row is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rewardrt.data.lines import Line
from rewardrt.errors import RewardRTError, RowError
from rewardrt.scoring.scored import ScoredAnswers, ScoredPair, ScoredRow, error_row, scores_of, with_scores

# Fields that the answers of a group share; every other field belongs to one answer.
SHARED = ("prompt", "messages", "tools", "documents", "chat_template_kwargs", "instruction")
_OF_SEVERAL = ("best", "rewards", "comparisons")  # fields that an earlier run added to a row of several answers
MOST_ANSWERS = 10_000  # answers of one group, which are all scored in one call


@dataclass(frozen=True)
class Kept:
    """A row to write: its input line, the indices of the chosen answers, and its scores or its `error`.

    `chosen` is empty if the row stays as it is.
    """

    line: Line
    chosen: tuple[int, ...]
    scores: dict[str, Any]


@dataclass(frozen=True)
class Settled:
    """The outcome for a scored row: the rows to write (none if it is left out), and its result for the summary."""

    kept: tuple[Kept, ...]
    outcome: ScoredRow | RewardRTError


@dataclass(frozen=True)
class Selection:
    """Which answers of a row with several are kept, and which rows. `group_by` names a field of the input.

    `best` keeps the best answer, `top` the best few, and `min_margin` the rows whose best answer is at least this much
    above the second (or chosen above rejected).
    """

    best: bool = False
    top: int | None = None
    min_margin: float | None = None
    group_by: str | None = None

    def settle(self, line: Line, result: ScoredRow | RewardRTError, labels: Sequence[str]) -> Settled:
        """Return what to write for a row. `labels` name the objectives, if they are to be written."""
        if isinstance(result, RewardRTError):
            return self._failed(line, result)
        try:
            chosen = self._choose(result)
        except RowError as error:
            return self._failed(line, error)
        if chosen is None:
            return Settled((), result)
        scores = self._scores(scores_of(result, labels), chosen)
        if chosen and self.best and line.members:  # write the best answer's own input row
            return Settled((Kept(line.members[chosen[0]], (), scores),), result)
        return Settled((Kept(line, chosen, scores),), result)

    def fields(self, kept: Kept) -> dict[str, Any]:
        """Return a JSON row to write: its own fields, reduced to the chosen answers, and their scores."""
        row, chosen = kept.line.fields, kept.chosen
        if "error" in kept.scores:
            return error_row(row, kept.scores["error"])
        if not chosen:
            return with_scores(row, kept.scores)
        if self.best:
            gone = (*_OF_SEVERAL, "response")
            best = {name: value for name, value in row.items() if name not in gone} | {
                "responses": row["responses"][chosen[0]]
            }
            return with_scores({"response" if name == "responses" else name: best[name] for name in best}, kept.scores)
        lists = {name for name in row if name == "responses" or (kept.line.members and self.is_own(name))}
        reordered = {name: [row[name][index] for index in chosen] if name in lists else row[name] for name in row}
        return with_scores(reordered, kept.scores)

    def _failed(self, line: Line, error: RewardRTError) -> Settled:
        apart = line.members if self.best else ()  # with --best, each row of a failed group gets the error
        return Settled(tuple(Kept(each, (), {"error": str(error)}) for each in apart or (line,)), error)

    def _choose(self, scored: ScoredRow) -> tuple[int, ...] | None:
        """Return the answers to keep, best first; () if the row stays as it is, None if it is left out.

        Raises RowError if a margin is required and the row has only one answer.
        """
        if self.min_margin is not None and not np.float32(_margin(scored)) >= np.float32(self.min_margin):
            return None
        if not isinstance(scored, ScoredAnswers) or not (self.best or self.top):
            return ()
        order = sorted(range(len(scored.answers)), key=lambda index: -scored.answers[index].reward)
        return tuple(order[: 1 if self.best else self.top])

    def _scores(self, scores: dict[str, Any], chosen: tuple[int, ...]) -> dict[str, Any]:
        """Return the scores of the chosen answers; with `best`, in the form of a row with one answer."""
        if not chosen:
            return scores
        if self.best:
            named = {"reward": "rewards", "tokens": "tokens", "truncated": "truncated", "objectives": "objectives"}
            return {name: scores[each][chosen[0]] for name, each in named.items() if each in scores}
        return {name: _reordered(name, value, chosen) for name, value in scores.items()}

    def is_own(self, name: str) -> bool:
        """Return whether a field belongs to each answer, in a row that was joined from several."""
        return name not in (*SHARED, self.group_by)


EVERYTHING = Selection()


def _reordered(name: str, value: Any, chosen: tuple[int, ...]) -> Any:
    if name == "best":
        return 0
    if name == "comparisons":
        return [[value[first][second] for second in chosen] for first in chosen]
    return [value[index] for index in chosen]


def _margin(scored: ScoredRow) -> float:
    if isinstance(scored, ScoredPair):
        return scored.margin
    if isinstance(scored, ScoredAnswers) and len(scored.answers) > 1:
        best, second = sorted(scored.rewards, reverse=True)[:2]
        return float(np.float32(best) - np.float32(second))
    raise RowError("the row has one answer, and so no margin; leave out --min-margin, or group rows with --group-by")


def grouped_lines(lines: Iterator[Line], selection: Selection) -> Iterator[Line]:
    """Yield one line for each group of rows, with the rows as its members, then each row without a group.

    Raises RewardRTError if other rows stand between the rows of one group, or if a group is too large.
    """
    assert selection.group_by is not None
    members: list[Line] = []
    others: list[Line] = []  # rows without a group that came after the first member
    seen: set[int] = set()
    last: str | None = None

    def finished() -> Iterator[Line]:
        together = [*([_joined(members, selection)] if members else []), *others]
        for index, line in enumerate(together):
            yield replace(line, whole=index == len(together) - 1)

    for line in lines:
        key = _key(line, selection.group_by)
        if isinstance(key, RowError):
            others.append(replace(line, error=key, members=(line,)))
            continue
        if key != last:
            yield from finished()
            members, others, last = [], [], key
            if hash(key) in seen:
                raise RewardRTError(
                    f"row {line.number}: {selection.group_by} {key[:60]} comes again after other rows; "
                    "sort the rows by it, so that those of one prompt follow each other"
                )
            seen.add(hash(key))
        members.append(line)
        if len(members) + len(others) > MOST_ANSWERS:
            raise RewardRTError(
                f"row {line.number}: more than {MOST_ANSWERS} rows have {selection.group_by} {key[:60]}"
            )
    yield from finished()


def _key(line: Line, name: str) -> str | RowError:
    if isinstance(line.row, RowError):
        return line.row
    if line.row.get(name) is None:
        return RowError(f"row {line.number}: has no {name!r}, which rows are grouped by")
    return json.dumps(line.row[name], ensure_ascii=False, default=str, sort_keys=True)


def _joined(members: list[Line], selection: Selection) -> Line:
    """Return the row of a group: the shared fields, the answers as `responses`, and lists of the other fields."""
    rows = [line.row for line in members if not isinstance(line.row, RowError)]
    first = members[0]
    size = sum(line.bytes for line in members)
    without = next((line.number for line in members if line.fields.get("response") is None), None)
    row: dict[str, Any] = {}
    error: RowError | None = None
    for name in dict.fromkeys(name for each in rows for name in each):
        if not selection.is_own(name):
            row[name] = rows[0].get(name)
            if any(each.get(name) != row[name] for each in rows):
                error = RowError(f"row {first.number}: the {len(rows)} rows of its group do not have the same {name!r}")
        else:
            row["responses" if name == "response" else name] = [each.get(name) for each in rows]
    if without is not None or selection.group_by == "response":
        error = RowError(f"row {without or first.number}: has no response to rank; rows that are grouped have one each")
    return Line(first.number, size, row, None, tuple(members), error=error)
