"""What is kept of the rows that were scored: their rewards and lengths in columns, and texts of none but the worst."""

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
    """Scored rows, in the order of the files. Of n rows with m answers (or steps) in all:

    `rewards` [m] float64, `right` [m] bool, `tokens` [m] int64 (those that were cut off counted too), `truncated` [m]
    int64, `objectives` [m, labels] float64. Row i has the answers `starts[i]` to `starts[i + 1]` (`starts` is [n + 1]).
    `labels`, `subsets`, `by` and `units` are [n] int64: the first wrong step, and indices into `subset_names`,
    `by_names` and of prompts. `positions` [n] tell the place of a row among all that were read, failed ones too.
    Of steps, tokens and truncated are those of the whole text, at its first step, and 0 at the others.
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
    threshold: float = 0.5  # of a step's reward, below which the step is taken to be wrong

    @property
    def rows(self) -> int:
        """How many rows were scored."""
        return len(self.starts) - 1

    @property
    def row_of(self) -> Ints:
        """The row of each answer, [m]."""
        return np.repeat(np.arange(self.rows), np.diff(self.starts))

    def best(self, which: Flags) -> Floats:
        """Return the highest reward of the answers of each row that are marked, [n]; -inf where none is."""
        return self._each(np.maximum, np.where(which, self.rewards, -np.inf))

    def worst(self, which: Flags) -> Floats:
        """Return the lowest reward of the answers of each row that are marked, [n]; inf where none is."""
        return self._each(np.minimum, np.where(which, self.rewards, np.inf))

    def sums(self, values: npt.ArrayLike) -> Floats:
        """Return the sum over the answers of each row, [n]."""
        return self._each(np.add, np.asarray(values, dtype=np.float64))

    @property
    def mixed(self) -> Flags:
        """Which rows have a right answer and a wrong one, [n]."""
        share = self.sums(self.right) / np.maximum(1, np.diff(self.starts))
        return (share > 0) & (share < 1)

    def in_subset(self, name: str) -> Flags:
        """Return which rows are of a subset, [n]."""
        return np.array([each == name for each in self.subset_names], dtype=bool)[self.subsets]

    def with_rewards(self, rewards: Floats) -> Results:
        """Return the same rows with other rewards, [m]."""
        return replace(self, rewards=rewards)

    def only(self, rows: Flags) -> Results:
        """Return some of the rows, marked in [n]."""
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
