"""`rewardrt normalize`: mean and std of one's own data, in a bundle that shares all other files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from commands import run
from rewardrt import BundleError, RewardModel, RewardRTError
from rewardrt.bundle.manifest import read_bundle
from rewardrt.checks.verify import verify
from rewardrt.data.inputs import find_inputs
from rewardrt.data.readers import RowReader
from rewardrt.evaluate.normalise import check, measure, write_normalised
from texts import make_texts

BUNDLE = Path(__file__).parent / "bundles" / "version-1"
PROMPTS, ANSWERS = make_texts(40, longest=12, seed=41), make_texts(160, longest=25, seed=42)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose checkpoint had no mean and std."""
    folder = tmp_path_factory.mktemp("bare") / "bundle"
    shutil.copytree(BUNDLE, folder)
    manifest = json.loads((folder / "reward.json").read_text())
    manifest["spec"]["normalise"] = None
    (folder / "reward.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of every shape, one of them too long."""
    rows: list[dict[str, Any]] = [{"prompt": PROMPTS[at], "response": ANSWERS[at]} for at in range(10)]
    rows += [{"prompt": PROMPTS[at], "chosen": ANSWERS[at], "rejected": ANSWERS[at + 20]} for at in range(10, 20)]
    rows += [{"prompt": PROMPTS[at], "responses": ANSWERS[3 * at : 3 * at + 3]} for at in range(20, 30)]
    rows += [{"text": " ".join(ANSWERS)}]
    path = tmp_path_factory.mktemp("data") / "reference.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rewards_of(model: RewardModel, path: Path) -> list[float]:
    """Return the raw reward of every text, one at a time."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answers = row.get("responses") or [row[name] for name in ("response", "chosen", "rejected") if name in row]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if "text" in row:
                found.append(model.score(text=row["text"], normalize=False))
            found += [model.score(prompt=row["prompt"], response=answer, normalize=False) for answer in answers]
    return found


def test_the_new_bundle_normalises_by_the_rewards_of_the_data(tmp_path: Path, bare: Path, data: Path) -> None:
    new = tmp_path / "new" / "bundle"
    arguments = ("--provider", "cpu", "--precision", "fp32")
    done = run("normalize", bare, data, "-o", new, *arguments)
    assert done.returncode == 0, done.stderr
    model = RewardModel.load(new, provider="cpu", precision="fp32")
    rewards = rewards_of(model, data)
    assert len(rewards) == 10 + 20 + 30 + 1
    mean, std = float(np.mean(rewards)), float(np.std(rewards, ddof=1))
    affine = model.spec.normalise
    assert affine is not None
    assert (affine.mean, affine.std, affine.eps) == (pytest.approx(mean, abs=1e-12), pytest.approx(std, abs=1e-12), 0.0)
    row = {"prompt": PROMPTS[0], "response": ANSWERS[0]}
    raw = model.score(**row)
    assert model.score(**row, normalize=True) == np.float32((raw - affine.mean) / affine.std)
    assert raw == rewards[0], "raw stays the default"
    origin = model.bundle.manifest.normalised_on
    assert origin is not None
    assert origin.files == {"reference.jsonl": hashlib.sha256(data.read_bytes()).hexdigest()}
    assert (origin.rows, origin.texts, origin.truncated) == (31, 61, 1)
    assert (origin.precision, origin.provider) == ("fp32", "cpu")
    assert f"{new}: (reward - {mean:g}) / {std:g}, of 61 rewards of 31 rows" in done.stdout
    assert "1 texts were cut at 512 tokens" in done.stderr
    assert verify(model).passed


def test_files_are_shared_and_the_old_bundle_stays_as_it_was(tmp_path: Path, bare: Path, data: Path) -> None:
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in bare.iterdir()}
    model = RewardModel.load(bare, provider="cpu", precision="fp32")
    measured = measure(model, RowReader(find_inputs([str(data)])))
    written, linked = write_normalised(model.bundle, measured, tmp_path / "new")
    assert linked
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in bare.iterdir()} == before
    for record in written.manifest.files:
        assert os.path.samefile(bare / record.path, tmp_path / "new" / record.path)
    old = read_bundle(bare).manifest
    assert written.manifest.certificates == old.certificates
    assert written.manifest.format_version == 2
    assert sorted(os.listdir(tmp_path)) == ["new"], "nothing unfinished is left"


def test_where_the_disk_has_no_links_files_are_copied(
    tmp_path: Path, bare: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    model = RewardModel.load(bare, provider="cpu", precision="fp32")
    measured = measure(model, RowReader(find_inputs([str(data)])))
    monkeypatch.setattr(os, "link", refuse)
    written, linked = write_normalised(model.bundle, measured, tmp_path / "new")
    assert not linked
    assert not any(
        os.path.samefile(bare / record.path, written.path / record.path) for record in written.manifest.files
    )
    assert verify(RewardModel.load(tmp_path / "new", provider="cpu", precision="fp32")).passed


def test_inspect_says_where_mean_and_std_come_from(tmp_path: Path, data: Path) -> None:
    done = run("normalize", BUNDLE, data, "-o", tmp_path / "new", "--provider", "cpu", "--precision", "fp32")
    assert "before: (reward - 0.5) / 2" in done.stderr, "the checkpoint had its own"
    lines = run("inspect", tmp_path / "new").stdout.splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith("  normalise  (reward - "))
    assert lines[at + 1].startswith("             measured of 61 rewards of 31 rows, 1 of them cut; fp32 on cpu, ")
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    assert lines[at + 2] == f"             reference.jsonl, SHA-256 {digest}"
    assert not any("measured" in line for line in run("inspect", BUNDLE).stdout.splitlines())


def test_rows_that_fail_are_left_out_and_said(tmp_path: Path, bare: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a", "response": answer} for answer in ANSWERS[:5]]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "a"}]))
    done = run("normalize", bare, path, "-o", tmp_path / "new", "--provider", "cpu", "--precision", "fp32")
    assert done.returncode == 1
    assert "1 rows could not be scored, and are left out; the first: expected text" in done.stderr
    origin = read_bundle(tmp_path / "new").manifest.normalised_on
    assert origin is not None
    assert (origin.rows, origin.texts) == (5, 5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "response": "b"}], "1 rewards; expected at least 2 to measure mean and std"),
        ([{"prompt": "a", "response": "b"}] * 3, "a std of 0 normalises nothing"),
        ([{"prompt": "a"}], "0 rewards; expected at least 2"),
    ],
)
def test_too_little_to_measure_is_refused(tmp_path: Path, bare: Path, rows: list[Any], message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = RewardModel.load(bare, provider="cpu", precision="fp32")
    with pytest.raises(RewardRTError, match=message):
        measure(model, RowReader(find_inputs([str(path)])))


def test_a_target_that_is_there_is_left_alone(tmp_path: Path, bare: Path, data: Path) -> None:
    (tmp_path / "new").mkdir()
    done = run("normalize", bare, data, "-o", tmp_path / "new")
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'new'}: exists already; choose another folder\n"
    assert list((tmp_path / "new").iterdir()) == []
    piped = run("normalize", bare, "-", "-o", tmp_path / "other")
    assert piped.stderr == "error: standard input: is read once, and its hash is kept; name a file\n"


def test_a_model_that_compares_answers_is_refused() -> None:
    model: Any = SimpleNamespace(spec=SimpleNamespace(input="pairwise"), bundle=SimpleNamespace(name="b"))
    with pytest.raises(RewardRTError, match="compares answers"):
        check(model)


def test_the_command_that_normalises_is_named_where_mean_and_std_are_missing(bare: Path) -> None:
    model = RewardModel.load(bare, provider="cpu", precision="fp32")
    with pytest.raises(RewardRTError, match="the bundle has no mean and std; `rewardrt normalize` measures them"):
        model.score(prompt="a", response="b", normalize=True)


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, bare: Path, data: Path) -> None:
    model = RewardModel.load(bare, provider="cpu", precision="fp32")
    measured = measure(model, RowReader(find_inputs([str(data)])))
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="cannot be written"):
        write_normalised(model.bundle, measured, tmp_path / "file" / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
