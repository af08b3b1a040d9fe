"""An evaluation: all numbers of one benchmark with their intervals, and the data of the report's charts, as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

import numpy as np

from rewardrt.data.inputs import InputFile
from rewardrt.evaluate.comparison import Comparison
from rewardrt.evaluate.measures import OVERALL, Key, Mean, Measures
from rewardrt.evaluate.results import Flags, Floats, Results
from rewardrt.evaluate.scoring import Failure, Scores, Shown
from rewardrt.evaluate.sources import sha256_of
from rewardrt.evaluate.statistics import (
    RESAMPLES,
    Calibration,
    LengthControl,
    calibration,
    intervals,
    length_control,
    margins_of,
)
from rewardrt.evaluate.subject import Subject

BINS = 40  # most bins of a histogram
SAMPLE = 1200  # most answers that are drawn as points


@dataclass(frozen=True)
class Number:
    """A number of a benchmark, with the bounds of its 95% bootstrap interval; None if it does not exist.

    `rows` is the number of rows behind it, and `ties` how many of them have equal best right and best wrong answers.
    """

    level: str
    name: str
    value: float | None
    low: float | None
    high: float | None
    rows: int | None
    ties: int | None


@dataclass(frozen=True)
class Histogram:
    """The number of values between each two edges, for right and for wrong answers."""

    edges: list[float]
    right: list[int]
    wrong: list[int]


@dataclass(frozen=True)
class Objective:
    """One of the model's objectives, used as the reward: its score, and its means over right and wrong answers."""

    name: str
    score: float | None
    right: float
    wrong: float


@dataclass(frozen=True)
class Evaluation:
    """Everything reported about one benchmark."""

    benchmark: str
    title: str
    asks_for: str
    files: dict[str, str]  # name -> SHA-256
    rows: int
    scored: int
    failed: int
    undecided: int  # rows with only right or only wrong answers
    prompts: int
    texts: int
    tokens: int
    truncated_texts: int
    truncated_tokens: int
    ties: int
    unread: dict[str, int]  # text fields that are not read -> number of rows with them
    threshold: float | None
    by: str
    numbers: list[Number]
    rewards: Histogram | None
    margins: Histogram | None
    points: list[tuple[int, float, bool]]  # tokens, reward, right
    length: LengthControl | None
    calibration: Calibration | None
    objectives: list[Objective]
    worst: list[Shown]
    failures: list[Failure]
    comparisons: list[Comparison]

    @property
    def score(self) -> Number:
        """The overall score, the number that is usually quoted."""
        return next(number for number in self.numbers if number.level == "overall")


def evaluate(scores: Scores, subject: Subject, *, by: str = "", resamples: int = RESAMPLES) -> Evaluation:
    """Return the evaluation of scored rows."""
    results, steps = scores.results, scores.layout.asks_for == "steps"
    measures = _with_by(scores.layout.measure(results), results, by)
    margins = np.zeros(0) if steps else margins_of(results)
    right = _right_steps(results) if steps else results.right
    known = ~np.isnan(measures.credit)
    return Evaluation(
        benchmark=scores.layout.name,
        title=scores.layout.title,
        asks_for=scores.layout.asks_for,
        files=_hashes(scores.files),
        rows=scores.summary.rows,
        scored=results.rows,
        failed=scores.failed,
        undecided=int((~known).sum()),
        prompts=len(np.unique(results.units)),
        texts=scores.summary.texts,
        tokens=scores.summary.tokens,
        truncated_texts=int((results.truncated > 0).sum()),
        truncated_tokens=int(results.truncated.sum()),
        ties=int(measures.tied.sum()),
        unread=dict(scores.summary.unread),
        threshold=results.threshold if steps else None,
        by=by,
        numbers=_numbers(measures, results, resamples),
        rewards=_histogram(results.rewards, right),
        margins=_histogram(margins, margins > 0, around=True),
        points=[] if steps else _points(results),
        length=None if steps else length_control(results, scores.layout.measure),
        calibration=calibration(margins),
        objectives=_objectives(scores, subject.labels),
        worst=scores.worst,
        failures=scores.failures,
        comparisons=[],
    )


def with_comparison(evaluation: Evaluation, comparison: Comparison) -> Evaluation:
    """Return an evaluation with one more comparison."""
    return replace(evaluation, comparisons=[*evaluation.comparisons, comparison])


