"""What stands in examples/ runs, as its first lines say, and gives the rewards of the model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from rewardrt import RewardModel
from server_process import serving

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
BUNDLE = ROOT / "tests" / "bundles" / "version-1"
COLOUR = {"prompt": "Name a colour.", "response": "Blue."}
NUMBER = {"prompt": "Name a colour.", "response": "Seven"}


@pytest.fixture(scope="module")
def model() -> RewardModel:
    return RewardModel.load(BUNDLE)


def example(name: str, *arguments: object) -> list[str]:
    """Return the lines that an example prints."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_score_rows_gives_each_row_of_the_sample_file_its_rewards(model: RewardModel, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (EXAMPLES / "answers.jsonl").read_text().splitlines()]
    rows.append({"prompt": "no answer"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [json.loads(line) for line in example("score_rows.py", BUNDLE, tmp_path / "rows.jsonl")]
    assert [len(row.get("rewards", ())) for row in found] == [3, 3, 2, 1, 1, 0]
    assert "expected text, or messages" in found[-1]["error"]
    chosen, rejected = ({"prompt": rows[2]["prompt"], "response": rows[2][name]} for name in ("chosen", "rejected"))
    assert found[2]["rewards"] == [model.score(**chosen), model.score(**rejected)]


def test_best_of_n_prints_the_ranking_and_the_best(model: RewardModel) -> None:
    answers = ["Blue.", "Seven", "A colour is blue."]
    rewards = {answer: model.score(prompt="Name a colour.", response=answer) for answer in answers}
    lines = example("best_of_n.py", BUNDLE, "Name a colour.", *answers)
    assert lines[-1] == f"best: {max(answers, key=lambda answer: rewards[answer])}"
    assert [line.split(maxsplit=2)[2] for line in lines[:3]] == sorted(answers, key=lambda answer: -rewards[answer])


def test_a_trainers_reward_is_the_models_in_process_and_by_a_server(model: RewardModel) -> None:
    expected = model.score_many([COLOUR, NUMBER])
    (line,) = example("trainer_reward.py", BUNDLE)
    assert np.float32(json.loads(line)).tobytes() == expected.tobytes()
    with serving(BUNDLE) as running:
        (line,) = example("trainer_reward.py", running.url)
    assert np.float32(json.loads(line)).tobytes() == expected.tobytes()


def test_the_notebook_runs_and_is_stored_without_what_it_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the notebook's own libraries
        nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install 'rewardrt[dev]'")
        import nbformat

        notebook = nbformat.read(EXAMPLES / "first_look.ipynb", as_version=4)
        nbformat.validate(notebook)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert all(not cell.outputs and cell.execution_count is None for cell in cells)
        monkeypatch.setenv("REWARDRT_BUNDLE", str(BUNDLE))
        client = nbclient.NotebookClient(notebook, timeout=60, startup_timeout=60, kernel_name="python3")
        client.execute(cwd=str(EXAMPLES))
    printed = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    assert len(re.findall(r"^ *-?\d+\.\d{4}  \S", printed, re.MULTILINE)) == 3
    assert "expected text, or messages" in printed
