"""One backbone of each kind of layer: certified, and as in transformers' own class, alone and in company to the bit.

`zoo.py` does the same for all types of transformers; docs/backbones.md is what it found.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

import zoo
from checkpoints import edit_json, read_tensors, write_sequence_classification
from rewardrt import RewardModel
from rewardrt.bundle.spec import Head, Layer, Tap
from rewardrt.errors import CheckpointError, ExportError, ProviderError, TraceError
from rewardrt.text.tokens import EncodedText
from rewardrt_export.checkpoint import read_checkpoint
from rewardrt_export.model.length_limits import length_limit
from rewardrt_export.pipeline import export
from rewardrt_export.tracing import state_layers
from rewardrt_export.tracing.attention_masks import Reach
from rewardrt_export.tracing.whole_vectors import pad_rows, write_softplus

# What is special about each, and whether a prefix is computed once.
KINDS = {
    "deepseek_v2": (True, "keys and values of two sizes, rotated as complex numbers, and shared experts"),
    "gemma3": (True, "the text part of a model that takes images"),
    "gemma4_text": (True, "layers whose keys and values differ in number and size"),
    "gpt_bigcode": (True, "one head of keys and values"),
    "llama4_text": (True, "attention in chunks, and every expert for every token"),
    "phimoe": (True, "a window that the mask alone knows"),
    "qwen2_moe": (True, "experts, and one that is shared"),
    "stablelm": (True, "rotary parts that are no whole vector of the processor"),
    "bloom": (False, "attention of its own, biased by distance"),
    "gpt_neo": (False, "attention of its own, in windows"),
    "modernbert-decoder": (True, "a head of two layers on a decoder"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_are_those_of_transformers_class_alone_and_in_company(kind: str, tmp_path: Path) -> None:
    reuses = KINDS[kind][0]
    row = zoo.sweep(kind, ("fp32",), tmp_path)
    assert (row.outcome, row.reason) == ("exact", "")
    assert row.found["fp32"].furthest < 1e-4
    assert row.found["fp32"].same_bits
    assert row.reuses is reuses


def test_half_takes_states_early_whatever_lies_before_them(tmp_path: Path) -> None:
    """Arcee's activation is a power, which half computes in float32: what is gathered of it has a type all the same."""
    row = zoo.sweep("arcee", ("fp32", "half"), tmp_path)
    assert (row.outcome, row.reason) == ("exact", "")
    assert row.found["half"].rms < 0.01


ENCODERS = ["luke", "mobilebert", "roformer", "xlm"]


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_are_those_of_transformers_class(kind: str, tmp_path: Path) -> None:
    row = zoo.sweep(kind, ("fp32",), tmp_path)
    assert (row.outcome, row.reason) == ("exact", "")
    assert row.found["fp32"].furthest < 1e-4
    assert row.found["fp32"].same_bits


