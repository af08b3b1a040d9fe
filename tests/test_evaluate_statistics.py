"""Intervals, tests, tau, length control and calibration against references that are written out here."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from rewardrt.evaluate.answers import measure_best, measure_pairs
from rewardrt.evaluate.measures import OVERALL, Key
from rewardrt.evaluate.results import Results
from rewardrt.evaluate.statistics import (
    calibration,
    intervals,
    kendall,
    length_control,
    margins_of,
    paired_p,
    resampled,
    same_order,
    slope_of,
)

RANDOM = np.random.default_rng(5)


def results(groups: list[list[tuple[float, bool]]], tokens: list[int] | None = None, units: list[int] | None = None) -> Results:  # fmt: skip
    """Return results of groups of answers, each a reward and whether it is right."""
    flat = [answer for group in groups for answer in group]
    rows = len(groups)
    zeros = np.zeros(rows, dtype=np.int64)
    return Results(
        rewards=np.array([reward for reward, _ in flat], dtype=np.float64),
        right=np.array([right for _, right in flat], dtype=bool),
        tokens=np.array(tokens or [1] * len(flat), dtype=np.int64),
        truncated=np.zeros(len(flat), dtype=np.int64),
        objectives=np.zeros((len(flat), 0)),
        starts=np.concatenate([[0], np.cumsum([len(group) for group in groups])]).astype(np.int64),
        labels=zeros - 1,
        subsets=zeros,
        by=zeros,
        units=np.array(units or range(rows), dtype=np.int64),
        positions=np.arange(1, rows + 1),
        ids=[str(row) for row in range(rows)],
        subset_names=("",),
        by_names=("",),
    )


def pairs(margins: np.ndarray) -> Results:
    return results([[(float(margin), True), (0.0, False)] for margin in margins])


def test_an_interval_is_that_of_the_binomial_distribution() -> None:
    margins = np.where(np.arange(400) < 280, 1.0, -1.0)  # 0.7
    found = pairs(margins)
    low, high = intervals(measure_pairs(found), found.units)[OVERALL] or (0, 0)
    half = 1.96 * math.sqrt(0.7 * 0.3 / 400)
    assert low == pytest.approx(0.7 - half, abs=0.008)
    assert high == pytest.approx(0.7 + half, abs=0.008)
    assert intervals(measure_pairs(found), found.units)[OVERALL] == (low, high), "every draw has a fixed seed"


def test_a_sample_is_what_a_plain_loop_over_prompts_draws() -> None:
    groups = [[(float(RANDOM.normal()), right) for right in (True, False, False)] for _ in range(30)]
    units = [row // 3 for row in range(30)]  # three rows of each prompt
    found = results(groups, units=units)
    sample = resampled(measure_best(found), found.units, 200)[OVERALL]
    credits, random = measure_best(found).credit, np.random.default_rng(20_240_611)
    for index in range(200):
        drawn = [credits[3 * prompt : 3 * prompt + 3] for prompt in random.integers(0, 10, 10)]
        assert sample[index] == pytest.approx(np.concatenate(drawn).mean())


def test_more_rows_of_the_same_prompts_do_not_make_a_number_surer() -> None:
    once = pairs(RANDOM.normal(0.3, 1, 60))
    many = results(
        [[(float(once.rewards[2 * row]), True), (0.0, False)] for row in range(60) for _ in range(5)],
        units=[row for row in range(60) for _ in range(5)],
    )
    assert intervals(measure_pairs(many), many.units) == intervals(measure_pairs(once), once.units)
    alone = intervals(measure_pairs(many), np.arange(300))[OVERALL]
    whole = intervals(measure_pairs(once), once.units)[OVERALL]
    assert alone is not None and whole is not None
    assert alone[1] - alone[0] < 0.6 * (whole[1] - whole[0])


def test_one_prompt_has_no_interval() -> None:
    found = results([[(1.0, True), (0.0, False)]] * 4, units=[0, 0, 0, 0])
    assert resampled(measure_pairs(found), found.units) == {}


@pytest.mark.parametrize(("better", "worse"), [(9, 2), (6, 6), (1, 0), (13, 0)])
def test_for_pairs_the_test_is_mcnemars_exact_one(better: int, worse: int) -> None:
    first = np.array([1.0] * better + [0.0] * worse + [1.0] * 20)
    second = np.array([0.0] * better + [1.0] * worse + [1.0] * 20)
    count, most = better + worse, max(better, worse)
    exact = min(1.0, 2 * sum(math.comb(count, k) for k in range(most, count + 1)) / 2**count)
    assert paired_p(first, second, np.arange(len(first))) == pytest.approx(exact)


def test_of_many_differences_random_exchanges_come_near_mcnemars_test() -> None:
    first = np.array([1.0] * 80 + [0.0] * 50)
    exact = 2 * sum(math.comb(130, k) for k in range(80, 131)) / 2**130  # 0.0107
    assert paired_p(first, 1 - first, np.arange(130)) == pytest.approx(exact, abs=0.003)
    assert paired_p(first, first, np.arange(130)) == 1.0
    one_prompt = paired_p(first, 1 - first, np.zeros(130, dtype=np.int64))
    assert one_prompt == 1.0, "130 rows of one prompt are one observation"


@pytest.mark.parametrize("size", [2, 3, 50, 65, 300])
def test_kendalls_tau_is_that_of_all_pairs(size: int) -> None:
    for levels in (3, 1000):  # many ties, and few
        x = RANDOM.integers(0, levels, size).astype(np.float64)
        y = np.where(RANDOM.random(size) < 0.5, x, RANDOM.integers(0, levels, size)).astype(np.float64)
        score = ties_x = ties_y = 0
        for i, j in itertools.combinations(range(size), 2):
            score += int(np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]))
            ties_x += int(x[i] == x[j])
            ties_y += int(y[i] == y[j])
        n0 = size * (size - 1) / 2
        scale = math.sqrt((n0 - ties_x) * (n0 - ties_y))
        expected = score / scale if scale else math.nan
        assert kendall(x, y) == pytest.approx(expected, nan_ok=True)
    assert math.isnan(kendall(np.ones(4), np.arange(4.0)))


def test_agreement_counts_pairs_of_answers_to_one_prompt() -> None:
    first = results([[(3.0, True), (2.0, False), (1.0, False)], [(1.0, True), (1.0, False)]])
    second = first.with_rewards(np.array([3.0, 1.0, 2.0, 2.0, 1.0]))
    assert same_order(first, second) == (2 / 4, 4)  # two of three, and a tie is an order of its own
    assert same_order(first, first) == (1.0, 4)


def test_length_control_takes_off_what_tokens_are_worth_and_not_what_being_right_is() -> None:
    groups, tokens = [], []
    for row in range(200):
        length = [int(each) for each in RANDOM.integers(10, 200, 2)]
        length[0] += 60 * (row % 3 > 0)  # right answers are longer here
        groups.append([(row + 0.5 + 0.02 * length[0], True), (row + 0.02 * length[1], False)])
        tokens += length
    found = results(groups, tokens)
    assert slope_of(found) == pytest.approx(0.02)
    control = length_control(found, measure_pairs)
    assert control is not None
    assert measure_pairs(found).values()[OVERALL] < 0.9
    assert control.score == 1.0, "without length every right answer is 0.5 above"
    assert control.longer == 1.0
    assert control.shorter < 0.5
    assert control.rows_longer + control.rows_shorter <= 200
    assert length_control(pairs(np.ones(5)), measure_pairs) is None, "all are of one length"


def test_calibration_is_the_share_that_is_right_beside_the_sigmoid() -> None:
    margins = np.array([1.0] * 30 + [-1.0] * 10 + [3.0] * 38 + [-3.0, 0.0])
    found = calibration(margins)
    assert found is not None
    assert found.pairs == 80
    sigmoid = [1 / (1 + math.exp(-size)) for size in (0, 1, 3)]
    # Bins of 20 pairs by size: the tie and 19 of margin 1, ...
    assert found.margins[0] == pytest.approx(19 / 20)
    assert found.expected[0] == pytest.approx((sigmoid[0] + 19 * sigmoid[1]) / 20)
    assert found.right[-1] == pytest.approx(19 / 20)
    assert len(found.margins) == 4
    error = sum(abs(e - r) for e, r in zip(found.expected, found.right, strict=True)) / 4
    assert found.error == pytest.approx(error)
    assert found.log_loss == pytest.approx(np.mean([math.log1p(math.exp(-margin)) for margin in margins]))
    assert calibration(np.zeros(0)) is None


def test_margins_are_of_every_right_answer_with_every_wrong_one() -> None:
    found = results([[(3.0, True), (2.0, False), (1.0, True)], [(1.0, False), (5.0, True)], [(1.0, True), (2.0, True)]])
    assert sorted(margins_of(found).tolist()) == [-1.0, 1.0, 4.0]


def test_rows_can_be_left_out() -> None:
    found = replace(results([[(1.0, True), (0.0, False)], [(5.0, True)], [(0.0, True), (2.0, False)]]))
    kept = found.only(np.array([True, False, True]))
    assert kept.rewards.tolist() == [1.0, 0.0, 0.0, 2.0]
    assert kept.starts.tolist() == [0, 2, 4]
    assert (kept.ids, kept.positions.tolist()) == (["0", "2"], [1, 3])
    assert measure_pairs(kept).values() == {OVERALL: 0.5}
    assert Key("overall", "") == OVERALL
