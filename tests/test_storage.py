"""Weights in two bytes: half the file, and the float32 graph's own bits where the checkpoint has that type."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import run
from rewardrt import RewardModel
from rewardrt.bundle.manifest import Bundle, read_bundle
from rewardrt.checks.verify import verify
from rewardrt.errors import BundleError, ExportError
from rewardrt_export.pipeline import export
from rewardrt_export.precisions.storage import _rounded

TINY = Path(__file__).parent.parent / "models" / "tiny"
ROWS = [{"prompt": f"How many are {count}?", "response": "Count them. " * count} for count in range(1, 13)]


def checkpoint(folder: Path, dtype: torch.dtype) -> Path:
    """models/tiny with all its weights in another type."""
    shutil.copytree(TINY, folder)
    weights = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}))
    return folder


def score(bundle: Path, precision: str) -> np.ndarray:
    return RewardModel.load(bundle, provider="cpu", precision=precision).score_many(ROWS)


@pytest.mark.parametrize(("kind", "dtype"), [("weights-bf16", torch.bfloat16), ("weights-fp16", torch.float16)])
def test_a_checkpoint_of_the_same_type_gives_the_same_bits_from_half_the_file(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    made = export(checkpoint(tmp_path / "rm", dtype), tmp_path / "bundle", precisions=("fp32", kind))
    whole, small = score(made.path, "fp32"), score(made.path, kind)
    assert len(set(whole.tolist())) == 12
    assert small.tobytes() == whole.tobytes()
    sizes = [(made.path / variant.data[0]).stat().st_size for variant in made.manifest.variants]
    assert 0.5 <= sizes[1] / sizes[0] < 0.51
    fidelity = made.certificate(kind).fidelity  # type: ignore[union-attr]
    assert fidelity is not None and fidelity.rms_std < 1e-5 < fidelity.bf16_rms_std


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """models/tiny, whose weights are float32; by an old name and a new one."""
    return export(TINY, tmp_path_factory.mktemp("rounded") / "bundle", precisions=("bf16", "weights-fp16"))


def test_a_float32_checkpoint_is_rounded_and_the_certificate_says_how_far(rounded: Bundle) -> None:
    near = [rounded.certificate(kind).fidelity for kind in ("weights-bf16", "weights-fp16")]  # type: ignore[union-attr]
    assert near[0] is not None and near[1] is not None
    assert 1e-5 < near[1].rms_std < near[0].rms_std < 0.05


def test_only_the_rows_that_are_looked_up_become_float32_of_an_embedding(rounded: Bundle) -> None:
    weight = ir.load(rounded.path / "model.weights-bf16.onnx").graph.initializers["backbone.embed_tokens.weight.bf16"]
    ((gather, index),) = weight.uses()
    assert (gather.op_type, index) == ("Gather", 0)
    assert [node.op_type for node, _ in gather.outputs[0].uses()] == ["Cast"]


def test_a_weight_that_float16_cannot_hold_is_refused() -> None:
    with pytest.raises(ExportError, match=r"^w: holds values that float16 cannot; export it with another precision$"):
        _rounded(ir.tensor(np.array([[1e5]], np.float32), name="w"), ir.DataType.FLOAT16)


@pytest.fixture(scope="module")
def yesterday(rounded: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as an earlier version wrote it, by the old names."""
    folder = tmp_path_factory.mktemp("yesterday") / "bundle"
    shutil.copytree(rounded.path, folder)
    text = (folder / "reward.json").read_text(encoding="utf-8")
    (folder / "reward.json").write_text(text.replace('"precision": "weights-', '"precision": "'), encoding="utf-8")
    return folder


def test_an_old_name_exports_what_the_new_one_does(rounded: Bundle) -> None:
    written = json.loads((rounded.path / "reward.json").read_text())
    assert [item["precision"] for item in written["variants"]] == ["weights-bf16", "weights-fp16"]
    assert [item["precision"] for item in written["certificates"]] == ["weights-bf16", "weights-fp16"]
    assert [item["graph"] for item in written["variants"]] == ["model.weights-bf16.onnx", "model.weights-fp16.onnx"]


@pytest.mark.parametrize("asked", ["fp16", "weights-fp16"])
def test_both_names_are_taken_of_a_bundle_of_today_and_of_before(asked: str, rounded: Bundle, yesterday: Path) -> None:
    assert '"precision": "fp16"' in (yesterday / "reward.json").read_text()
    rewards = []
    for path in (rounded.path, yesterday):
        model = RewardModel.load(path, provider="cpu", precision=asked)
        assert model.precision == "weights-fp16"
        rewards.append(model.score_many(ROWS).tobytes())
        found = verify(model)
        assert found.passed and (found.precision, found.tolerance_std) == ("weights-fp16", 0.5)
        bundle = read_bundle(path)
        assert bundle.certificate(asked) == bundle.manifest.certificates[1]
    assert rewards[0] == rewards[1]


def test_commands_take_both_names(yesterday: Path) -> None:
    for name in ("bf16", "weights-bf16"):
        assert "weights-bf16 on cpu" in run("verify", yesterday, "--precision", name, "--provider", "cpu").stdout
    assert "certified  weights-fp16" in run("inspect", yesterday).stdout


def test_a_graph_that_is_not_there_is_refused_by_the_name_that_was_asked_for(rounded: Bundle) -> None:
    with pytest.raises(BundleError, match=r"no half graph; the bundle has weights-bf16, weights-fp16$"):
        rounded.variant("half")