def card_line(evaluation: Evaluation, subject: Subject, version: str) -> str:
    """Return one line for a model card."""
    score = evaluation.score
    said = f"{evaluation.title}: {_shown(score.value)}"
    if score.low is not None and score.high is not None:
        said += f" (95% {score.low:.4f} to {score.high:.4f})"
    said += f", {evaluation.scored:,} rows"
    said += f" of {evaluation.rows:,}" if evaluation.failed else ""
    said += f", ties {evaluation.ties:,}" if evaluation.ties else ""
    cut = f", texts cut {evaluation.truncated_texts:,}" if evaluation.truncated_texts else ""
    return f"{said}{cut}; {subject.checkpoint}, {subject.graph}, rewardrt {version}"


def as_json(value: Any) -> Any:
    """Convert dataclasses to JSON types; NaN and infinity become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {each.name: as_json(getattr(value, each.name)) for each in dataclasses.fields(value)}
        return fields
    if isinstance(value, dict):
        return {str(name): as_json(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _with_by(measures: Measures, results: Results, by: str) -> Measures:
    if not by:
        return measures
    known = ~np.isnan(measures.credit)
    order = sorted(range(len(results.by_names)), key=lambda index: results.by_names[index])
    further = {
        Key("by", results.by_names[index]): Mean(measures.credit, known & (results.by == index)) for index in order
    }
    return replace(measures, means=measures.means | further)


def _numbers(measures: Measures, results: Results, resamples: int) -> list[Number]:
    values, found = measures.values(), intervals(measures, results.units, resamples)
    levels = ("overall", "section", "subset", "part", "by")
    numbers = []
    for key in sorted(values, key=lambda key: levels.index(key.level)):
        where = _where(key, measures, results)
        low, high = found.get(key) or (None, None)
        rows = None if where is None else int(where.sum())
        ties = None if where is None or key.level == "part" else int((measures.tied & where).sum())
        numbers.append(Number(key.level, key.name, _known(values[key]), low, high, rows, ties))
    return numbers


def _where(key: Key, measures: Measures, results: Results) -> Flags | None:
    """Return the rows behind a number; None for a section, which is a weighted mean of subsets."""
    if key in measures.means:
        return measures.means[key].where
    if key.level == "overall":
        return np.asarray(~np.isnan(measures.credit))
    return results.in_subset(key.name) if key.level == "subset" else None


def _right_steps(results: Results) -> Flags:
    """Return [m] bool: which steps come before the first wrong one, or in a solution without one."""
    place = np.arange(len(results.rewards)) - results.starts[:-1][results.row_of]
    label = results.labels[results.row_of]
    return np.asarray((label < 0) | (place < label))


def _histogram(values: Floats, right: Flags, *, around: bool = False) -> Histogram | None:
    """Return a histogram of the middle 99% of the values; the outermost bins also count what lies beyond.

    With `around`, the bins are symmetric, and 0 is an edge.
    """
    if not len(values):
        return None
    low, high = np.quantile(values, [0.005, 0.995])
    if around:
        low, high = -max(-low, high), max(-low, high)
    if not high > low:
        low, high = low - 0.5, high + 0.5
    bins = min(BINS, 2 * max(3, int(np.sqrt(len(values)) / 2)))
    edges = np.linspace(low, high, bins + 1)
    inside = np.clip(values, low, high)
    counts = [np.histogram(inside[which], edges)[0].tolist() for which in (right, ~right)]
    return Histogram(edges.tolist(), *counts)


def _points(results: Results) -> list[tuple[int, float, bool]]:
    count = len(results.rewards)
    chosen = np.arange(count)
    if count > SAMPLE:
        chosen = np.sort(np.random.default_rng(0).choice(count, SAMPLE, replace=False))
    return [(int(results.tokens[at]), float(results.rewards[at]), bool(results.right[at])) for at in chosen]


def _objectives(scores: Scores, labels: Sequence[str]) -> list[Objective]:
    results, found = scores.results, []
    for index, name in enumerate(labels[: results.objectives.shape[1]]):
        values = results.objectives[:, index]
        score = scores.layout.measure(results.with_rewards(values)).values()[OVERALL]
        found.append(Objective(name, _known(score), _average(values[results.right]), _average(values[~results.right])))
    return found


def _hashes(files: Sequence[InputFile]) -> dict[str, str]:
    """Return the SHA-256 of files by name, without folders if the names are unique."""
    names = [PurePath(file.name).name for file in files]
    apart = len(set(names)) == len(names)
    return {name if apart else file.name: sha256_of(file) for name, file in zip(names, files, strict=True)}


def _average(values: Floats) -> float:
    return float(values.mean()) if len(values) else float("nan")