@pytest.mark.parametrize("kind", ["canine", "funnel", "ibert", "longformer", "nystromformer", "xlnet", "yoso"])
def test_an_encoder_without_a_graph_is_refused_by_a_sentence_about_its_maths(kind: str, tmp_path: Path) -> None:
    row = zoo.sweep(kind, ("fp32",), tmp_path)
    assert row.outcome == "refused"
    assert row.reason.startswith(f"{kind}: ")
    assert row.reason.endswith("; one graph cannot compute that exactly")
    assert row.seconds < 10


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("xlstm", "xLSTMModel computes in another way for another number of tokens"),
        ("cpmant", "CpmAntModel computes in another way for another number of tokens"),
        ("minimax", "MiniMaxModel computes in another way for another number of tokens"),
        ("recurrent_gemma", "RecurrentGemmaModel has convolutions over the tokens in its own code (Conv1d of 4)"),
        ("zaya", "ZayaModel has convolutions over the tokens in its own code (Conv1d of 2)"),
    ],
)
def test_code_of_its_own_over_the_tokens_is_refused_before_anything_is_scored(
    kind: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These were found out by a certificate, after up to half a minute."""
    monkeypatch.setattr("rewardrt_export.pipeline.lower", lambda *_: pytest.fail("a graph was made"))
    row = zoo.sweep(kind, ("fp32",), tmp_path)
    assert row.outcome == "refused"
    assert row.reason.startswith(reason)


def test_code_that_decides_by_values_is_refused_with_the_line_that_does(tmp_path: Path) -> None:
    row = zoo.sweep("jetmoe", ("fp32",), tmp_path)
    assert row.outcome == "refused"
    assert "JetMoeModel goes on in another way for other values (modeling_jetmoe.py, line " in row.reason
    assert "expert_size.tolist()" in row.reason


MIXTURE: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Return a Mixtral of 8 experts, and its bundle in fp32 and int8."""
    folder = tmp_path_factory.mktemp("mixture")
    model = write_sequence_classification(folder / "rm", "mixtral", sliding_window=None, **MIXTURE)
    with torch.no_grad():  # choices that are clear, as those of trained models: int8 then makes the same
        model.model.layers[0].mlp.gate.weight.mul_(20)
    model.save_pretrained(folder / "rm")
    return model, export(folder / "rm", folder / "bundle", precisions=("fp32", "int8"))


def mixture_rewards(model: Any, ids: list[int]) -> tuple[float, list[list[int]]]:
    """The formula of Mixtral, arXiv 2401.04088: sum over the chosen e of softmax(G x)_e W2_e (silu(W1_e x) * W3_e x)."""
    layer, state = model.model.layers[0], model.state_dict()
    experts = "model.layers.0.mlp.experts"
    with torch.inference_mode():
        inputs = torch.tensor([ids])
        hidden = model.model.embed_tokens(inputs)
        place = torch.arange(len(ids)).unsqueeze(0)
        mask = torch.full((len(ids), len(ids)), float("-inf")).triu(1)[None, None]
        embedded = model.model.rotary_emb(hidden, place)
        hidden = hidden + layer.self_attn(layer.input_layernorm(hidden), embedded, mask)[0]
        x = layer.post_attention_layernorm(hidden)[0]
        scores = torch.softmax(x @ state["model.layers.0.mlp.gate.weight"].T, -1)
        weights, chosen = scores.topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        mixed = torch.zeros_like(x)
        for token in range(len(ids)):
            for weight, expert in zip(weights[token], chosen[token], strict=True):
                gate, up = (state[f"{experts}.gate_up_proj"][expert] @ x[token]).chunk(2)
                down = state[f"{experts}.down_proj"][expert] @ (torch.nn.functional.silu(gate) * up)
                mixed[token] += weight * down
        last = model.model.norm(hidden[0] + mixed)[-1]
        return float(last @ state["score.weight"][0]), chosen.tolist()


def test_a_mixture_is_the_sum_of_its_chosen_experts(mixture: tuple[Any, Any]) -> None:
    model, bundle = mixture
    runtime = RewardModel.load(bundle.path, provider="cpu", precision="fp32")
    for ids in zoo.texts()[:6]:
        expected, _ = mixture_rewards(model, ids)
        found = runtime.runner.run([zoo.encode(ids, bundle.manifest.spec)])[0]
        assert abs(float(found[0]) - expected) < 1e-5 * max(1, abs(expected))  # type: ignore[index]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_token_alone_at_its_expert_has_the_bits_that_it_has_in_company(
    mixture: tuple[Any, Any], precision: str
) -> None:
    model, bundle = mixture
    runtime = RewardModel.load(bundle.path, provider="cpu", precision=precision)
    ids = zoo.texts()[-1][:23]
    chosen = mixture_rewards(model, ids)[1]
    counts = np.bincount(np.array(chosen).ravel(), minlength=8)
    assert counts.min() <= 1 or counts[chosen[-1]].min() < 8  # some experts see few tokens of one text
    text = zoo.encode(ids, bundle.manifest.spec)
    alone = runtime.runner.run([text])[0]
    # The same text in rows with others: every expert multiplies more rows.
    others = [zoo.encode(each[:23], bundle.manifest.spec) for each in zoo.texts()[8:]]
    together = runtime.runner.run([text, *others], padding=True)[0]
    assert np.array_equal(alone, together)  # type: ignore[arg-type]


