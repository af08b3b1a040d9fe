"""The results of scoring: the rewards of texts and rows, and a row with its rewards added."""

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
    """One text's reward (a float32 value), the number of tokens scored, and the number of tokens cut off before.

    `objectives` are the values under the spec's labels, for models with several objectives. For models that compare
    vectors they are all entries of the vector but the first, which is `reward`. `comparisons` say how much better the
    text is than each answer of its row, for models that compare answers. `steps` are the rewards of the steps, for
    models that reward steps; `reward` is then their aggregate, or NaN if they were not aggregated.
    """

    reward: float
    tokens: int
    truncated: int
    objectives: tuple[float, ...] = ()
    comparisons: tuple[float, ...] = ()
    steps: tuple[float, ...] = ()

    @property
    def answers(self) -> tuple[Scored, ...]:
        """This text alone, as the answers of a row of one."""
        return (self,)


@dataclass(frozen=True)
class ScoredPair:
    """The scores of a row with `chosen` and `rejected`."""

    chosen: Scored
    rejected: Scored

    @property
    def answers(self) -> tuple[Scored, ...]:
        """Both answers, chosen first."""
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
        """The reward of the chosen answer minus that of the rejected one, computed and rounded in float32."""
        return float(np.float32(self.chosen.reward) - np.float32(self.rejected.reward))


@dataclass(frozen=True)
class ScoredAnswers:
    """The scores of a row with `responses`, in their order."""

    answers: tuple[Scored, ...]

    @property
    def rewards(self) -> tuple[float, ...]:
        """The reward of each response."""
        return tuple(answer.reward for answer in self.answers)

    @property
    def best(self) -> int:
        """The index of the highest reward; the first of equal ones."""
        return max(range(len(self.answers)), key=lambda index: self.answers[index].reward)


@dataclass(frozen=True)
class Ranked:
    """One answer of a ranking; `index` is its position in the given list.

    `comparisons` say how much better it is than each answer, in the order given, for models that compare answers.
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

    `labels` name the objectives; without labels no objectives are added.
    """
    return with_scores(row, scores_of(scored, labels))


def with_scores(row: dict[str, Any], scores: dict[str, Any]) -> dict[str, Any]:
    """Return the row with scores added after its other fields, replacing those of an earlier run."""
    # A row whose steps were not aggregated has no `reward`, so one from an earlier run is removed too.
    gone = {*scores, "error", *(["reward"] if "step_rewards" in scores else [])}
    return {name: value for name, value in row.items() if name not in gone} | scores


def scores_of(scored: ScoredRow, labels: Sequence[str] = ()) -> dict[str, Any]:
    """Return the fields that scoring adds to a row, by the names of the row contract (`text.rows`)."""
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
    """Return the row with `error` added and scores of an earlier run removed."""
    return {name: value for name, value in row.items() if name not in OUTPUT_FIELDS} | {"error": message}


def shortest(value: float) -> float:
    """Return the float with the shortest decimal representation that rounds to this float32."""
    return float(str(np.float32(value)))
