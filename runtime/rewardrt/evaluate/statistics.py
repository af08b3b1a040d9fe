"""How sure a number is, and what a difference is worth. In numpy alone; every draw has a fixed seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rewardrt.evaluate.measures import OVERALL, Key, Measures, Values
from rewardrt.evaluate.results import Flags, Floats, Ints, Results

RESAMPLES = 1000
FLIPS = 10_000
EXACT = 13  # at most so many differences are tried in all combinations
LEVEL = 0.95
_SEED = 20_240_611
_PAIRS_AT_ONCE = 4_000_000  # cells of a matrix that is held


def resampled(measures: Measures, units: Ints, resamples: int = RESAMPLES) -> Values:
    """Return every number of `resamples` bootstrap samples, each [resamples]; {} where there is one unit or none.

    A sample draws as many units (prompts), with replacement, as there are, each with all its rows: rows of one prompt
    are not independent of each other. A number whose rows were not drawn is NaN in that sample.
    """
    names, codes = np.unique(units, return_inverse=True)
    if len(names) < 2 or not measures.means:
        return {}
    columns = []
    for mean in measures.means.values():
        of = codes[mean.where]
        columns.append(np.bincount(of, weights=mean.values[mean.where], minlength=len(names)))
        columns.append(np.bincount(of, minlength=len(names)).astype(np.float64))
    sums = np.stack(columns, axis=1)  # [units, 2 * means]
    random = np.random.default_rng(_SEED)
    totals = np.empty((resamples, sums.shape[1]))
    for sample in range(resamples):
        drawn = np.bincount(random.integers(0, len(names), len(names)), minlength=len(names))
        totals[sample] = drawn @ sums
    with np.errstate(invalid="ignore", divide="ignore"):
        found = totals[:, ::2] / totals[:, 1::2]
    means = {key: found[:, index] for index, key in enumerate(measures.means)}
    return means | measures.derive(means)


def interval(sample: Floats) -> tuple[float, float] | None:
    """Return the middle `LEVEL` of a bootstrap sample (the percentile interval); None where it has no number."""
    known = sample[~np.isnan(sample)]
    if not len(known):
        return None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def intervals(measures: Measures, units: Ints, resamples: int = RESAMPLES) -> dict[Key, tuple[float, float] | None]:
    """Return the interval of every number."""
    return {key: interval(sample) for key, sample in resampled(measures, units, resamples).items()}


def paired_p(first: Floats, second: Floats, units: Ints) -> float:
    """Return how likely so large a difference of two means is when neither of the two is better (two-sided).

    A test by exchanging: within each unit the two may be exchanged, which changes the sign of its difference. Of units
    that differ, all combinations are tried where there are at most EXACT, and else FLIPS random ones, which count the
    observed one too. For pairs, one a prompt, it is McNemar's exact test. `first` and `second` are [rows].
    """
    known = ~(np.isnan(first) | np.isnan(second))
    _, codes = np.unique(units[known], return_inverse=True)
    differences = np.bincount(codes, weights=(first - second)[known]) if known.any() else np.zeros(0)
    differences = differences[np.abs(differences) > 1e-12]
    count = len(differences)
    if not count:
        return 1.0
    observed = abs(differences.sum()) - 1e-9
    if count <= EXACT:
        signs = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
        return float((np.abs(signs @ differences) >= observed).mean())
    random, extreme, at_once = np.random.default_rng(_SEED), 1, max(1, _PAIRS_AT_ONCE // count)
    for start in range(0, FLIPS, at_once):
        size = (min(at_once, FLIPS - start), count)
        extreme += int((np.abs((1 - 2 * random.integers(0, 2, size, dtype=np.int8)) @ differences) >= observed).sum())
    return extreme / (FLIPS + 1)


def kendall(first: Floats, second: Floats) -> float:
    """Return Kendall's tau-b of two lists of numbers, NaN where one of them is constant.

    tau_b = (concordant - discordant) / sqrt((n0 - ties in first) (n0 - ties in second)), n0 = n (n - 1) / 2, by
    Knight's algorithm (1966): discordant pairs are the exchanges that sort the second after the first, O(n log n).
    """
    order = np.lexsort((second, first))
    x, y = first[order], second[order]
    n0 = len(x) * (len(x) - 1) // 2
    both = np.stack([x, y], axis=1)
    tied_x, tied_y = _tied_pairs(x), _tied_pairs(np.sort(y))
    tied_both = _tied_pairs(both)
    discordant = _exchanges(y)[1]
    concordant = n0 - tied_x - tied_y + tied_both - discordant
    size = float(np.sqrt(float(n0 - tied_x)) * np.sqrt(float(n0 - tied_y)))
    return (concordant - discordant) / size if size else float("nan")


def _tied_pairs(ordered: npt.NDArray[np.float64]) -> int:
    """Return how many pairs of equal items a sorted list has."""
    if not len(ordered):
        return 0
    differs = ordered[1:] != ordered[:-1]
    edges = np.flatnonzero(differs if differs.ndim == 1 else differs.any(axis=1)) + 1
    sizes = np.diff(np.concatenate([[0], edges, [len(ordered)]]))
    return int((sizes * (sizes - 1) // 2).sum())


def _exchanges(values: Floats) -> tuple[Floats, int]:
    """Return the values sorted, and how many pairs stood in the wrong order."""
    if len(values) <= 64:
        after = np.triu(values[:, None] > values[None, :], 1)
        return np.sort(values), int(after.sum())
    middle = len(values) // 2
    (left, in_left), (right, in_right) = _exchanges(values[:middle]), _exchanges(values[middle:])
    between = int((len(left) - np.searchsorted(left, right, side="right")).sum())
    return np.sort(np.concatenate([left, right]), kind="stable"), in_left + in_right + between


def same_order(first: Results, second: Results) -> tuple[float, int]:
    """Return the share of the pairs of answers to one prompt that both order alike, and how many pairs there are.

    Equal rewards are an order of their own.
    """
    same = pairs = 0
    for indices in groups(first):
        a, b = first.rewards[indices], second.rewards[indices]
        i, j = np.triu_indices(indices.shape[1], 1)
        same += int((np.sign(a[:, i] - a[:, j]) == np.sign(b[:, i] - b[:, j])).sum())
        pairs += len(indices) * len(i)
    return (same / pairs if pairs else float("nan")), pairs


def groups(results: Results) -> list[Ints]:
    """Return the answers of all rows that have the same number of them, [rows, answers], for each number; in parts."""
    sizes, found = np.diff(results.starts), []
    for size in np.unique(sizes):
        starts = results.starts[:-1][sizes == size]
        most = max(1, _PAIRS_AT_ONCE // int(size * size + 1))
        found += [starts[at : at + most, None] + np.arange(size) for at in range(0, len(starts), most)]
    return found


@dataclass(frozen=True)
class LengthControl:
    """What a benchmark's score is when length may not tell.

    `slope` is by how much a reward goes up with one token more, of two answers to one prompt that are equally right.
    `score` is the score of the rewards without that part. `longer` and `shorter` are the credits of the rows whose
    right answer is longer, or shorter, than the best wrong one, `rows_longer` and `rows_shorter` how many these are.
    """

    slope: float
    score: float
    longer: float
    shorter: float
    rows_longer: int
    rows_shorter: int


def length_control(results: Results, measure: Callable[[Results], Measures]) -> LengthControl | None:
    """Return the slope and its consequences; None where lengths of the answers to one prompt do not tell it.

    Least squares of reward on length and being right, within prompts: r = prompt + a right + b tokens. What is taken
    off the rewards is b tokens alone, as in length-controlled AlpacaEval (arXiv:2404.04475), so that what being right
    is worth stays.
    """
    slope = slope_of(results)
    if slope is None:
        return None
    credit = measure(results).credit
    length = _of_best(results, results.right) - _of_best(results, ~results.right)
    counted = results.mixed & ~np.isnan(credit)
    longer, shorter = counted & (length > 0), counted & (length < 0)
    return LengthControl(
        slope=slope,
        score=measure(results.with_rewards(results.rewards - slope * results.tokens)).values()[OVERALL],
        longer=float(credit[longer].mean()) if longer.any() else float("nan"),
        shorter=float(credit[shorter].mean()) if shorter.any() else float("nan"),
        rows_longer=int(longer.sum()),
        rows_shorter=int(shorter.sum()),
    )


def slope_of(results: Results) -> float | None:
    """Return b of r = prompt + a right + b tokens; None where it cannot be told from the others."""
    reward, tokens, right = (_within(results, each) for each in (results.rewards, results.tokens, results.right))
    matrix = np.stack([right, tokens], axis=1)
    if not tokens.any() or np.linalg.matrix_rank(matrix) < 2:
        return None
    return float(np.linalg.lstsq(matrix, reward, rcond=None)[0][1])


def _within(results: Results, values: npt.ArrayLike) -> Floats:
    """Return values less their row's mean."""
    each = np.asarray(values, dtype=np.float64)
    return each - (results.sums(each) / np.maximum(1, np.diff(results.starts)))[results.row_of]


