"""ProcessBench with a process reward model, against an independent script with the rewards of its steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints_process import write_qwen_prm
from rewardrt import RewardModel
from rewardrt.evaluate.measures import OVERALL
from rewardrt.evaluate.sources import Options
from rewardrt_export.pipeline import export
from saying_model import by_hand, numbers, score
from texts import make_texts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> RewardModel:
    folder = tmp_path_factory.mktemp("prm")
    write_qwen_prm(folder / "rm")
    export(folder / "rm", folder / "bundle")
    return RewardModel.load(folder / "bundle", provider="cpu")


def test_processbench_is_what_its_own_code_makes_of_the_step_rewards(tmp_path: Path, model: RewardModel) -> None:
    rows: list[dict[str, Any]] = []
    for at in range(40):
        problem, *steps = make_texts(4, longest=8, seed=500 + at)
        name = f"{('gsm8k', 'olympiadbench')[at % 2]}-{at}"
        rows.append(
            {"id": name, "generator": "g", "problem": f"{problem}?", "steps": [f"{step}." for step in steps],
             "final_answer_correct": True, "label": at // 2 % 4 - 1}
        )  # fmt: skip
    rows.append(rows[0] | {"id": "gsm8k-99", "steps": ["a", ""]})  # fails
    for subset in ("gsm8k", "olympiadbench"):
        of = [row for row in rows if row["id"].startswith(subset)]
        (tmp_path / f"{subset}.json").write_text(json.dumps(of, indent=2))
    rewards = [model.score_rows([{"prompt": row["problem"], "steps": row["steps"]}])[0] for row in rows[:-1]]
    steps = [getattr(each, "steps", ()) for each in rewards]
    threshold = float(np.median([reward for each in steps for reward in each]))
    options = Options(threshold=threshold)
    files = (tmp_path / "gsm8k.json", tmp_path / "olympiadbench.json")
    found = by_hand(model, *files, options=options)
    f1 = {}
    for subset in ("gsm8k", "olympiadbench"):
        matches: dict[bool, list[bool]] = {True: [], False: []}
        for row, each in zip(rows, steps, strict=False):
            if row["id"].startswith(subset):
                prediction = next((index for index, reward in enumerate(each) if reward < threshold), -1)
                matches[row["label"] == -1].append(prediction == row["label"])
        correct, error = (float(np.mean(matches[kind])) for kind in (True, False))
        assert correct + error > 0
        f1[subset] = 2 * correct * error / (correct + error)
        assert numbers(found)[f"{subset}: error accuracy"] == error
        assert numbers(found)[f"{subset}: correct accuracy"] == correct
    assert {name: numbers(found)[name] for name in f1} == pytest.approx(f1)
    assert found.score.value == pytest.approx(np.mean(list(f1.values())))
    assert (found.rows, found.failed) == (41, 1)
    assert OVERALL == ("overall", "")
    scores = score(model, *files, options=options)
    assert scores.results.rewards.tolist() == [
        reward for order in (0, 1) for each in steps[order::2] for reward in each
    ], "the rewards are those of score_rows, bit for bit"
