"""The numbers of a benchmark: means over rows, and formulas of such means.

Every number is one or the other, so one function computes all intervals (`statistics.resampled`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from rewardrt.evaluate.results import Flags, Floats, Results

Level = Literal["overall", "section", "subset", "part", "by"]


class Key(NamedTuple):
    """The name of a number and its level: all rows, a section, a subset, a value of `--by`, or a part.

    A part is an intermediate number: it goes into a formula, or is shown next to the score.
    """

    level: Level
    name: str


OVERALL = Key("overall", "")


@dataclass(frozen=True)
class Mean:
    """The mean of `values` [n], one for each row, over the rows marked in `where` [n] bool."""

    values: Floats
    where: Flags


Values = dict[Key, Floats]  # each [k]: one value, or one for each bootstrap sample


@dataclass(frozen=True)
class Measures:
    """The numbers of a benchmark.

    `derive` computes further numbers from the means, among them OVERALL; given arrays, it returns arrays of the same
    length. NaN means that a number does not exist. `credit` [n] is what each row counts, from 0 to 1, or NaN if the row
    counts nothing by itself. `tied` [n] bool marks rows whose best right and best wrong answer have equal rewards.
    """

    means: dict[Key, Mean]
    derive: Callable[[Values], Values]
    credit: Floats
    tied: Flags

    def values(self) -> dict[Key, float]:
        """Return every number; NaN if it does not exist."""
        means = {key: _mean(mean.values[mean.where]) for key, mean in self.means.items()}
        return {key: float(value[0]) for key, value in (means | self.derive(means)).items()}


def above(results: Results) -> Floats:
    """Return [n]: 1 if the best right answer's reward is above every wrong one's, else 0; NaN unless both exist."""
    return np.where(
        results.mixed, (results.best(results.right) > results.best(~results.right)).astype(np.float64), np.nan
    )


def tied(results: Results) -> Flags:
    """Return [n] bool: whether the best right and the best wrong answer have equal rewards."""
    return np.asarray(results.mixed & (results.best(results.right) == results.best(~results.right)))


def shared(results: Results) -> Floats:
    """Return [n]: the share of right answers among those with the highest reward, the expected result of a pick."""
    top = results.rewards == results.best(np.ones(len(results.right), dtype=bool))[results.row_of]
    return results.sums(top & results.right) / np.maximum(1, results.sums(top))


def by_subset(results: Results, credit: Floats, where: Flags | None = None) -> dict[Key, Mean]:
    """Return the mean credit of every named subset, over the rows marked in `where`."""
    counted = ~np.isnan(credit) & (True if where is None else where)
    names = [name for name in results.subset_names if name]
    return {Key("subset", name): Mean(credit, counted & results.in_subset(name)) for name in sorted(names)}


def of_all(credit: Floats) -> dict[Key, Mean]:
    """Return the mean credit of all rows that have a credit."""
    return {OVERALL: Mean(credit, ~np.isnan(credit))}


def weighted(values: Sequence[Floats], weights: Sequence[float] | None = None) -> Floats:
    """Return the weighted mean of several numbers, each [k], ignoring NaN; NaN if all are NaN."""
    stacked = np.stack(values)
    known = ~np.isnan(stacked)
    heavy = known * (np.ones(len(stacked)) if weights is None else np.asarray(weights, dtype=np.float64))[:, None]
    total = heavy.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(known, stacked * heavy, 0.0).sum(axis=0) / np.where(total, total, np.nan))


def nothing(means: Values) -> Values:
    """Derive no further numbers."""
    return {}


def _mean(values: Floats) -> Floats:
    return np.array([values.mean() if len(values) else np.nan])