def _of_best(results: Results, which: Flags) -> Floats:
    """Return the tokens of the answer with the highest reward among those that are marked, the longest of several."""
    highest = results.best(which)[results.row_of]
    tokens = np.where(which & (results.rewards == highest), results.tokens, -1).astype(np.float64)
    return np.asarray(np.maximum.reduceat(tokens, results.starts[:-1])) if results.rows else np.zeros(0)


@dataclass(frozen=True)
class Calibration:
    """How often the higher reward is right, by how much higher it is: bins of equally many pairs of answers.

    `margins`, `expected` and `right` are means of each bin: the margin, the sigmoid of it (what a Bradley-Terry model
    promises), and the share of the pairs whose higher reward is of the right answer. `error` is the mean distance of
    the last two, each pair counted once (expected calibration error), `log_loss` the mean of -log sigmoid(margin).
    """

    pairs: int
    margins: list[float]
    expected: list[float]
    right: list[float]
    error: float
    log_loss: float


def margins_of(results: Results) -> Floats:
    """Return the reward of every right answer less that of every wrong answer to the same prompt."""
    found = []
    for indices in groups(results):
        difference = results.rewards[indices][:, :, None] - results.rewards[indices][:, None, :]
        right = results.right[indices]
        found.append(difference[right[:, :, None] & ~right[:, None, :]])
    return np.concatenate(found) if found else np.zeros(0)


def calibration(margins: Floats) -> Calibration | None:
    """Return how margins are calibrated, in at most ten bins of at least 20 pairs; None where there are none."""
    if not len(margins):
        return None
    size = np.abs(margins)
    order = np.argsort(size, kind="stable")
    size, right = size[order], np.where(margins == 0, 0.5, margins > 0)[order]
    expected = 1 / (1 + np.exp(-size))
    parts = np.array_split(np.arange(len(size)), max(1, min(10, len(size) // 20)))
    margin, promised, found = ([float(each[part].mean()) for part in parts] for each in (size, expected, right))
    distance = sum(len(part) * abs(e - r) for part, e, r in zip(parts, promised, found, strict=True))
    log_loss = float(np.logaddexp(0, -margins).mean())
    return Calibration(len(size), margin, promised, found, distance / len(size), log_loss)