def test_experts_are_constants_of_the_graph_and_nothing_is_gathered_for_a_token(mixture: tuple[Any, Any]) -> None:
    graph = ir.load(mixture[1].path / "model.onnx").graph
    names = [f"backbone.layers.0.mlp.experts.{part}.{expert}.T" for part in ("gate_up_proj", "down_proj") for expert in range(8)]  # fmt: skip
    assert set(names) <= set(graph.initializers)
    assert all(len(graph.initializers[name].shape or ()) == 2 for name in names)
    assert not any(node.domain == "rewardrt.marks" for node in graph)
    sizes = [int(np.prod(value.shape.numpy())) for value in graph.initializers.values() if value.shape is not None]
    assert max(sizes) < 8 * 2 * 64 * 32  # no weights of all experts are left


def test_the_choice_of_experts_stays_float32(mixture: tuple[Any, Any]) -> None:
    graph = ir.load(mixture[1].path / "model.int8.onnx").graph
    weights = {node.inputs[1].name for node in graph if node.op_type == "MatMul" and not node.domain}  # type: ignore[union-attr]
    assert any(name and "mlp.gate" in name for name in weights)
    assert not any(name and "experts" in name for name in weights)


def test_an_expert_that_no_text_of_the_calibration_reached_is_rounded_too(tmp_path: Path) -> None:
    model = write_sequence_classification(tmp_path / "rm", "mixtral", **MIXTURE)
    with torch.no_grad():
        gate = model.model.layers[0].mlp.gate.weight
        gate.mul_(20)
        gate[7] = gate[:7].sum(0) * -5  # chosen where hardly any other is
    model.save_pretrained(tmp_path / "rm")
    calibrate = tmp_path / "calibrate.jsonl"
    calibrate.write_text('{"text": "a"}\n' * 16)  # one token, which two of the 8 experts see
    bundle = export(tmp_path / "rm", tmp_path / "bundle", precisions=("int8",), calibrate=calibrate, certified=False)
    names = ir.load(bundle.path / "model.int8.onnx").graph.initializers
    for expert in range(8):
        assert any(f"gate_up_proj.{expert}.T" in name and "int8" in name for name in names)


def test_sinks_are_one_more_key_whose_value_is_nothing(tmp_path: Path) -> None:
    """GPT-OSS: a softmax over a head's scores and its sink, of which the sink's share is dropped.

    Its experts have biases, and weights transposed and interleaved.
    """
    specimen = zoo.Specimen("gpt_oss", tmp_path / "checkpoint")
    tensors = read_tensors(tmp_path / "checkpoint")
    sinks = [name for name in tensors if name.endswith("sinks")]
    assert sinks
    bundle = specimen.export(tmp_path / "bundle", ("fp32",))
    before = specimen.rewards(zoo.texts()[:4])
    found = zoo.compare(bundle, "fp32", specimen.rewards(zoo.texts()))
    assert found.furthest < 1e-4
    with torch.no_grad():
        for name, parameter in specimen._model.named_parameters():
            if name.endswith("sinks"):
                parameter.fill_(-1e4)  # as without sinks: the rewards above depend on them
    assert np.abs(specimen.rewards(zoo.texts()[:4]) - before).max() > 1e-2


@pytest.mark.parametrize(
    ("reach", "seen"),
    [
        (Reach(), [0, 1, 2, 3, 4, 5]),
        (Reach(window=3), [3, 4, 5]),
        (Reach(chunk=4), [4, 5]),
    ],
)
def test_what_a_token_may_look_at(reach: Reach, seen: list[int]) -> None:
    asked = torch.arange(6)
    assert asked[reach.sees(torch.tensor(5), asked)].tolist() == seen


