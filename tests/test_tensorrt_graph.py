"""The tensorrt graph: half's maths on half's weights, in the operators that TensorRT's parser has."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from checkpoints import write_sequence_classification
from checkpoints_encoders import write_encoder
from every_family import EVERY_FAMILY
from rewardrt import RewardModel
from rewardrt.bundle import manifest as bundle
from rewardrt.bundle.manifest import Bundle, read_bundle
from rewardrt.errors import InferenceError, ProviderError
from rewardrt.graph.session import KeyValues
from rewardrt.machine.processor import Processor
from rewardrt.machine.providers import Selection
from rewardrt_export.pipeline import export
from rewardrt_export.precisions import engine
from texts import make_conversations

TINY = Path(__file__).parent.parent / "models" / "tiny"
ROWS = [{"messages": messages} for messages in make_conversations(24, longest=20)]


@pytest.fixture(autouse=True)
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """What TensorRT itself makes of the graphs is test_tensorrt_engines' claim."""
    monkeypatch.setattr(engine, "missing", lambda: "TensorRT-RTX is not installed")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """models/tiny in three precisions, tensorrt asked for before half."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "missing", lambda: "TensorRT-RTX is not installed")
        return export(TINY, tmp_path_factory.mktemp("trt") / "bundle", precisions=("fp32", "tensorrt", "half"))


def graph_of(made: Bundle, precision: str = "tensorrt") -> ir.Graph:
    return ir.load(made.path / made.variant(precision).graph).graph


def scores(path: Path, precision: str, rows: list[dict[str, Any]], **options: Any) -> np.ndarray:
    return RewardModel.load(path, provider="cpu", precision=precision, **options).score_many(rows)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_attention_has_one_output_and_no_past_and_neither_has_the_graph(made: Bundle) -> None:
    graph = graph_of(made)
    attention = [node for node in graph if node.op_type == "Attention"]
    assert [(len(node.inputs), len(node.outputs)) for node in attention] == [(3, 1)] * 4
    assert [str(value.name) for value in graph.inputs] == ["input_ids", "lengths"]
    assert [str(value.name) for value in graph.outputs] == ["rewards"]


def test_its_weights_are_halfs_file_byte_for_byte_and_a_bundle_grows_by_kilobytes(made: Bundle, tmp_path: Path) -> None:
    variants = {variant.precision: variant for variant in made.manifest.variants}
    assert list(variants) == ["fp32", "tensorrt", "half"]
    assert variants["tensorrt"].data == variants["half"].data == ("model.half.onnx.data",)
    without = export(TINY, tmp_path / "without", precisions=("fp32", "half"), certified=False)
    for name in ("model.half.onnx", "model.half.onnx.data", "model.onnx.data"):
        assert sha256(without.path / name) == sha256(made.path / name), name
    files = [record.path for record in made.manifest.files]
    assert len(files) == len(set(files))
    assert (made.path / "model.tensorrt.onnx").stat().st_size < 40_000
    assert read_bundle(made.path).manifest == made.manifest


def test_alone_it_brings_halfs_weights_and_no_graph_of_half(made: Bundle, tmp_path: Path) -> None:
    alone = export(TINY, tmp_path / "alone", precisions=("tensorrt",))
    names = {record.path for record in alone.manifest.files}
    assert {name for name in names if name.startswith("model")} == {"model.tensorrt.onnx", "model.half.onnx.data"}
    assert {path.name for path in alone.path.iterdir()} == names | {"reward.json"}
    assert sha256(alone.path / "model.half.onnx.data") == sha256(made.path / "model.half.onnx.data")


def test_rewards_are_halfs_where_the_kernels_are(made: Bundle) -> None:
    half, tensorrt, whole = (scores(made.path, name, ROWS) for name in ("half", "tensorrt", "fp32"))
    assert np.abs(half - tensorrt).max() < 1e-4 * whole.std()
    certificate = made.certificate("tensorrt")
    assert certificate is not None and certificate.fidelity is not None
    assert certificate.fidelity.rms_std < 0.003 and certificate.batched.max_std < 0.01


def test_the_manifest_does_not_claim_an_engine_that_was_not_built(made: Bundle) -> None:
    assert {variant.built for variant in made.manifest.variants} == {""}


def test_an_export_says_that_the_engine_was_not_built_and_why(tmp_path: Path) -> None:
    lines: list[str] = []
    export(
        TINY,
        tmp_path / "bundle",
        precisions=("tensorrt",),
        certified=False,
        progress=lambda step: lines.append(str(step)),
    )
    assert "the tensorrt graph was not built: TensorRT-RTX is not installed" in lines


@pytest.mark.parametrize("backbone", ["gemma2", "mistral", "llama"])
def test_attention_without_a_kernel_is_written_out_to_the_same_rewards(tmp_path: Path, backbone: str) -> None:
    """gemma2 has a softcap and windows; mistral windows and llama none, both with heads of 8."""
    write_sequence_classification(tmp_path / "rm", backbone)
    made = export(tmp_path / "rm", tmp_path / "bundle", precisions=("fp32", "half", "tensorrt"))
    kinds = Counter(node.op_type for node in graph_of(made))
    assert kinds["Attention"] == 0 and kinds["Softmax"] == 2 and kinds["Tanh"] == (2 if backbone == "gemma2" else 0)
    half, tensorrt, whole = (scores(made.path, name, ROWS, padding=True) for name in ("half", "tensorrt", "fp32"))
    assert np.sqrt(np.mean((tensorrt - whole) ** 2)) < 0.01 * whole.std()
    assert np.abs(half - tensorrt).max() < 0.02 * whole.std()


def test_windows_stay_masks_of_attention_where_it_has_a_kernel(tmp_path: Path) -> None:
    write_sequence_classification(tmp_path / "rm", "gemma3_text")  # heads of 16, one layer of two within a window
    made = export(tmp_path / "rm", tmp_path / "bundle", precisions=("fp32", "tensorrt"))
    masked = [len(node.inputs) == 4 for node in graph_of(made) if node.op_type == "Attention"]
    assert sorted(masked) == [False, True]
    tensorrt, whole = (scores(made.path, name, ROWS) for name in ("tensorrt", "fp32"))
    assert np.abs(tensorrt - whole).max() < 0.02 * whole.std()


def test_an_encoder_is_halfs_graph_as_it_is(tmp_path: Path) -> None:
    write_encoder(tmp_path / "rm", "bert", hidden_size=64)  # heads of 16
    made = export(tmp_path / "rm", tmp_path / "bundle", precisions=("half", "tensorrt"))
    ours, halfs = (Counter(node.op_type for node in graph_of(made, name)) for name in ("tensorrt", "half"))
    assert ours == halfs and ours["Attention"] == 2
    rows = [{"prompt": f"question {n}", "response": "an answer " * (n + 1)} for n in range(12)]
    assert np.array_equal(scores(made.path, "tensorrt", rows), scores(made.path, "half", rows))


@pytest.mark.parametrize("family", ["armorm", "odin", "qwen-prm", "general-preference"])
def test_several_taps_objectives_and_steps_are_certified(tmp_path: Path, family: str) -> None:
    """A graph that rounds gives objectives after its reward: they were compared with torch's rewards of other texts."""
    case = EVERY_FAMILY[family]
    case.write(tmp_path / "rm")
    options = case.export_options(tmp_path / "rm")
    made = export(tmp_path / "rm", tmp_path / "bundle", precisions=("tensorrt",), **options)
    certificate = made.certificate("tensorrt")
    assert made.manifest.spec.family == family
    assert certificate is not None and certificate.fidelity is not None
    assert 0 < certificate.fidelity.rms_std < 0.02


