"""What is kept of the scored rows: rewards and lengths as columns of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Results:
    """Scored rows in the order of the files: n rows with m answers (or steps) in total.

    `rewards` [m] float64, `right` [m] bool, `tokens` [m] int64 (before the text was cut), `truncated` [m] int64 (tokens
    cut off) and `objectives` [m, labels] float64 have one value per answer. Row i has the answers `starts[i]` to
    `starts[i + 1]`; `starts` is [n + 1] int64.

    `labels` [n] int64 is the index of the first wrong step. `subsets` and `by` [n] int64 are indices into
    `subset_names` and `by_names`, and `units` [n] int64 numbers the prompts. `positions` [n] int64 is the row's number
    among all rows read, including failed ones.

    For steps, `tokens` and `truncated` are those of the whole text at its first step, and 0 at the others.
    """

    rewards: Floats
    right: Flags
    tokens: Ints
    truncated: Ints
    objectives: Floats
    starts: Ints
    labels: Ints
    subsets: Ints
    by: Ints
    units: Ints
    positions: Ints
    ids: Sequence[str]
    subset_names: Sequence[str]
    by_names: Sequence[str]
    threshold: float = 0.5  # a step with a lower reward is predicted to be wrong

    @property
    def rows(self) -> int:
        """The number of scored rows."""
        return len(self.starts) - 1

    @property
    def row_of(self) -> Ints:
        """The index of each answer's row, [m] int64."""
        return np.repeat(np.arange(self.rows), np.diff(self.starts))

    def best(self, which: Flags) -> Floats:
        """Return the highest reward among each row's answers marked in `which` [m], as [n]; -inf if none is marked."""
        return self._each(np.maximum, np.where(which, self.rewards, -np.inf))

    def worst(self, which: Flags) -> Floats:
        """Return the lowest reward among each row's answers marked in `which` [m], as [n]; inf if none is marked."""
        return self._each(np.minimum, np.where(which, self.rewards, np.inf))

    def sums(self, values: npt.ArrayLike) -> Floats:
        """Return the sum of values [m] over each row's answers, [n]."""
        return self._each(np.add, np.asarray(values, dtype=np.float64))

    @property
    def mixed(self) -> Flags:
        """Which rows have both a right and a wrong answer, [n] bool."""
        share = self.sums(self.right) / np.maximum(1, np.diff(self.starts))
        return (share > 0) & (share < 1)

    def in_subset(self, name: str) -> Flags:
        """Return which rows belong to a subset, [n] bool."""
        return np.array([each == name for each in self.subset_names], dtype=bool)[self.subsets]

    def with_rewards(self, rewards: Floats) -> Results:
        """Return the same rows with other rewards, [m]."""
        return replace(self, rewards=rewards)

    def only(self, rows: Flags) -> Results:
        """Return the rows marked in `rows` [n] bool."""
        answers = rows[self.row_of]
        sizes = np.diff(self.starts)[rows]
        return replace(
            self,
            **{
                name: getattr(self, name)[answers] for name in ("rewards", "right", "tokens", "truncated", "objectives")
            },
            **{name: getattr(self, name)[rows] for name in ("labels", "subsets", "by", "units", "positions")},
            starts=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            ids=[each for each, kept in zip(self.ids, rows, strict=True) if kept],
        )

    def _each(self, fold: np.ufunc, values: Floats) -> Floats:
        if not self.rows:
            return np.zeros(0)
        return np.asarray(fold.reduceat(values, self.starts[:-1]), dtype=np.float64)
