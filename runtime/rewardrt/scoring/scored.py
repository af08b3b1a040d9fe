"""What became of texts and rows: their rewards, and a row with them added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

REWARD_FIELDS = (
    "step_rewards", "reward", "rewards", "best", "comparisons", "chosen_reward", "rejected_reward", "margin",
)  # fmt: skip
OUTPUT_FIELDS = (*REWARD_FIELDS, "tokens", "truncated", "objectives", "error")


@dataclass(frozen=True)
class Scored:
    """One text's float32 reward, the tokens that were scored, and how many were cut off before.

    `objectives` are the values under the spec's labels, for models that have several; of a vector to be compared, all
    but the first. `comparisons` say how much better the text is than each answer of its row, for models that compare.
    `steps` are the rewards of the steps, for models that give those; `reward` is then what they were aggregated to, NaN
    if they were not.
    """

    reward: float
    tokens: int
    truncated: int
    objectives: tuple[float, ...] = ()
    comparisons: tuple[float, ...] = ()
    steps: tuple[float, ...] = ()

    @property
    def answers(self) -> tuple[Scored, ...]:
        """This text alone, as a row of one."""
        return (self,)


@dataclass(frozen=True)
class ScoredPair:
    """A row with `chosen` and `rejected`."""

    chosen: Scored
    rejected: Scored

    @property
    def answers(self) -> tuple[Scored, ...]:
        """Both, chosen first."""
        return (self.chosen, self.rejected)

    @property
    def chosen_reward(self) -> float:
        """The reward of the chosen answer."""
        return self.chosen.reward

    @property
    def rejected_reward(self) -> float:
        """The reward of the rejected answer."""
        return self.rejected.reward

    @property
    def margin(self) -> float:
        """By how much the chosen one is above the rejected one; the difference of two float32 numbers, as float32."""
        return float(np.float32(self.chosen.reward) - np.float32(self.rejected.reward))


@dataclass(frozen=True)
class ScoredAnswers:
    """A row with `responses`: a score for each, in their order."""

    answers: tuple[Scored, ...]

    @property
    def rewards(self) -> tuple[float, ...]:
        """The reward of each response."""
        return tuple(answer.reward for answer in self.answers)

    @property
    def best(self) -> int:
        """The index of the highest reward; of equal ones the first."""
        return max(range(len(self.answers)), key=lambda index: self.answers[index].reward)


@dataclass(frozen=True)
class Ranked:
    """One answer of a ranking; `index` is its place in the list that was given.

    `comparisons` say how much better it is than each answer in the order given, for models that compare answers.
    """

    index: int
    response: str
    reward: float
    tokens: int
    truncated: int
    comparisons: tuple[float, ...] = ()


ScoredRow = Scored | ScoredPair | ScoredAnswers


def fill_row(row: dict[str, Any], scored: ScoredRow, labels: Sequence[str] = ()) -> dict[str, Any]:
    """Return the row with its scores added after its other fields.

    `labels` name the objectives; without them none are added.
    """
    return with_scores(row, scores_of(scored, labels))


def with_scores(row: dict[str, Any], scores: dict[str, Any]) -> dict[str, Any]:
    """Return the row with scores after its other fields, and without those of an earlier run."""
    # Steps that were not aggregated have no reward, and one of an earlier run is none of theirs.
    gone = {*scores, "error", *(["reward"] if "step_rewards" in scores else [])}
    return {name: value for name, value in row.items() if name not in gone} | scores


def scores_of(scored: ScoredRow, labels: Sequence[str] = ()) -> dict[str, Any]:
    """Return what scoring adds to a row, by the names of the row contract."""
    answers = scored.answers
    tokens, truncated = [answer.tokens for answer in answers], [answer.truncated for answer in answers]
    named = [dict(zip(labels, map(shortest, answer.objectives), strict=True)) if labels else {} for answer in answers]
    added: dict[str, Any]
    if isinstance(scored, Scored):
        added = {"reward": shortest(scored.reward), "tokens": tokens[0], "truncated": truncated[0]}
        if scored.steps:
            added = {"step_rewards": [shortest(reward) for reward in scored.steps]} | added
            if np.isnan(scored.reward):  # not aggregated
                del added["reward"]
        return added | ({"objectives": named[0]} if labels else {})
    if isinstance(scored, ScoredAnswers):
        added = {"rewards": [shortest(reward) for reward in scored.rewards], "best": scored.best}
        if answers[0].comparisons:
            added["comparisons"] = [[shortest(value) for value in answer.comparisons] for answer in answers]
    else:
        added = {
            "chosen_reward": shortest(scored.chosen_reward),
            "rejected_reward": shortest(scored.rejected_reward),
            "margin": shortest(scored.margin),
        }
    added |= {"tokens": tokens, "truncated": truncated}
    return added | ({"objectives": named} if labels else {})


def error_row(row: dict[str, Any], message: str) -> dict[str, Any]:
    """Return the row with `error` and without scores of an earlier run."""
    return {name: value for name, value in row.items() if name not in OUTPUT_FIELDS} | {"error": message}


def shortest(value: float) -> float:
    """Return the float whose decimal is the shortest one that is this float32."""
    return float(str(np.float32(value)))
