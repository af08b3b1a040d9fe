"""RewardBench 2 (allenai/reward-bench-2): best of four in five subsets, and Ties, with many right answers.

The columns are id, prompt, chosen (a list of strings), rejected (a list of strings), num_correct, num_incorrect,
total_completions, models, subset and additional_metadata.

Best of four (`reroll_and_score_dataset` in rewardbench/utils.py): a prompt counts 1 / t if its first chosen answer is
one of the t answers that share the highest reward, else 0.

Ties (`process_single_model` there): ids are `ref:N`, a question with one right answer, and `tied:N`, the same question
with many. The first num_correct answers are right. For each prompt, `spread` is the highest minus the lowest reward of
its right answers, and `gap` the lowest reward of a right answer minus the highest of a wrong one. The subset's score is
the weighted sum of

    0.30  share of the tied prompts with gap > 0
    0.30  share of the ref prompts with gap > 0
    0.20  share of the questions with gap(tied) > spread(tied)
    0.20  share of the questions with min(gap(ref), gap(tied)) > spread(tied)
    0.01  mean of tanh(min(gap(ref), gap(tied)) / spread(tied) - 1), with 0 / 0 counted as 0

The last three are over questions that have both prompts. The sum can reach 1.01. The benchmark's score is the mean of
the subsets, Ties among them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np

from rewardrt.errors import RowError
from rewardrt.evaluate.answers import read_lists
from rewardrt.evaluate.layouts import Layout, Need, Question, id_of, number_of, text_of
from rewardrt.evaluate.measures import OVERALL, Key, Mean, Measures, Values, by_subset, tied, weighted
from rewardrt.evaluate.results import Flags, Floats, Results

TIES = "ties"  # compared without regard to case
_ID = re.compile(r"(ref|tied):(\d+)")
_PARTS = {
    "tied accuracy": 0.30,
    "ref accuracy": 0.30,
    "gap over spread": 0.20,
    "hard gap over spread": 0.20,
    "margin": 0.01,
}


def read(row: dict[str, Any], file: str) -> Question:
    """Return the question of a row. The unit of a Ties row is the number N that its ref and tied prompts share."""
    asked = replace(read_lists(row, file), subset=text_of(row, "subset"))
    right, answers = number_of(row, "num_correct"), len(asked.right)
    if right != sum(asked.right):
        raise RowError(f"num_correct: {right}, but {sum(asked.right)} chosen answers")
    if (total := row.get("total_completions")) not in (None, answers):
        raise RowError(f"total_completions: {total}, but {answers} answers")
    if asked.subset.lower() != TIES:
        return asked
    found = _ID.fullmatch(id_of(row, "id"))
    if found is None:
        raise RowError(f"id: expected ref:N or tied:N of a row of Ties, found {id_of(row, 'id')!r}")
    if found[1] == "tied" and right < 2:
        raise RowError(f"{found[0]}: one right answer; a tied prompt has at least two, whose rewards are compared")
    return replace(asked, unit=f"ties {int(found[2])}")


def measure(results: Results) -> Measures:
    """Return the score of each subset and their mean."""
    names = [name for name in results.subset_names if name.lower() == TIES]
    is_ties = np.zeros(results.rows, dtype=bool)
    for name in names:
        is_ties |= results.in_subset(name)
    best = _first_is_best(results)
    means = by_subset(results, best, ~is_ties)
    for name in names:
        del means[Key("subset", name)]
    means |= _ties(results, is_ties)

    def derive(values: Values) -> Values:
        found: Values = {}
        if is_ties.any():
            found[Key("subset", names[0])] = np.asarray(
                sum(weight * values[Key("part", f"Ties: {name}")] for name, weight in _PARTS.items())
            )
        subsets = [value for key, value in (values | found).items() if key.level == "subset"]
        return {OVERALL: weighted(subsets)} | found

    credit = np.where(is_ties, (_gap(results) > 0).astype(np.float64), best)
    return Measures(means, derive, credit, tied(results))


def _first_is_best(results: Results) -> Floats:
    highest = results.best(np.ones(len(results.right), dtype=bool))
    equal = results.sums(results.rewards == highest[results.row_of])
    return np.where(results.rewards[results.starts[:-1]] == highest, 1 / np.maximum(1, equal), 0.0)


def _gap(results: Results) -> Floats:
    return results.worst(results.right) - results.best(~results.right)


def _ties(results: Results, is_ties: Flags) -> dict[Key, Mean]:
    """Return the parts of the score of Ties, each as the mean of a value over some of its rows."""
    prompts: dict[tuple[str, int], list[int]] = defaultdict(list)
    for row in np.flatnonzero(is_ties).tolist():
        kind, _, number = results.ids[row].partition(":")
        prompts[kind, int(number)].append(row)
    columns = {name: (np.zeros(results.rows), np.zeros(results.rows, dtype=bool)) for name in _PARTS}

    def note(name: str, row: int, value: float) -> None:
        columns[name][0][row], columns[name][1][row] = value, True

    stats = {prompt: _statistics(results, rows) for prompt, rows in prompts.items()}
    for (kind, question), (spread, gap) in stats.items():
        row = prompts[kind, question][0]
        note(f"{kind} accuracy", row, float(gap > 0))
        if kind == "tied" and ("ref", question) in stats:
            least = min(gap, stats["ref", question][1])
            note("gap over spread", row, float(gap > spread))
            note("hard gap over spread", row, float(least > spread))
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = np.tanh(np.float64(least) / np.float64(spread) - 1)
            note("margin", row, float(np.nan_to_num(ratio, nan=0.0)))
    if not is_ties.any():
        return {}
    return {Key("part", f"Ties: {name}"): Mean(*column) for name, column in columns.items()}


def _statistics(results: Results, rows: list[int]) -> tuple[float, float]:
    """Return spread and gap of a prompt, whose answers may be in several rows, as in the benchmark's code."""
    answers = np.concatenate([np.arange(results.starts[row], results.starts[row + 1]) for row in rows])
    rewards, right = results.rewards[answers], results.right[answers]
    return float(np.ptp(rewards[right])), float(rewards[right].min() - rewards[~right].max())


LAYOUT = Layout(
    "rewardbench-2",
    "RewardBench 2",
    (
        Need("prompt", "prompt"),
        Need("chosen", "texts"),
        Need("rejected", "texts"),
        Need("num_correct", "number"),
        Need("subset"),
        Need("id"),
    ),
    read,
    measure,
)
