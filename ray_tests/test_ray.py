"""Jobs and pipelines on a real Ray of this machine: the rewards of one process, whoever computes them or dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

import rewardrt.ray
from rewardrt import RewardModel
from rewardrt.ray import Scorer

BUNDLE = Path(__file__).parent.parent / "tests" / "bundles" / "version-1"
pytestmark = pytest.mark.filterwarnings("default")  # Ray has some of its own
COMMAND = [sys.executable, "-c", "from rewardrt.cli.app import main; main()"]
ROWS = [{"id": index, "prompt": f"q{index // 4}", "response": "yes no maybe "[: index % 13]} for index in range(20_000)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def expected(rows: Path) -> bytes:
    score(rows, rows.parent / "one.jsonl")
    return (rows.parent / "one.jsonl").read_bytes()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    yield rewardrt.ray.start(None)
    ray.shutdown()


def score(rows: Path, target: Path, *options: object) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "score", str(BUNDLE), str(rows), "-o", str(target), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)


@pytest.mark.parametrize("actors", [1, 2])
def test_actors_write_the_bytes_of_one_process(rows: Path, expected: bytes, actors: int, tmp_path: Path) -> None:
    done = score(rows, tmp_path / "out.jsonl", "--actors", actors, "--ray")
    assert (tmp_path / "out.jsonl").read_bytes() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    assert done.stdout == ""
    ours = [line for line in done.stderr.splitlines() if not line.startswith("[")]  # Ray's core warns of every pool
    assert len(ours) == 2, done.stderr


def test_actors_read_the_files_that_the_command_found(rows: Path, tmp_path: Path) -> None:
    """And not what stands beside an output among its inputs."""
    lines = rows.read_bytes().splitlines(keepends=True)[:300]
    (tmp_path / "b.jsonl").write_bytes(b"".join(lines))
    (tmp_path / "a.jsonl.part").write_bytes(b"".join(lines[:50]))  # sorted first
    score(tmp_path, tmp_path / "a.jsonl", "--ray")
    assert [json.loads(line)["id"] for line in (tmp_path / "a.jsonl").read_bytes().splitlines()] == list(range(300))


def actor_processes() -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and b"MapWorker(MapBatches(PieceActor))" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_an_actor_that_is_killed_loses_nothing(rows: Path, expected: bytes, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill() -> None:
        parts = tmp_path / "out.jsonl.parts"
        while not list(parts.glob("part-*")):  # in the middle: one piece is there, others are not
            time.sleep(0.05)
        for process in actor_processes()[:1]:
            os.kill(process, signal.SIGKILL)
            killed.append(process)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    score(rows, tmp_path / "out.jsonl", "--actors", 2, "--ray")
    thread.join(1)
    assert len(killed) == 1
    assert (tmp_path / "out.jsonl").read_bytes() == expected


def test_a_job_that_is_interrupted_goes_on_with_the_pieces_that_are_there(
    rows: Path, expected: bytes, tmp_path: Path
) -> None:
    command = [*COMMAND, "score", str(BUNDLE), str(rows), "-o", str(tmp_path / "out.jsonl"), "--ray"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    parts = tmp_path / "out.jsonl.parts"
    while not list(parts.glob("_0*.json")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert f"rows are safe in {parts}; go on with: rewardrt score --resume " in said
    before = {path.name: path.stat().st_mtime_ns for path in parts.glob("part-*")}
    assert before
    score(rows, tmp_path / "out.jsonl", "--resume", "--ray")
    assert (tmp_path / "out.jsonl").read_bytes() == expected


@pytest.mark.parametrize("batch_format", ["pyarrow", "pandas", "numpy"])
def test_the_class_works_in_a_pipeline_of_ones_own(cluster: Any, batch_format: str) -> None:
    data = ray.data.from_arrow(pa.Table.from_pylist(ROWS[:1000]))
    scored = data.map_batches(
        Scorer, fn_constructor_kwargs={"bundle": str(BUNDLE)}, batch_size=256, batch_format=batch_format, concurrency=2
    )
    found = sorted(scored.take_all(), key=lambda row: int(row["id"]))
    model = RewardModel.load(BUNDLE, provider="cpu")
    rewards = model.score_many([{name: str(row[name]) for name in ("prompt", "response")} for row in ROWS[:1000]])
    assert np.array_equal(np.array([row["reward"] for row in found], np.float32), rewards)
    assert [row["id"] for row in found] == list(range(1000))
    assert all(row["error"] is None and row["tokens"] > 0 for row in found)


def test_no_name_is_asked_for_outside_and_nothing_is_connected_to(rows: Path, tmp_path: Path) -> None:
    """Ray asks the metadata services of clouds where it is, and reports its use: neither is done here."""
    few, report = tmp_path / "few.jsonl", tmp_path / "report.json"
    few.write_bytes(b"".join(rows.read_bytes().splitlines(keepends=True)[:500]))
    isolated = Path(__file__).parent.parent / "tests" / "isolated_network.py"
    command = [*COMMAND, "score", str(BUNDLE), str(few), "-o", str(tmp_path / "out.jsonl"), "--ray"]
    done = subprocess.run([sys.executable, isolated, report, *command], capture_output=True, check=False, timeout=300)
    if done.returncode == 77:  # NOT_PERMITTED
        pytest.skip("the system lets nobody make a network namespace")
    found = json.loads(report.read_bytes())
    assert found["status"] == 0
    assert found["names"] == []
    assert [each for each in found["connections"] if not each.startswith("tcp 127.")] == []
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
