"""`rewardrt bench`: what it compares and counts. Nothing here asserts how long something took."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from commands import run
from conftest import ROOT
from rewardrt import RewardModel, RewardRTError
from rewardrt.bundle.manifest import read_bundle
from rewardrt.checks.bench import list_candidates, model_command
from rewardrt.checks.workers import Worker
from rewardrt.checks.workload import Workload, compare, texts_of_length
from rewardrt.errors import WorkerError
from rewardrt.text.rows import parse_row
from rewardrt.text.tokens import EncodedText

ANSWERS = ROOT / "examples" / "answers.jsonl"
ROWS = [
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt": "a", "responses": ["b", "c", "d"]},
    {"text": "alone"},
]


def workload() -> Workload:
    rows = tuple(parse_row(row) for row in ROWS)
    ids = np.arange(5, dtype=np.int64)
    return Workload("rows", rows, tuple(EncodedText(ids + text, 0, ids[-1:]) for text in range(6)))


def test_agreement_is_over_the_pairs_of_answers_of_each_row_and_rms_over_all_texts() -> None:
    reference = [[1.0], [0.0], [1.0], [2.0], [2.0], [9.0]]  # of four pairs of answers, one is a tie
    outputs = [[0.0], [1.0], [1.0], [2.5], [2.0], [9.0]]
    found = compare(workload(), outputs, reference)
    assert (found.preferences, found.agreement) == (3, 2 / 3)
    assert found.rms_std == pytest.approx(np.sqrt((1 + 1 + 0.25) / 6) / np.std([1, 0, 1, 2, 2, 9]))
    assert compare(workload(), reference, reference).rms_std == 0


def test_a_reward_that_ties_where_the_reference_does_not_is_no_agreement() -> None:
    reference = [[1.0], [0.0], [1.0], [2.0], [3.0], [9.0]]
    assert compare(workload(), [[0.0]] * 6, reference).agreement == 0


def test_single_texts_have_the_length_and_no_two_begin_alike(tiny_bundle: Path) -> None:
    spec = read_bundle(tiny_bundle).manifest.spec
    texts = list(itertools.islice(texts_of_length(workload(), spec, 70), 5))
    assert [(len(text.ids), text.needed) for text in texts] == [(70, 70)] * 5
    assert len({text.ids[:5].tobytes() for text in texts}) == 5


def test_a_worker_gives_the_rewards_of_the_model_in_this_process(tiny_bundle: Path) -> None:
    model = RewardModel.load(tiny_bundle, provider="cpu")
    rows = [json.loads(line) for line in ANSWERS.read_text().splitlines()]
    texts = model.answers.encode([item for row in rows for item in model.answers.parse(row).items])
    encoded = [text for text in texts if isinstance(text, EncodedText)]
    here = [values.tolist() for values in model.runner.run(encoded) if not isinstance(values, RewardRTError)]
    (_, options), *_ = list_candidates(read_bundle(tiny_bundle)).values()
    worker = Worker("fp32", model_command(tiny_bundle, options))
    try:
        assert worker.score(encoded).outputs == here
        assert worker.wait()["precision"] == "fp32"  # bounded: a worker that ends or answers is read
        with pytest.raises(WorkerError, match=r"fp32: .*expected"):
            worker.ask({"rows": [{"prompt": "no answer"}], "max_length": None})
        assert worker.score(encoded[:1]).outputs == here[:1]  # it is still there
    finally:
        worker.close()


def test_a_worker_that_cannot_load_its_model_says_why(tmp_path: Path) -> None:
    worker = Worker("none", model_command(tmp_path, {}))
    with pytest.raises(WorkerError, match=r"none: BundleError: .*is not a bundle"):
        worker.wait()  # bounded: as above
    worker.close()
    silent = Worker("silent", [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(WorkerError, match="silent: its process ended with exit status 3"):
        silent.ask({"memory": True})
    silent.close()


def test_the_command_measures_every_graph_and_writes_what_it_prints(tiny_bundle: Path, tmp_path: Path) -> None:
    result = run("bench", tiny_bundle, ANSWERS, "--rows", 4, "--rounds", 1, "--json", tmp_path / "out.json")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert [figures["name"] for figures in report["figures"]] == ["fp32"]
    assert (report["rows"], report["texts"]) == (4, 9)
    (fp32,) = report["figures"]
    assert (fp32["ratio"], fp32["fidelity"]) == (1.0, None)
    assert [length for length, _ in fp32["lengths"]] == [512, 1024, 2048]  # the model reads no more
    assert result.stdout.startswith(f"tiny on answers.jsonl: 4 rows, 9 texts, {report['tokens']} tokens; cpu, ")


def test_a_file_without_a_row_to_score_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "no answer"}\n')
    for name, said in (("bad.jsonl", "no row that this model can score"), ("none.jsonl", "cannot be read")):
        result = run("bench", tiny_bundle, tmp_path / name)
        assert (result.returncode, result.stdout) == (2, "")
        assert said in result.stderr.splitlines()[-1]