LENGTH_DEPENDENT = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0], "original_max_position_embeddings": 64, "factor": 8.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", LENGTH_DEPENDENT)
def test_frequencies_that_depend_on_the_length_are_exact_up_to_where_they_do(kind: str, tmp_path: Path) -> None:
    changes = {"max_position_embeddings": 64} if kind == "dynamic" else {}
    model = write_sequence_classification(tmp_path / "rm", rope_parameters=LENGTH_DEPENDENT[kind], **changes)
    said: list[str] = []
    bundle = export(tmp_path / "rm", tmp_path / "bundle", progress=lambda step: said.append(str(step)))
    assert bundle.manifest.spec.max_length == 64
    if kind == "longrope":
        assert any("64 tokens; beyond them its rotary frequencies depend on the length" in line for line in said)
    runtime = RewardModel.load(bundle.path, provider="cpu")
    for ids in (each for each in zoo.texts() if len(each) <= 64):
        with torch.inference_mode():
            expected = float(model(input_ids=torch.tensor([ids])).logits[0, 0])
        found = runtime.runner.run([zoo.encode(ids, bundle.manifest.spec)])[0]
        assert abs(float(found[0]) - expected) < 1e-4 * max(1, abs(expected))  # type: ignore[index]
    with pytest.raises(CheckpointError, match="--max-length 65: the graph is exact for texts of 64 tokens"):
        read_checkpoint(tmp_path / "rm", max_length=65)


def test_sparse_attention_is_exact_where_its_blocks_are_all_there_are() -> None:
    config = zoo.tiny_config("big_bird")
    config.attention_type, config.num_random_blocks, config.block_size = "block_sparse", 3, 4
    limit = length_limit(config)
    assert limit is not None
    assert limit.tokens == (5 + 2 * 3) * 4


def test_a_backbone_that_padding_changes_is_never_padded(tmp_path: Path) -> None:
    specimen = zoo.Specimen("convbert", tmp_path / "checkpoint")
    bundle = specimen.export(tmp_path / "bundle", ("fp32",))
    assert not bundle.manifest.spec.padded
    model = RewardModel.load(bundle.path, provider="cpu", padding=True)
    every = [zoo.encode(ids, bundle.manifest.spec) for ids in zoo.texts()]
    found = np.array([float(values[0]) for values in model.runner.run(every)])  # type: ignore[index]
    expected = specimen.rewards(zoo.texts())
    assert np.abs(found - expected).max() < 1e-4 * expected.std()
    with pytest.raises(ExportError, match="TensorRT has texts padded to few lengths"):
        specimen.export(tmp_path / "other", ("tensorrt",))


def test_the_rest_of_a_model_that_takes_images_is_left_out_and_said_to_be(tmp_path: Path) -> None:
    zoo.Specimen("gemma3", tmp_path / "checkpoint")
    checkpoint = read_checkpoint(tmp_path / "checkpoint", max_length=500)
    assert checkpoint.spec.backbone == "gemma3_text"
    unused = {name.split(".")[0 if not name.startswith("model.") else 1] for name in checkpoint.source.unused}
    assert unused == {"vision_tower", "multi_modal_projector"}
    edit_json(tmp_path / "checkpoint" / "config.json", text_config=None)
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "checkpoint", max_length=500)


def test_rows_of_no_whole_vector_are_padded_and_cut_again() -> None:
    def model_of(width: int) -> ir.Model:
        value = ir.val("x", ir.DataType.FLOAT, ["rows", width])
        node = ir.node("Cos", [value])
        node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = "y", value.shape, value.type
        graph = ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 23})
        return ir.Model(graph, ir_version=10)

    whole = model_of(32)
    pad_rows(whole)
    assert [node.op_type for node in whole.graph] == ["Cos"]
    odd = model_of(2)
    pad_rows(odd)
    assert [node.op_type for node in odd.graph if node.op_type != "Constant"] == ["Pad", "Cos", "Slice"]
    import onnxruntime

    session = onnxruntime.InferenceSession(ir.serde.serialize_model(odd).SerializeToString())
    x = np.random.default_rng(0).normal(size=(37, 2), scale=100).astype(np.float32)
    every = session.run(None, {"x": x})[0]
    assert np.abs(every - np.cos(x)).max() < 1e-5
    for row in range(37):
        assert np.array_equal(session.run(None, {"x": x[row : row + 1]})[0][0], every[row])


