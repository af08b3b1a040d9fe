"""Numbers that a benchmark makes of scored rows: means over rows, and formulas of means.

Because every number is one or the other, one function makes the intervals of all (`statistics.resampled`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from rewardrt.evaluate.results import Flags, Floats, Results

Level = Literal["overall", "section", "subset", "part", "by"]


class Key(NamedTuple):
    """The name of a number, and what it is of: all rows, a section, a subset, rows that `--by` makes; a part is a step.

    A part goes into a formula, or stands beside the score.
    """

    level: Level
    name: str


OVERALL = Key("overall", "")


@dataclass(frozen=True)
class Mean:
    """The mean of a value of each row, [n], over the rows that are marked, [n]."""

    values: Floats
    where: Flags


Values = dict[Key, Floats]  # each [k]: one value, or one for each resample


@dataclass(frozen=True)
class Measures:
    """The numbers of a benchmark.

    `derive` makes further numbers of the means, one of them OVERALL; of arrays it makes arrays of the same length. NaN
    stands for a number that there is none of. `credit` is what each row counts, from 0 to 1 [n], NaN where it counts
    nothing by itself. `tied` marks rows whose best right and best wrong answer have the same reward.
    """

    means: dict[Key, Mean]
    derive: Callable[[Values], Values]
    credit: Floats
    tied: Flags

    def values(self) -> dict[Key, float]:
        """Return every number; NaN where there is none."""
        means = {key: _mean(mean.values[mean.where]) for key, mean in self.means.items()}
        return {key: float(value[0]) for key, value in (means | self.derive(means)).items()}


def above(results: Results) -> Floats:
    """Return 1 where the best right answer has a higher reward than every wrong one, else 0; NaN without both kinds."""
    return np.where(
        results.mixed, (results.best(results.right) > results.best(~results.right)).astype(np.float64), np.nan
    )


def tied(results: Results) -> Flags:
    """Return where the best right and the best wrong answer have the same reward."""
    return np.asarray(results.mixed & (results.best(results.right) == results.best(~results.right)))


def shared(results: Results) -> Floats:
    """Return the share of the answers with the highest reward that are right: what a pick among them would get."""
    top = results.rewards == results.best(np.ones(len(results.right), dtype=bool))[results.row_of]
    return results.sums(top & results.right) / np.maximum(1, results.sums(top))


def by_subset(results: Results, credit: Floats, where: Flags | None = None) -> dict[Key, Mean]:
    """Return the mean credit of every subset, where a benchmark has some."""
    counted = ~np.isnan(credit) & (True if where is None else where)
    names = [name for name in results.subset_names if name]
    return {Key("subset", name): Mean(credit, counted & results.in_subset(name)) for name in sorted(names)}


def of_all(credit: Floats) -> dict[Key, Mean]:
    """Return the mean credit of all rows that have one."""
    return {OVERALL: Mean(credit, ~np.isnan(credit))}


def weighted(values: Sequence[Floats], weights: Sequence[float] | None = None) -> Floats:
    """Return the weighted mean of numbers, each [k], of those that are there; NaN where none is."""
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
