"""Compare two sets of rewards for the same rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from rewardrt.evaluate.measures import OVERALL
from rewardrt.evaluate.results import Results
from rewardrt.evaluate.scoring import Scores
from rewardrt.evaluate.statistics import RESAMPLES, interval, kendall, paired_p, resampled, same_order

FLIPPED = 50  # most rows that are listed


@dataclass(frozen=True)
class Flip:
    """A row that counts more or less with the other rewards: its number, and its credit with both."""

    row: int
    id: str
    credit: float
    other: float


@dataclass(frozen=True)
class Comparison:
    """One set of rewards compared with another, on the rows that have both.

    `agreement` is the share of pairs of answers to one prompt (for steps: of rows) that both judge alike. `tau` is
    Kendall's tau-b of all rewards. `difference` is the score minus the other score, with the interval `low` to `high`,
    and `p` is the p value of the paired test. `better` and `worse` count the rows with more credit here, or there.
    `largest` is the largest absolute difference of two rewards.
    """

    name: str
    rows: int
    agreement: float | None
    tau: float | None
    score: float | None
    other: float | None
    difference: float | None
    low: float | None
    high: float | None
    p: float
    better: int
    worse: int
    largest: float
    flips: list[Flip]
    left_out: int
    first_left_out: str


def compare(scores: Scores, other: Results, name: str, *, resamples: int = RESAMPLES) -> Comparison:
    """Compare the rewards of scored rows with others for the same rows; rows that lack one of the two are left out."""
    both = np.intersect1d(scores.results.positions, other.positions)
    first = scores.results.only(np.isin(scores.results.positions, both))
    second = other.only(np.isin(other.positions, both))
    measure, steps = scores.layout.measure, scores.layout.asks_for == "steps"
    ours, theirs = measure(first), measure(second)
    difference = np.nan_to_num(ours.credit) - np.nan_to_num(theirs.credit)
    mine, yours = (resampled(each, first.units, resamples) for each in (ours, theirs))
    between = interval(mine[OVERALL] - yours[OVERALL]) if mine else None
    score, other_score = ours.values()[OVERALL], theirs.values()[OVERALL]
    flipped = np.flatnonzero(difference)
    most = flipped[np.argsort(-np.abs(difference[flipped]), kind="stable")][:FLIPPED]
    left_out = scores.results.rows - len(both)
    agreement = float((ours.credit == theirs.credit).mean()) if steps and len(both) else float("nan")
    return Comparison(
        name=name,
        rows=len(both),
        agreement=_known(agreement if steps else same_order(first, second)[0]),
        tau=_known(kendall(first.rewards, second.rewards)),
        score=_known(score),
        other=_known(other_score),
        difference=_known(score - other_score),
        low=between[0] if between else None,
        high=between[1] if between else None,
        p=paired_p(ours.credit, theirs.credit, first.units),
        better=int((difference > 0).sum()),
        worse=int((difference < 0).sum()),
        # In float32, because earlier rewards are decimals of float32 numbers.
        largest=float(np.abs(np.float32(first.rewards) - np.float32(second.rewards)).max(initial=0.0)),
        flips=[
            Flip(int(first.positions[row]), first.ids[row], float(ours.credit[row]), float(theirs.credit[row]))
            for row in most
        ],
        left_out=left_out,
        first_left_out=scores.not_compared[0].message if scores.not_compared else "",
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
