"""Print an evaluation as lines of text."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rewardrt.evaluate.comparison import Comparison
from rewardrt.evaluate.evaluation import Evaluation, Number
from rewardrt.evaluate.subject import Subject

LINES = 60  # most lines of one kind
_KINDS = {"section": "sections", "subset": "subsets", "part": "parts", "by": "by"}


def describe(evaluation: Evaluation, subject: Subject) -> str:
    """Return a table of the numbers, and the notes needed to read them."""
    return "\n".join(_lines(evaluation, subject))


def in_digits(value: float | None, digits: int = 4) -> str:
    """Return a number in decimals, or a dash if it does not exist."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def between(low: float | None, high: float | None) -> str:
    """Return an interval, or a dash if it does not exist."""
    return "-" if low is None or high is None else f"{low:.4f} .. {high:.4f}"


def _lines(evaluation: Evaluation, subject: Subject) -> Iterator[str]:
    yield f"{evaluation.title}: {subject.bundle}, {subject.graph}"
    names = [_name(number) for number in evaluation.numbers]
    width = min(56, max(map(len, names)))
    yield f"  {'':{width}}   score    95% interval      rows   ties"
    shown: dict[str, int] = {}
    for number, name in zip(evaluation.numbers, names, strict=True):
        shown[number.level] = shown.get(number.level, 0) + 1
        if shown[number.level] <= LINES:
            rows = "" if number.rows is None else f"{number.rows:>7,}{number.ties or 0:>7,}"
            interval = between(number.low, number.high)
            yield f"  {name:{width}}  {in_digits(number.value):>6}  {interval:>16} {rows}".rstrip()
    for level, count in shown.items():
        if count > LINES:
            yield f"  {count - LINES} more {_KINDS[level]}; --json and the report have them"
    yield from notes(evaluation)
    for comparison in evaluation.comparisons:
        yield from compared(comparison)


def _name(number: Number) -> str:
    if number.level == "overall":
        return "score"
    return f"{number.level}: {number.name}" if number.level == "by" else number.name


def notes(evaluation: Evaluation) -> Iterator[str]:
    """Yield a sentence for each thing that has to be known to read the numbers."""
    if evaluation.failed:
        first = f"; the first: {evaluation.failures[0].message}" if evaluation.failures else ""
        yield f"{evaluation.failed:,} of {evaluation.rows:,} rows could not be scored and are not counted{first}"
    decided = evaluation.scored - evaluation.undecided
    if evaluation.undecided:
        yield (
            f"{evaluation.undecided:,} rows have only right or only wrong answers; "
            "they count only in the scores of all prompts"
        )
    if evaluation.ties and evaluation.ties == decided:
        yield "every row is a tie: the best right and the best wrong answer get the same reward"
    if evaluation.truncated_texts:
        yield (
            f"{evaluation.truncated_texts:,} of {evaluation.texts:,} texts were cut, by "
            f"{evaluation.truncated_tokens:,} tokens in all: their rewards are those of the shortened texts"
        )
    for name, rows in evaluation.unread.items():
        yield f"{rows:,} rows had the field `{name}`, which nothing read"
    if evaluation.prompts < 2:
        yield "only one prompt: no interval can be computed"
    length = evaluation.length
    if length is not None:
        yield (
            f"length: 100 more tokens change the reward by {100 * length.slope:+.4f}; length-controlled score "
            f"{in_digits(length.score)}; "
            f"score {in_digits(length.longer)} where the right answer is longer ({length.rows_longer:,} rows), "
            f"{in_digits(length.shorter)} where it is shorter ({length.rows_shorter:,})"
        )
    if evaluation.calibration is not None:
        yield (
            f"calibration: sigmoid(margin) is off by {evaluation.calibration.error:.4f} on average, "
            f"log loss {evaluation.calibration.log_loss:.4f}, {evaluation.calibration.pairs:,} pairs of answers"
        )


def compared(comparison: Comparison) -> Iterator[str]:
    """Yield the lines about a comparison."""
    yield (
        f"against {comparison.name}: {in_digits(comparison.score)} to {in_digits(comparison.other)}, difference "
        f"{'-' if comparison.difference is None else f'{comparison.difference:+.4f}'} "
        f"({between(comparison.low, comparison.high)}), p {comparison.p:.4g}"
    )
    yield (
        f"  {comparison.rows:,} rows: agreement {in_digits(comparison.agreement)}, Kendall's tau "
        f"{in_digits(comparison.tau)}, largest difference of a reward {comparison.largest:.4g}; "
        f"{comparison.better:,} rows count more here, {comparison.worse:,} more there"
    )
    for flip in comparison.flips[:5]:
        yield f"    row {flip.row}{f' ({flip.id})' if flip.id else ''}: {flip.credit:g} here, {flip.other:g} there"
    if len(comparison.flips) > 5:
        yield f"    and {comparison.better + comparison.worse - 5:,} more; --json and the report have them"
    if comparison.left_out:
        first = f"; the first: {comparison.first_left_out}" if comparison.first_left_out else ""
        yield f"  {comparison.left_out:,} rows were left out, of which one of the two has no rewards{first}"
