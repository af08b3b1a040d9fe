"""The lines that other systems speak to the benchmark."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT
from rewardrt.checks.workers import Worker
from rewardrt.errors import WorkerError
from rewardrt.text.tokens import EncodedText

PEERS = ROOT / "benchmarks" / "peers"
SCRIPT = """
import sys
sys.path.insert(0, {peers!r})
from lines import serve

def batch(ids, mask):  # a reward that tells what the batch was
    print("libraries print too")
    return (ids * mask).sum(1) + 1000 * ids.shape[1] + 100 * ids.shape[0]

serve(lambda: ({{"versions": {{}}}}, batch), left={left}, pad=7)
"""


def texts() -> list[EncodedText]:
    return [EncodedText(np.arange(1, length + 1), 0, np.array([length - 1])) for length in (3, 1, 2)]


@pytest.mark.parametrize("left", [False, True])
def test_a_loop_pads_chunks_of_8_in_its_order_and_gives_rewards_in_the_files(left: bool) -> None:
    worker = Worker("peer", [sys.executable, "-c", SCRIPT.format(peers=str(PEERS), left=left)])
    try:
        chunk = [[3306.0], [3301.0], [3303.0]]
        assert worker.score(texts(), loop="file").outputs == worker.score(texts(), loop="sorted").outputs == chunk
        assert worker.score(texts(), loop="single").outputs == [[3106.0], [1101.0], [2103.0]]
        assert (worker.peak_bytes() or 1) > 0
        many = texts() * 3  # sorted, the first eight are at most 3 long; the ninth is alone
        assert [values[0] // 100 for values in worker.score(many, loop="sorted").outputs].count(31) == 1
    finally:
        worker.close()


def test_a_budget_is_of_padded_tokens_over_texts_of_similar_length(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("peers_lines", PEERS / "lines.py")
    assert spec is not None and spec.loader is not None
    lines = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lines)
    monkeypatch.setattr(lines, "BUDGET", 12)
    # 3 x 3 tokens, and no fourth of 4; 2 x 4, and no third of 5; what is over the budget is a batch of its own
    assert list(lines.chunks([5, 1, 4, 2, 20, 3, 4], "budget")) == [[1, 3, 5], [2, 6], [0], [4]]
    assert list(lines.chunks([], "budget")) == []


def test_ids_after_the_position_that_is_read_are_not_sent_to_the_model() -> None:
    worker = Worker("peer", [sys.executable, "-c", SCRIPT.format(peers=str(PEERS), left=False)])
    try:
        assert worker.score([EncodedText(np.array([5, 6, 9]), 0, np.array([1]))], loop="single").outputs == [[2111.0]]
    finally:
        worker.close()


def test_a_peer_that_cannot_load_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"pad_token_id": 3}))
    command = [sys.executable, str(PEERS / "optimum_onnx.py"), str(tmp_path), str(tmp_path / "fp32"), "fp32"]
    worker = Worker("optimum-onnx fp32", command)
    with pytest.raises(WorkerError, match=r"optimum-onnx fp32: \w+Error: "):
        worker.wait()  # bounded: a process that ends or answers
    worker.close()


def test_a_checkpoint_that_the_peers_cannot_load_is_refused(tmp_path: Path) -> None:
    code = "from checkpoint import convert; from pathlib import Path; convert(Path('.'), Path('out'), 3)"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    environment = {"PYTHONPATH": str(ROOT / "benchmarks")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ValueError: .: expected a llama with the value head `score`; the peers cannot load another"
    )
    assert not (tmp_path / "out").exists()
