"""Confidence intervals, significance tests, length control and calibration, with numpy only and fixed random seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rewardrt.evaluate.measures import OVERALL, Key, Measures, Values
from rewardrt.evaluate.results import Flags, Floats, Ints, Results

RESAMPLES = 1000
FLIPS = 10_000
EXACT = 13  # up to this many differences, all sign combinations are tried
LEVEL = 0.95
_SEED = 20_240_611
_PAIRS_AT_ONCE = 4_000_000  # most cells of a matrix in memory


def resampled(measures: Measures, units: Ints, resamples: int = RESAMPLES) -> Values:
    """Return every number of `resamples` bootstrap samples, each [resamples]; {} if there are fewer than two units.

    A sample draws as many units (prompts) as there are, with replacement, each with all its rows, because rows of one
    prompt are not independent. A number whose rows were not drawn is NaN in that sample.
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
    """Return the percentile interval of a bootstrap sample at the level `LEVEL`; None if all values are NaN."""
    known = sample[~np.isnan(sample)]
    if not len(known):
        return None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def intervals(measures: Measures, units: Ints, resamples: int = RESAMPLES) -> dict[Key, tuple[float, float] | None]:
    """Return the interval of every number."""
    return {key: interval(sample) for key, sample in resampled(measures, units, resamples).items()}


def paired_p(first: Floats, second: Floats, units: Ints) -> float:
    """Return the two-sided p value of the difference of two means, [rows] each, by a paired permutation test.

    Under the null hypothesis the two may be exchanged within each unit, which changes the sign of the unit's
    difference. If at most EXACT units differ, all sign combinations are tried; otherwise FLIPS random ones, with the
    observed one added. For pairs with one per prompt, this is McNemar's exact test.
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
    """Return Kendall's tau-b of two lists of numbers; NaN if one of them is constant.

    tau_b = (concordant - discordant) / sqrt((n0 - ties in first) (n0 - ties in second)) with n0 = n (n - 1) / 2.
    Knight's algorithm (1966) counts the discordant pairs in O(n log n): they are the exchanges that sort `second` after
    sorting by `first`.
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
    """Return the number of pairs of equal items in a sorted list."""
    if not len(ordered):
        return 0
    differs = ordered[1:] != ordered[:-1]
    edges = np.flatnonzero(differs if differs.ndim == 1 else differs.any(axis=1)) + 1
    sizes = np.diff(np.concatenate([[0], edges, [len(ordered)]]))
    return int((sizes * (sizes - 1) // 2).sum())


def _exchanges(values: Floats) -> tuple[Floats, int]:
    """Return the values sorted, and the number of pairs that were in the wrong order."""
    if len(values) <= 64:
        after = np.triu(values[:, None] > values[None, :], 1)
        return np.sort(values), int(after.sum())
    middle = len(values) // 2
    (left, in_left), (right, in_right) = _exchanges(values[:middle]), _exchanges(values[middle:])
    between = int((len(left) - np.searchsorted(left, right, side="right")).sum())
    return np.sort(np.concatenate([left, right]), kind="stable"), in_left + in_right + between


def same_order(first: Results, second: Results) -> tuple[float, int]:
    """Return the share of pairs of answers to one prompt that both order alike, and the number of pairs.

    A pair of equal rewards is only ordered alike if both have equal rewards.
    """
    same = pairs = 0
    for indices in groups(first):
        a, b = first.rewards[indices], second.rewards[indices]
        i, j = np.triu_indices(indices.shape[1], 1)
        same += int((np.sign(a[:, i] - a[:, j]) == np.sign(b[:, i] - b[:, j])).sum())
        pairs += len(indices) * len(i)
    return (same / pairs if pairs else float("nan")), pairs


def groups(results: Results) -> list[Ints]:
    """Return the answers' indices of rows with equally many answers, [rows, answers] for each number, in parts."""
    sizes, found = np.diff(results.starts), []
    for size in np.unique(sizes):
        starts = results.starts[:-1][sizes == size]
        most = max(1, _PAIRS_AT_ONCE // int(size * size + 1))
        found += [starts[at : at + most, None] + np.arange(size) for at in range(0, len(starts), most)]
    return found


@dataclass(frozen=True)
class LengthControl:
    """What a benchmark's score is without the influence of length.

    `slope` is the increase of the reward per token, between equally right answers to one prompt. `score` is the score
    of the rewards minus slope times tokens. `longer` and `shorter` are the mean credits of the `rows_longer` and
    `rows_shorter` rows whose best right answer is longer, or shorter, than the best wrong one.
    """

    slope: float
    score: float
    longer: float
    shorter: float
    rows_longer: int
    rows_shorter: int


def length_control(results: Results, measure: Callable[[Results], Measures]) -> LengthControl | None:
    """Return the slope and its consequences; None if the lengths of answers to one prompt do not determine it.

    The slope b comes from least squares within prompts: r = prompt + a right + b tokens. Only b tokens is subtracted
    from the rewards, as in length-controlled AlpacaEval (arXiv:2404.04475), so the effect a of being right stays.
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
    """Return b of r = prompt + a right + b tokens; None if it is not determined."""
    reward, tokens, right = (_within(results, each) for each in (results.rewards, results.tokens, results.right))
    matrix = np.stack([right, tokens], axis=1)
    if not tokens.any() or np.linalg.matrix_rank(matrix) < 2:
        return None
    return float(np.linalg.lstsq(matrix, reward, rcond=None)[0][1])


def _within(results: Results, values: npt.ArrayLike) -> Floats:
    """Return values [m] minus the mean of their row."""
    each = np.asarray(values, dtype=np.float64)
    return each - (results.sums(each) / np.maximum(1, np.diff(results.starts)))[results.row_of]


def _of_best(results: Results, which: Flags) -> Floats:
    """Return the tokens of the best answer marked in `which`, for each row [n]; the longest of equally good ones."""
    highest = results.best(which)[results.row_of]
    tokens = np.where(which & (results.rewards == highest), results.tokens, -1).astype(np.float64)
    return np.asarray(np.maximum.reduceat(tokens, results.starts[:-1])) if results.rows else np.zeros(0)


@dataclass(frozen=True)
class Calibration:
    """How often the answer with the higher reward is right, by margin, in bins of equally many pairs of answers.

    `margins`, `expected` and `right` are the means of each bin: the margin, its sigmoid (the probability in a
    Bradley-Terry model), and the share of pairs whose answer with the higher reward is right. `error` is the expected
    calibration error: the mean distance of `expected` and `right`, weighted by pairs. `log_loss` is the mean of -log
    sigmoid(margin).
    """

    pairs: int
    margins: list[float]
    expected: list[float]
    right: list[float]
    error: float
    log_loss: float


def margins_of(results: Results) -> Floats:
    """Return the reward of every right answer minus that of every wrong answer to the same prompt."""
    found = []
    for indices in groups(results):
        difference = results.rewards[indices][:, :, None] - results.rewards[indices][:, None, :]
        right = results.right[indices]
        found.append(difference[right[:, :, None] & ~right[:, None, :]])
    return np.concatenate(found) if found else np.zeros(0)


def calibration(margins: Floats) -> Calibration | None:
    """Return how margins are calibrated, in at most ten bins of at least 20 pairs; None if there are no margins."""
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
