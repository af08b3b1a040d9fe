"""Models that compare answers: which texts they score for a row, and how these become rewards of its answers.

A comparison is how much better one answer is than another, in the model's own units; swapping the two only changes its
sign. A model that reads two answers in one text scores every ordered pair, and the comparison is half the difference
between the two orders. For a model that gives vectors, it is their skew product (see `skew_products`).

An answer's reward is the mean of its comparisons with all answers of the row, including 0 for itself. These are the
rewards whose differences fit the comparisons best, in least squares. For a row of two answers, the difference of the
rewards equals the comparison.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rewardrt.bundle.spec import Spec
from rewardrt.errors import RowError
from rewardrt.scoring.scored import Scored
from rewardrt.text.items import Conversation, Item, Pair, TokenIds, as_turns
from rewardrt.text.rows import Row

Matrix = npt.NDArray[np.float64]


def plan(row: Row, spec: Spec) -> Row:
    """Return the row with the texts that this model scores for it: unchanged, unless the model compares answers.

    Raises RowError if the model compares answers and the row has nothing to compare.
    """
    if spec.input != "pairwise":
        return row
    expected = "this model compares answers: expected two or more responses, or chosen and rejected"
    if row.kind == "single":
        raise RowError(f"{expected}; found one text")
    if len(row.items) < 2:
        raise RowError(f"{expected}; found one response")
    answers = [item for item in row.items if isinstance(item, Conversation)]
    if any(as_turns(answer.prompt) != as_turns(answers[0].prompt) for answer in answers):
        raise RowError(f"{expected} to one prompt; found chosen and rejected that answer different ones")
    if not spec.reads_two_answers:
        return dataclasses.replace(row, compare="vectors")
    pairs = [Pair(first, second) for i, first in enumerate(answers) for j, second in enumerate(answers) if i != j]
    return Row(row.kind, tuple(pairs), "texts")


def text_of(row: Row) -> Item:
    """Return the one text of a row of a golden file; two responses are one pair, in their order."""
    if row.kind == "ranking" and len(row.items) == 2:
        first, second = row.items
        if isinstance(first, Conversation) and isinstance(second, Conversation):
            return Pair(first, second)
    item = row.items[0]
    assert not isinstance(item, TokenIds)  # rows of files have no token ids
    return item


def settle(row: Row, scores: Sequence[Scored]) -> list[Scored]:
    """Return one score for each answer of a planned row, from the scores of its items in order.

    If the items are pairs, an answer's tokens are those of all texts in which it comes first.
    """
    if not row.compare:
        return list(scores)
    if row.compare == "vectors":
        matrix = skew_products([(score.reward, *score.objectives) for score in scores])
        counts = [(score.tokens, score.truncated) for score in scores]
    else:
        matrix = half_differences(row.pairs, [score.reward for score in scores])
        counts = [
            (
                sum(score.tokens for score, (first, _) in zip(scores, row.pairs, strict=True) if first == answer),
                sum(score.truncated for score, (first, _) in zip(scores, row.pairs, strict=True) if first == answer),
            )
            for answer in range(len(matrix))
        ]
    return [
        Scored(float(np.float32(line.mean())), tokens, truncated, comparisons=tuple(line.astype(np.float32).tolist()))
        for line, (tokens, truncated) in zip(matrix, counts, strict=True)
    ]


def half_differences(pairs: Sequence[tuple[int, int]], rewards: Sequence[float]) -> Matrix:
    """Return the comparisons, [answers, answers] float64, from the reward of every ordered pair."""
    answers = 1 + max(first for first, _ in pairs)
    found = np.zeros((answers, answers))
    found[tuple(np.array(pairs).T)] = rewards
    return (found - found.T) / 2 + 0.0  # + 0.0 turns -0.0 into 0.0


def skew_products(vectors: Sequence[Sequence[float]]) -> Matrix:
    """Return the comparisons of vectors, [answers, answers] float64: sum(u[2k] * v[2k+1] - u[2k+1] * v[2k])."""
    values = np.array(vectors, dtype=np.float64)
    even, odd = values[:, 0::2], values[:, 1::2]
    terms = even[:, None] * odd[None] - odd[:, None] * even[None]  # [answers, answers, half]
    matrix: Matrix = np.sum(terms, axis=-1) + 0.0
    return matrix
