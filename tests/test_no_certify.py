"""`export --no-certify`: no torch pass, and a bundle that scores, says that it is uncertified and cannot be verified."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import checkpoints_linear  # noqa: F401 - adds gpt2 to the backbones
from checkpoints import write_openrlhf
from checkpoints_encoders import write_encoder
from commands import run
from rewardrt import RewardModel
from rewardrt.checks.verify import verify
from rewardrt.errors import BundleError, CertificateError
from rewardrt.machine.processor import read_processor
from rewardrt.text.tokens import EncodedText
from rewardrt_export import pipeline
from rewardrt_export.certificate import certify, memory, reference
from rewardrt_export.certificate.certify import PROBES_BY_LAYER
from rewardrt_export.certificate.golden import MIN_TEXTS
from rewardrt_export.certificate.reference import score_with_torch
from rewardrt_export.checkpoint import read_checkpoint
from rewardrt_export.model import layer_by_layer
from rewardrt_export.model.backbone import bind, load, meta_backbone
from rewardrt_export.precisions.calibrate import Calibration
from rewardrt_export.source.folder import read_source
from rewardrt_export.source.weights import read_tensors

TINY = Path(__file__).parent.parent / "models" / "tiny"
GOOD = bool({"avx512_vnni", "avx_vnni", "dotprod"} & set(read_processor().instruction_sets or ()))
TEXT = {"prompt": "What is the capital of France?", "response": "Paris."}


def refuse(*arguments: object, **options: object) -> None:
    raise AssertionError("torch was asked for rewards")


@pytest.fixture(scope="module")
def uncertified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uncertified") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certify, "score_with_torch", refuse)
        patch.setattr(pipeline, "score_with_torch", refuse)
        patch.setattr(memory, "available_memory", lambda: 0)
        pipeline.export(TINY, folder, precisions=("fp32", "int8"), certified=False)
    return folder


def test_an_uncertified_bundle_scores_the_same_bits_as_a_certified_one(uncertified: Path, tiny_bundle: Path) -> None:
    ours = RewardModel.load(uncertified, provider="cpu", precision="fp32").score(**TEXT)
    assert ours == RewardModel.load(tiny_bundle, provider="cpu").score(**TEXT)


@pytest.mark.skipif(not GOOD, reason="this processor has no instructions for int8 products")
def test_int8_that_saw_no_texts_is_within_a_twentieth_of_a_standard_deviation(
    uncertified: Path, tiny_bundle: Path
) -> None:
    rows = [json.loads(line) for line in (tiny_bundle / "golden.jsonl").read_text().splitlines()]
    expected = np.array([row["rewards"][0] for row in rows if row["max_length"] is None])
    model = RewardModel.load(uncertified, provider="cpu", precision="int8")
    found = model.score_many([row["row"] for row in rows if row["max_length"] is None])
    assert np.sqrt(np.mean((found - expected) ** 2)) / expected.std() < 0.05


def test_an_uncertified_bundle_says_so(uncertified: Path) -> None:
    manifest = json.loads((uncertified / "reward.json").read_text())
    assert (manifest["uncertified"], manifest["certificates"]) == (True, [])
    assert not (uncertified / "golden.jsonl").exists()
    assert "  uncertified: never compared with torch (exported with --no-certify)" in run("inspect", uncertified).stdout


def test_verify_refuses_an_uncertified_bundle(uncertified: Path) -> None:
    with pytest.raises(BundleError, match="uncertified: exported with --no-certify, it has no rewards of torch"):
        verify(RewardModel.load(uncertified, provider="cpu", precision="fp32"))
    assert run("verify", uncertified, "--precision", "fp32").returncode == 2


def test_golden_texts_and_no_certificate_are_refused_together(tmp_path: Path) -> None:
    result = run("export", TINY, tmp_path / "bundle", "--no-certify", "--golden", tmp_path / "texts.jsonl")
    assert result.returncode == 2
    assert "--golden names texts to certify on; leave it or --no-certify out" in result.stderr


def test_a_model_that_torch_has_no_memory_for_is_refused_before_it_is_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1_000_000)
    steps: list[str] = []
    with pytest.raises(CertificateError, match=r"0\.0 GB are free; .* --no-certify") as error:
        pipeline.export(TINY, tmp_path / "bundle", progress=lambda step: steps.append(str(step)))
    assert "\n" not in str(error.value)
    assert steps == ["reading the checkpoint"]
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_only_torch_has_no_memory_for_is_certified_layer_by_layer(
    tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = sum(torch.Size(tensor.shape).numel() for tensor in read_tensors(TINY).values())
    monkeypatch.setattr(memory, "available_memory", lambda: 2 * parameters)  # int8 fits, float32 does not
    steps: list[str] = []
    made = pipeline.export(
        TINY, tmp_path / "bundle", precisions=("int8",), progress=lambda step: steps.append(str(step))
    )
    assert "scoring the golden texts with torch, layer by layer" in steps
    whole = {row["ids"]: row["rewards"] for row in golden_rows(tiny_bundle)}
    found = golden_rows(made.path)
    assert len(found) == MIN_TEXTS + PROBES_BY_LAYER
    assert all(whole[row["ids"]] == row["rewards"] for row in found)  # the same bits
    (certificate,) = made.manifest.certificates
    assert certificate.texts == MIN_TEXTS + PROBES_BY_LAYER
    assert certificate.reference.endswith("float32, eager attention, layer by layer")
    assert certificate.fidelity is not None
    assert certificate.fidelity.texts == MIN_TEXTS  # nothing was calibrated on any of them
    assert certificate.fidelity.rms_std < 0.05


def golden_rows(bundle: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (bundle / "golden.jsonl").read_text().splitlines()]
    return [row | {"ids": tuple(row["ids"])} for row in rows]


@pytest.mark.parametrize("model_type", ["bert", "deberta-v2"])
def test_layers_that_come_and_go_give_the_same_bits(tmp_path: Path, model_type: str) -> None:
    write_encoder(tmp_path, model_type)
    config = read_source(tmp_path).config
    models = [meta_backbone(config, "eager") for _ in range(2)]
    sources = bind(models[0], read_tensors(tmp_path)).sources
    ids = torch.arange(5, 25)[None]
    results = []
    for model, by_layer in zip(models, (False, True), strict=True):
        load(model, sources, torch.float32, by_layer=by_layer)
        with torch.inference_mode():
            results.append(model(ids).last_hidden_state)
    assert torch.equal(*results)
    there = [not parameter.is_meta for parameter in models[1].parameters()]
    assert 0 < sum(there) < len(there)  # embeddings stay, layers are gone again


# gpt2 has its weights transposed, mixtral's are of experts, bert's texts are read in both directions.
WRITERS = {"llama": write_openrlhf, "mixtral": write_openrlhf, "gpt2": write_openrlhf, "bert": write_encoder}


@pytest.mark.parametrize("model_type", WRITERS)
def test_calibration_layer_by_layer_sees_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """Inputs, gradients of inputs and squares of gradients of weights, for texts with and without gradients."""
    monkeypatch.setattr(reference, "LONGEST", 40)
    WRITERS[model_type](tmp_path / "checkpoint", model_type)
    checkpoint = read_checkpoint(tmp_path / "checkpoint")
    long = np.arange(5, 60)
    texts = [EncodedText(ids, 0, np.array([len(ids) - 1]), None) for ids in (np.arange(5, 25), long, np.arange(9, 40))]
    found, rewards = [], []
    for by_layer in (False, True):
        (folder := tmp_path / f"kept-{by_layer}").mkdir()
        found.append(Calibration(folder if by_layer else None))
        rewards.append(score_with_torch(checkpoint, texts, calibration=found[-1], by_layer=by_layer))
    whole, layers = found
    assert rewards[0] == rewards[1]
    assert (whole.texts, layers.texts) == (2, 2)
    assert set(whole.owners) == set(layers.owners) and set(whole.weights) == set(layers.weights)
    assert {whole.owner(name) == layers.owner(name) for name in whole.weights} == {True}
    for owner in whole.owners:
        one, other = whole.seen(owner), layers.seen(owner)
        assert torch.equal(one.activations, other.activations) and one.activations.any()
        assert torch.equal(one.gradients, other.gradients)
        assert [torch.equal(a.squares, b.squares) for a, b in zip(one.weights, other.weights, strict=True)] == [
            True for _ in one.weights
        ]
    assert any(whole.seen(owner).gradients.any() for owner in whole.owners)


def test_int8_calibrated_layer_by_layer_is_the_same_to_the_byte(
    tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [row["row"] for row in golden_rows(tiny_bundle)[:16]]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    written = []
    for free in (None, 1_000_000):
        monkeypatch.setattr(memory, "available_memory", lambda free=free: free)
        target = tmp_path / f"bundle-{free}"
        pipeline.export(TINY, target, precisions=("int8",), certified=False, calibrate=tmp_path / "texts.jsonl")
        written.append([(target / name).read_bytes() for name in ("model.int8.onnx", "model.int8.onnx.data")])
    assert written[0] == written[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle-1000000", "bundle-None", "texts.jsonl"]


def test_a_model_that_reads_a_layer_from_outside_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if its weights were read when it does not run.
    monkeypatch.setattr(layer_by_layer._Layer, "weights", lambda layer: contextlib.nullcontext())
    checkpoint = read_checkpoint(TINY)
    text = EncodedText(np.arange(5, 25), False, np.array([19]))
    with pytest.raises(
        CertificateError, match=r"RewardModel cannot be computed layer by layer \(.*--no-certify"
    ) as error:
        score_with_torch(checkpoint, [text], by_layer=True)
    assert "\n" not in str(error.value)


def test_memory_left_is_the_smaller_of_the_machine_s_and_the_container_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    machine = memory.available_memory()
    for name, text in (("max", "9000"), ("current", "8000"), ("stat", "anon 5000\ninactive_file 2500\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory.available_memory() == 3500
    (tmp_path / "memory.max").write_text("max\n")
    assert (memory.available_memory() is None) == (machine is None)
