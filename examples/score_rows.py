"""Score the rows of a JSONL file in Python, and print each row with its rewards.

    python examples/score_rows.py BUNDLE ROWS.jsonl

Each line of the output is a row with the added list `rewards`: one reward for a row with one answer, one for each of
several answers, or those of chosen and rejected. docs/scoring.md says what a row may look like.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rewardrt import RewardModel, RewardRTError, Scored, ScoredAnswers, ScoredPair


def rewards_of(result: Scored | ScoredAnswers | ScoredPair) -> list[float]:
    """Return the rewards of a row, whatever its shape."""
    if isinstance(result, ScoredPair):
        return [result.chosen.reward, result.rejected.reward]
    if isinstance(result, ScoredAnswers):
        return list(result.rewards)
    return [result.reward]


def main(bundle: str, path: str) -> None:
    """Score all rows in one call, which batches their texts and computes shared prefixes once."""
    model = RewardModel.load(bundle)
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    for row, result in zip(rows, model.score_rows(rows), strict=True):
        if isinstance(result, RewardRTError):  # only this row failed; the others have rewards
            print(json.dumps({**row, "error": str(result)}))
        else:
            print(json.dumps({**row, "rewards": rewards_of(result)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