STATES = ["jamba", "lfm2", "qwen3_next"]


@pytest.mark.parametrize("kind", STATES)
def test_layers_with_state_are_those_of_transformers_class(kind: str, tmp_path: Path) -> None:
    row = zoo.sweep(kind, ("fp32",), tmp_path)
    assert (row.outcome, row.reason) == ("exact", "")
    assert row.found["fp32"].same_bits
    assert row.reuses


def test_a_graph_says_the_oldest_onnxruntime_that_it_runs_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = zoo.Specimen("mamba2", tmp_path / "checkpoint").export(tmp_path / "bundle", ("fp32",))
    assert bundle.manifest.variants[0].onnxruntime == "1.26"
    import onnxruntime

    RewardModel.load(bundle.path, provider="cpu")
    monkeypatch.setattr(onnxruntime, "__version__", "1.25.1")
    expected = r"fp32 graph needs onnxruntime 1.26 or later for its operators, found 1.25.1: `pip install -U"
    with pytest.raises(ProviderError, match=expected):
        RewardModel.load(bundle.path, provider="cpu")


def test_weights_that_layers_share_are_stored_once(tmp_path: Path) -> None:
    specimen = zoo.Specimen("zamba2", tmp_path / "checkpoint")
    bundle = specimen.export(tmp_path / "bundle", ("fp32",))
    shared = 4 * sum(parameter.numel() for parameter in specimen._model.base_model.parameters())  # each once
    assert (bundle.path / "model.onnx.data").stat().st_size < shared + 30_000


def test_layers_with_state_are_refused_for_tensorrt_by_the_operator_that_it_lacks(tmp_path: Path) -> None:
    specimen = zoo.Specimen("zamba2", tmp_path / "checkpoint")
    with pytest.raises(TraceError, match="tensorrt: the graph computes layers with state by onnxruntime's LinearAtt"):
        specimen.export(tmp_path / "bundle", ("half", "tensorrt"))


def test_the_recurrences_are_those_of_the_papers() -> None:
    """Each function of ours, its operator computed by a loop over the tokens in float64, against transformers' own."""
    from transformers.models.bamba import modeling_bamba
    from transformers.models.jamba import modeling_jamba
    from transformers.models.qwen3_next import modeling_qwen3_next

    def loop(query: Any, key: Any, value: Any, decay: Any, past: Any, beta: Any, heads: int) -> tuple[Any, Any]:
        batch, tokens, _ = value.shape
        q, k, v = (x.double().view(batch, tokens, heads, -1) for x in (query, key, value))
        g = decay.double().view(batch, tokens, heads, -1)
        assert past.shape == (batch, heads, k.shape[3], v.shape[3])
        state = past.double()
        out = []
        for t in range(tokens):
            state = state * torch.exp(g[:, t]).unsqueeze(-1)
            new = v[:, t]
            if beta is not None:
                read = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
                new = beta[:, t].double().unsqueeze(-1) * (new - read)
            state = state + k[:, t].unsqueeze(-1) * new.unsqueeze(-2)
            out.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
        return torch.stack(out, 1).flatten(2).float(), state.float()

    def ours(function: Any, given: dict[str, Any], axis: int) -> torch.Tensor:
        """What a function of ours gives in one call, which is what it gives in two: its states go from one to the other."""
        tokens, found, past = 70, [], None
        for start, end in ((0, 33), (33, tokens)):
            part = {
                name: each.narrow(axis, start, end - start)
                if isinstance(each, torch.Tensor) and each.dim() > axis and each.shape[axis] == tokens
                else each
                for name, each in given.items()
            }
            state_layers.layer_states.begin(past)
            found.append(function(**part))
            past = state_layers.layer_states.present
        state_layers.layer_states.begin(None)
        whole = function(**given)
        whole, found = (whole[0], [each[0] for each in found]) if isinstance(whole, tuple) else (whole, found)
        assert (torch.cat(found, axis) - whole).abs().max() < 1e-6 * whole.abs().max()
        return whole

    rng = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=rng)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_layers.torch.ops.rewardrt, "linear_attention", loop)
        delta = {
            "query": normal(2, 70, 2, 8), "key": normal(2, 70, 2, 8), "value": normal(2, 70, 4, 6),
            "g": -normal(2, 70, 4).abs(), "beta": torch.sigmoid(normal(2, 70, 4)), "use_qk_l2norm_in_kernel": True,
        }  # fmt: skip
        theirs = modeling_qwen3_next.torch_chunk_gated_delta_rule(**delta)[0]
        assert (ours(state_layers._delta_rule, delta, 1) - theirs).abs().max() < 1e-5 * theirs.abs().max()
        scan = {
            "hidden_states": normal(2, 70, 4, 6), "dt": normal(2, 70, 4), "A": -normal(4).abs(), "B": normal(2, 70, 2, 8),
            "C": normal(2, 70, 2, 8), "chunk_size": 16, "D": normal(4), "dt_bias": normal(4), "dt_softplus": True,
            "dt_limit": (0.1, 2.0),
        }  # fmt: skip
        theirs = modeling_bamba.mamba2_chunk_scan(**scan)
        assert (ours(state_layers._mamba2, scan, 1) - theirs).abs().max() < 1e-5 * theirs.abs().max()
        selective = {
            "hidden_states": normal(2, 6, 70), "dt": normal(2, 6, 70), "A": -normal(6, 8).abs(), "B": normal(2, 8, 70),
            "C": normal(2, 8, 70), "D": normal(6), "z": normal(2, 6, 70), "delta_bias": normal(6), "delta_softplus": True,
        }  # fmt: skip
        theirs = modeling_jamba.mamba_selective_scan(**selective)
        assert (ours(state_layers._mamba, selective, 2) - theirs).abs().max() < 1e-5 * theirs.abs().max()
    conv = {"hidden_states": normal(2, 6, 70), "weight": normal(6, 4), "bias": normal(6), "activation": "silu"}
    theirs = modeling_jamba.causal_conv1d_fn(**conv)
    assert (ours(state_layers._causal_conv1d, conv, 2) - theirs).abs().max() < 1e-6 * theirs.abs().max()


