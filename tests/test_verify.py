"""`rewardrt verify`: passes on a copy, fails on a changed weight whatever the manifest says."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from commands import run
from rewardrt import RewardModel
from rewardrt.bundle.manifest import read_bundle
from rewardrt.checks.verify import verify


@pytest.fixture
def copied(tmp_path: Path, tiny_bundle: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copied"))


def fix_hash(folder: Path, name: str) -> None:
    manifest = json.loads((folder / "reward.json").read_text())
    (record,) = [record for record in manifest["files"] if record["path"] == name]
    data = (folder / name).read_bytes()
    record.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (folder / "reward.json").write_text(json.dumps(manifest))


def test_a_copied_bundle_passes(copied: Path) -> None:
    result = run("verify", copied, "--provider", "cpu")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == f"{copied}: 37 texts, fp32 on cpu, against torch at export"
    assert lines[-1] == "passed"


def test_verification_measures_what_the_certificate_says(copied: Path) -> None:
    certificate = read_bundle(copied).certificate("fp32")
    assert certificate is not None
    found = verify(RewardModel.load(copied, provider="cpu"))
    assert found.passed
    assert (found.texts, found.reward_std) == (certificate.texts, certificate.reward_std)
    assert (found.single, found.batched) == (certificate.single, certificate.batched)
    assert found.pair_order_agreement == 1.0
    assert 0 < found.single.max_std < 1e-4


def test_one_changed_weight_fails_although_its_hash_was_fixed_up(copied: Path) -> None:
    # The largest weight of the last quarter of the file, doubled: a single number among 1.8 million.
    weights = np.fromfile(copied / "model.onnx.data", dtype=np.float32)
    index = len(weights) * 3 // 4 + int(np.abs(weights[len(weights) * 3 // 4 :]).argmax())
    weights[index] *= 2
    weights.tofile(copied / "model.onnx.data")
    assert run("verify", copied).returncode == 2  # the hash alone tells
    fix_hash(copied, "model.onnx.data")
    result = run("verify", copied, "--json")
    assert result.returncode == 1
    found = json.loads(result.stdout)
    assert found["passed"] is False
    assert found["single"]["max_std"] > 1e-4
    assert "standard deviations of the reward; at most 0.0001 is allowed" in found["problems"][0]


def test_a_changed_tokenizer_fails_although_its_hash_was_fixed_up(copied: Path) -> None:
    data = json.loads((copied / "tokenizer.json").read_text())
    data["model"]["merges"] = data["model"]["merges"][: len(data["model"]["merges"]) // 2]
    (copied / "tokenizer.json").write_text(json.dumps(data))
    fix_hash(copied, "tokenizer.json")
    result = run("verify", copied)
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1].startswith("FAILED: other token ids than at export for golden texts ")


def test_a_golden_file_with_a_damaged_line_is_refused(copied: Path) -> None:
    with (copied / "golden.jsonl").open("a") as file:
        file.write("{}\n")
    fix_hash(copied, "golden.jsonl")
    result = run("verify", copied)
    assert result.returncode == 2
    assert "golden.jsonl, line 38: no field 'row'" in result.stderr
