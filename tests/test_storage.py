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

from rewardrt import RewardModel
from rewardrt.bundle.manifest import Bundle
from rewardrt.errors import ExportError
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


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
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
    """models/tiny, whose weights are float32."""
    return export(TINY, tmp_path_factory.mktemp("rounded") / "bundle", precisions=("bf16", "fp16"))


def test_a_float32_checkpoint_is_rounded_and_the_certificate_says_how_far(rounded: Bundle) -> None:
    near = [rounded.certificate(kind).fidelity for kind in ("bf16", "fp16")]  # type: ignore[union-attr]
    assert near[0] is not None and near[1] is not None
    assert 1e-5 < near[1].rms_std < near[0].rms_std < 0.05


def test_only_the_rows_that_are_looked_up_become_float32_of_an_embedding(rounded: Bundle) -> None:
    weight = ir.load(rounded.path / "model.bf16.onnx").graph.initializers["backbone.embed_tokens.weight.bf16"]
    ((gather, index),) = weight.uses()
    assert (gather.op_type, index) == ("Gather", 0)
    assert [node.op_type for node, _ in gather.outputs[0].uses()] == ["Cast"]


def test_a_weight_that_float16_cannot_hold_is_refused() -> None:
    with pytest.raises(ExportError, match=r"^w: holds values that fp16 cannot; export it with another precision$"):
        _rounded(ir.tensor(np.array([[1e5]], np.float32), name="w"), "fp16")