def test_rewards_of_the_tokens_of_a_long_text_are_those_of_the_float32_graph(tmp_path: Path) -> None:
    """Without a past a text is computed whole: in parts, each would have been scored as if it were a text's beginning."""
    made = export(TINY, tmp_path / "bundle", precisions=("fp32", "tensorrt"), token_rewards=True, certified=False)
    models = [RewardModel.load(made.path, provider="cpu", precision=name) for name in ("fp32", "tensorrt")]
    answers = models[0].answers
    (text,) = answers.encode(answers.parse({"text": "one long text of many words " * 120}).items)
    assert len(text.ids) > 600  # type: ignore[union-attr]
    whole, ours = (model.token_rewards(text) for model in models)  # type: ignore[arg-type]
    assert whole.shape == ours.shape and np.abs(whole - ours).max() < 0.02 * whole.std()


def test_a_past_for_a_graph_without_one_is_an_error(made: Bundle) -> None:
    session = RewardModel.load(made.path, provider="cpu", precision="tensorrt").session
    with pytest.raises(InferenceError, match="the graph takes no past, and one was given"):
        session.run_part(np.ones((1, 4), np.int64), past=KeyValues(()))


def test_auto_takes_it_on_tensorrt_and_nowhere_else(made: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "read_processor", lambda: Processor("A CPU", (), 2, 2, None))
    chosen = {name: made.variant("auto", name).precision for name in ("cpu", "cuda", "tensorrt")}
    assert chosen == {"cpu": "fp32", "cuda": "half", "tensorrt": "tensorrt"}


def test_another_graph_is_refused_on_tensorrt(made: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewardrt.reward_model.select_provider", lambda choice: Selection("tensorrt", None))
    with pytest.raises(ProviderError, match="does not take the half graph whole; export with `--precision tensorrt`"):
        RewardModel.load(made.path, provider="tensorrt", precision="half")


def test_what_became_infinite_is_named_by_its_precision(made: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    model = RewardModel.load(made.path, provider="cpu", precision="tensorrt")
    monkeypatch.setattr(model.session, "run", lambda *_, **__: np.array([[np.inf]], np.float32))
    with pytest.raises(InferenceError, match="tensorrt has no numbers over 65504: score with fp32"):
        model.score(text="a text")
