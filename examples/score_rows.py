"""Score a JSONL file of rows in Python, and keep the rewards beside them.

    python examples/score_rows.py BUNDLE ROWS.jsonl

Each line of the output is the row with `rewards`, a list: of one answer, of several, or of chosen and rejected.
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
    """Score all rows in one call, which batches their texts and computes what they share once."""
    model = RewardModel.load(bundle)
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    for row, result in zip(rows, model.score_rows(rows), strict=True):
        if isinstance(result, RewardRTError):  # this row alone; the others have their rewards
            print(json.dumps({**row, "error": str(result)}))
        else:
            print(json.dumps({**row, "rewards": rewards_of(result)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
