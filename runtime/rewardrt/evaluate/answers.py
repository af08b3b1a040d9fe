"""Files of no particular benchmark: pairs, and prompts with several answers of which some are right."""

from __future__ import annotations

from typing import Any

import numpy as np

from rewardrt.errors import RowError
from rewardrt.evaluate.layouts import Layout, Need, Question, id_of, prompt_of, texts_of, unit_of
from rewardrt.evaluate.measures import Key, Mean, Measures, above, by_subset, nothing, of_all, shared, tied
from rewardrt.evaluate.results import Results
from rewardrt.text.rows import INPUT_FIELDS

FLAGS = "expected a list of true and false, one for each of responses, or the index of the right one"


def read_pair(row: dict[str, Any], file: str) -> Question:
    """Return the question of a row with `chosen` and `rejected`; the field `subset`, if present, names its subset."""
    prompt = prompt_of(row) if row.get("prompt") is not None or row.get("messages") is not None else {}
    asked = _others(row) | prompt | {"chosen": row.get("chosen"), "rejected": row.get("rejected")}
    unit = unit_of(next(iter(prompt.values()), None) or _before_last(row.get("chosen")))
    subset = row.get("subset")
    return Question(asked, (True, False), subset if isinstance(subset, str) else "", id_of(row, "id"), unit)


def _others(row: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that are neither prompt nor answers; those that change the text are rendered or refused."""
    return {name: value for name, value in row.items() if name not in INPUT_FIELDS}


def _before_last(turns: object) -> object:
    return turns[:-1] if isinstance(turns, list) else turns


def read_lists(row: dict[str, Any], file: str) -> Question:
    """Return the question of a row whose `chosen` and `rejected` are lists of answers to one prompt."""
    right, wrong, prompt = texts_of(row, "chosen"), texts_of(row, "rejected"), prompt_of(row)
    if not right or not wrong:
        raise RowError(f"{len(right)} chosen and {len(wrong)} rejected: expected at least one of each")
    subset = row.get("subset")
    return Question(
        _others(row) | prompt | {"responses": right + wrong},
        (True,) * len(right) + (False,) * len(wrong),
        subset if isinstance(subset, str) else "",
        id_of(row, "id"),
        unit_of(next(iter(prompt.values()))),
    )


def read_best(row: dict[str, Any], file: str) -> Question:
    """Return the question of a row with `responses` and `correct`."""
    answers, prompt, flags = texts_of(row, "responses"), prompt_of(row), row.get("correct")
    if len(answers) < 2:
        raise RowError(f"responses: {len(answers)} answer; a group needs at least two to be compared")
    if isinstance(flags, int) and not isinstance(flags, bool):
        if not 0 <= flags < len(answers):
            raise RowError(f"correct: {flags}; {FLAGS}")
        flags = [index == flags for index in range(len(answers))]
    if not isinstance(flags, list | tuple) or len(flags) != len(answers) or any(flag not in (0, 1) for flag in flags):
        found = f"{len(flags)} values for {len(answers)} answers" if isinstance(flags, list) else type(flags).__name__
        raise RowError(f"correct: {FLAGS}; found {found}")
    subset = row.get("subset")
    return Question(
        _others(row) | prompt | {"responses": answers},
        tuple(bool(flag) for flag in flags),
        subset if isinstance(subset, str) else "",
        id_of(row, "id"),
        unit_of(next(iter(prompt.values()))),
    )


def measure_pairs(results: Results) -> Measures:
    """Return the share of pairs whose chosen answer has the higher reward; equal rewards count as wrong.

    RewardBench counts the same way (`rewardbench/rewardbench.py` and `scripts/run_rm.py`: `chosen > rejected`).
    """
    credit = above(results)
    return Measures(of_all(credit) | by_subset(results, credit), nothing, credit, tied(results))


def measure_best(results: Results) -> Measures:
    """Return how often the answer with the highest reward is right, over prompts with right and wrong answers.

    If t answers share the highest reward and c of them are right, the credit is c / t, the expected result of picking
    one of them. The parts are computed over all prompts, including those with only right or only wrong answers: how
    often the picked answer is right (best of n), how often a randomly drawn one is, and how often any answer is.
    """
    picked, every = shared(results), np.ones(results.rows, dtype=bool)
    share = results.sums(results.right) / np.maximum(1, np.diff(results.starts))
    credit = np.where(results.mixed, picked, np.nan)
    parts = {
        Key("part", "right when the best is taken, of all prompts"): Mean(picked, every),
        Key("part", "right when one is drawn blindly"): Mean(share, every),
        Key("part", "right when the best were known"): Mean((share > 0).astype(np.float64), every),
    }
    return Measures(of_all(credit) | by_subset(results, credit) | parts, nothing, credit, tied(results))


PAIRS = Layout("pairs", "Pairs", (Need("chosen", "prompt"), Need("rejected", "prompt")), read_pair, measure_pairs)
LISTS = Layout(
    "chosen-rejected-lists",
    "Lists of chosen and rejected",
    (Need("prompt", "prompt"), Need("chosen", "texts"), Need("rejected", "texts")),
    read_lists,
    measure_best,
)
BEST_OF_N = Layout(
    "best-of-n",
    "Best of n",
    (Need("responses", "texts"), Need("correct", "right")),
    read_best,
    measure_best,
    needs_one_of=(Need("prompt", "prompt"), Need("messages", "turns")),
)