def test_softplus_is_written_by_functions_whose_bits_do_not_change_with_the_batch() -> None:
    import onnxruntime

    value = ir.val("x", ir.DataType.FLOAT, ["rows", 64])
    node = ir.node("Softplus", [value])
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = "y", value.shape, value.type
    model = ir.Model(ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 23}), ir_version=10)
    write_softplus(model)
    assert not any(each.op_type == "Softplus" for each in model.graph)
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    x = np.random.default_rng(0).normal(size=(1200, 64), scale=20).astype(np.float32)
    every = session.run(None, {"x": x})[0]
    expected = np.logaddexp(0, x.astype(np.float64))
    assert np.abs(every / np.maximum(expected, 1e-300) - 1)[expected > 1e-30].max() < 1e-6
    for start in range(0, 1200, 150):
        assert np.array_equal(session.run(None, {"x": x[start : start + 150]})[0], every[start : start + 150])


def test_an_attention_with_a_mask_of_its_own_making_is_refused(tmp_path: Path) -> None:
    specimen = zoo.Specimen("doge", tmp_path / "checkpoint")
    with pytest.raises(TraceError, match="DogeAttention changes its attention mask by its own code"):
        specimen.export(tmp_path / "bundle", ("fp32",))


def test_a_text_of_ids_is_scored_as_the_class_scores_it() -> None:
    """What the zoo compares by is made here: positions at the end, and at the start for encoders."""
    spec = read_spec()
    text = zoo.encode([5, 6, 7], spec)
    assert isinstance(text, EncodedText)
    assert text.positions.tolist() == [2]
    first = dataclasses.replace(spec, causal=False, taps=(Tap("cls", "first"),), heads=(HEAD_OF_FIRST,))
    assert zoo.encode([5, 6, 7], first).positions.tolist() == [0]


HEAD_OF_FIRST = Head((Layer("score.weight"),), taps=("cls",))


def read_spec() -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_sequence_classification(Path(folder) / "rm")
        return read_checkpoint(Path(folder) / "rm").spec
