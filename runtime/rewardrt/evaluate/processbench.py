"""ProcessBench (Qwen/ProcessBench): find the first wrong step in solutions of maths problems.

A row has id (`gsm8k-0`), generator, problem, steps, final_answer_correct and label: the index of the first wrong step,
or -1 if there is none. A file contains one of four subsets, named by the beginning of its ids.

The prediction is the first step whose reward is below a threshold, or -1 if there is none. In
code/run_eval_prm_rlhflow.py a step counts as wrong if it is not labelled `+`, which is a probability below 0.5. For
each subset (code/run_eval.py), error accuracy is the share of solutions with a wrong step whose prediction equals the
label, and correct accuracy is the same for solutions without a wrong step. F1 is their harmonic mean, taken as 0 if
both are 0. The score is the mean of the subsets' F1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rewardrt.errors import RowError
from rewardrt.evaluate.layouts import Layout, Need, Question, id_of, number_of, text_of, texts_of, unit_of
from rewardrt.evaluate.measures import OVERALL, Key, Mean, Measures, Values, weighted
from rewardrt.evaluate.results import Floats, Ints, Results


def read(row: dict[str, Any], file: str) -> Question:
    """Return the question of a row: its problem and steps."""
    problem, steps, label = text_of(row, "problem"), texts_of(row, "steps"), number_of(row, "label")
    if not -1 <= label < len(steps):
        raise RowError(f"label: {label}; expected the index of one of {len(steps)} steps, or -1")
    name = id_of(row, "id")
    subset = name.rpartition("-")[0] or file
    return Question({"prompt": problem, "steps": steps}, (), subset, name, unit_of(problem), label)


def predicted(results: Results) -> Ints:
    """Return the index of each row's first step with a reward below the threshold, [n] int64; -1 if there is none."""
    below = results.rewards < results.threshold
    place = np.arange(len(below)) - results.starts[:-1][results.row_of]
    first = results.worst(np.ones(0, dtype=bool)) if not len(below) else np.minimum.reduceat(
        np.where(below, place, np.iinfo(np.int64).max), results.starts[:-1]
    )  # fmt: skip
    return np.where(first == np.iinfo(np.int64).max, -1, first).astype(np.int64)


def measure(results: Results) -> Measures:
    """Return F1 of each subset, the two accuracies behind it, and the mean of F1."""
    credit = (predicted(results) == results.labels).astype(np.float64)
    wrong, names = results.labels >= 0, sorted(results.subset_names)
    means = {
        Key("part", f"{name}: {kind}"): Mean(credit, results.in_subset(name) & where)
        for name in names
        for kind, where in (("error accuracy", wrong), ("correct accuracy", ~wrong))
    }

    def derive(values: Values) -> Values:
        found = {
            Key("subset", name): f1(
                values[Key("part", f"{name}: error accuracy")], values[Key("part", f"{name}: correct accuracy")]
            )
            for name in names
        }
        return {OVERALL: weighted(list(found.values()))} | found

    return Measures(means, derive, credit, np.zeros(results.rows, dtype=bool))


def f1(error: Floats, correct: Floats) -> Floats:
    """Return the harmonic mean; 0 if both are 0, NaN if one is NaN."""
    total = error + correct
    return np.asarray(np.where(total == 0, 0.0, 2 * error * correct / np.where(total == 0, 1.0, total)))


LAYOUT = Layout(
    "processbench",
    "ProcessBench",
    (Need("problem"), Need("steps", "texts"), Need("label", "number")),
    read,
    measure,
    asks_for="steps",
)
