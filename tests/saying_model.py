"""A model whose reward of an answer, or of a step, is the number that it begins with: for numbers worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rewardrt.errors import RewardRTError, RowError
from rewardrt.evaluate.evaluation import Evaluation, evaluate
from rewardrt.evaluate.scoring import Scores, score_sources
from rewardrt.evaluate.sources import Options, find_sources
from rewardrt.evaluate.subject import Subject
from rewardrt.scoring.scored import Scored, ScoredAnswers, ScoredPair, ScoredRow

SUBJECT = Subject("saying", "saying", "none", 0, "saying", "fp32", "cpu", False, 512, (), None, True)


class SayingModel:
    """Answers are `1.5`, or `1.5 40` with 40 tokens, or `1.5 40 8` of which 8 were cut off; others fail.

    With `labels` it has two objectives: the reward, and what it lacks to 0.
    """

    def __init__(self, *, steps: bool = False, labels: tuple[str, ...] = ()) -> None:
        self.spec = SimpleNamespace(
            input="steps" if steps else "single", family="saying", output=SimpleNamespace(labels=labels)
        )
        self.bundle = SimpleNamespace(name="saying")
        self.answers = SimpleNamespace(prepare=list)

    def score_prepared(self, rows: Iterable[Any], *, normalize: bool | None = None) -> list[ScoredRow | RewardRTError]:
        return [row if isinstance(row, RewardRTError) else self._score(row) for row in rows]

    def _score(self, row: dict[str, Any]) -> ScoredRow | RewardRTError:
        try:
            if "steps" in row:
                return Scored(float("nan"), 10, 0, steps=tuple(float(step) for step in row["steps"]))
            if "responses" in row:
                return ScoredAnswers(tuple(map(_said, row["responses"])))
            return ScoredPair(_said(row["chosen"]), _said(row["rejected"]))
        except ValueError:
            return RowError("says no number")


def _said(answer: str) -> Scored:
    reward, tokens, cut = [*answer.split(), *["10", "0"]][:3] if " " not in answer else [*answer.split(), "0"][:3]
    return Scored(float(reward), int(tokens) - int(cut), int(cut), (float(reward), -float(reward)))


def score(model: Any, *files: Path, options: Options | None = None) -> Scores:
    options = options or Options()
    return score_sources(model, find_sources([str(file) for file in files], options), options)


def numbers(evaluation: Evaluation) -> dict[str, float | None]:
    """Return the numbers of an evaluation by their names, the score as ''."""
    return {number.name: number.value for number in evaluation.numbers}


def by_hand(model: Any, *files: Path, options: Options | None = None, by: str = "") -> Evaluation:
    subject = replace(SUBJECT, labels=model.spec.output.labels)
    return evaluate(score(model, *files, options=options), subject, by=by, resamples=100)


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
