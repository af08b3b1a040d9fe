"""JudgeBench (ScalerLab/JudgeBench): pairs of answers to hard questions, one of which is right.

A line has pair_id, original_id, source, question, response_model, response_A, response_B and label, `A>B` or `B>A`.

Reward models are judged in one order of the answers (`--single_game`; `compute_final_metrics` in utils/metrics.py). The
decision is `A>B` if A's reward is higher, else `B>A` (utils/judges.py), so a tie counts as B. A pair is right if the
decision equals the label. There is a score for each of the sources mmlu-pro, livebench-reasoning, livebench-math and
livecodebench, recognised by the beginning of `source`, and one for all pairs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rewardrt.errors import RowError
from rewardrt.evaluate.layouts import Layout, Need, Question, id_of, text_of, unit_of
from rewardrt.evaluate.measures import Measures, by_subset, nothing, of_all, tied
from rewardrt.evaluate.results import Results

SOURCES = ("mmlu-pro", "livebench-reasoning", "livebench-math", "livecodebench")
LABELS = frozenset(("A>B", "B>A"))


def read(row: dict[str, Any], file: str) -> Question:
    """Return the question of a row, with the answers A and B in this order."""
    question, source, label = text_of(row, "question"), text_of(row, "source"), text_of(row, "label")
    if label not in LABELS:
        raise RowError(f"label: expected A>B or B>A, found {label[:40]!r}")
    answers = [text_of(row, "response_A"), text_of(row, "response_B")]
    subset = next((each for each in SOURCES if source.startswith(each)), source)
    right = (label == "A>B", label == "B>A")
    return Question({"prompt": question, "responses": answers}, right, subset, id_of(row, "pair_id"), unit_of(question))


def measure(results: Results) -> Measures:
    """Return the share of the pairs whose decision equals the label."""
    rewards, right = results.rewards.reshape(-1, 2), results.right.reshape(-1, 2)
    credit = ((rewards[:, 0] > rewards[:, 1]) == right[:, 0]).astype(np.float64)
    return Measures(of_all(credit) | by_subset(results, credit), nothing, credit, tied(results))


LAYOUT = Layout(
    "judgebench",
    "JudgeBench",
    (Need("question"), Need("response_A"), Need("response_B"), Need("label", among=LABELS), Need("source")),
    read,
    measure,
)
