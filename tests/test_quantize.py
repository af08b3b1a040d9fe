"""Graphs that round: each token by itself, as near to float32 as the certificate says, and chosen only where they are good."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import onnxruntime
import pytest
import torch

from checkpoints_encoders import write_encoder
from rewardrt import RewardModel
from rewardrt.bundle import manifest as bundle
from rewardrt.bundle import opening
from rewardrt.bundle.certificate import Fidelity
from rewardrt.bundle.manifest import Bundle, read_bundle
from rewardrt.errors import BundleError, ExportError
from rewardrt.machine import kernels
from rewardrt.machine.processor import Processor, read_processor
from rewardrt.scoring import prefix
from rewardrt_export.pipeline import export
from rewardrt_export.precisions import fuse
from rewardrt_export.precisions import quantize as quantize_module
from rewardrt_export.precisions.calibrate import Calibration
from rewardrt_export.precisions.pool import pool_early
from rewardrt_export.precisions.quantize import quantize, quantize_weights
from rewardrt_export.precisions.rounding import column_step_sizes, make_factor, round_weight
from rewardrt_export.precisions.smoothing import MIXED, Plan, Smoothing, hadamard
from test_prefix import awkward_texts, rewards

TINY = Path(__file__).parent.parent / "models" / "tiny"
GOOD = bool({"avx512_vnni", "avx_vnni", "dotprod"} & set(read_processor().instruction_sets or ()))
needs_dot = pytest.mark.skipif(not GOOD, reason="this processor has no instructions for int8 products")
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("precisions")
    return export(TINY, folder / "bundle", precisions=("fp32", "weights8", "weights4", *(["int8"] if GOOD else [])))


def product(weight: np.ndarray) -> ir.Model:
    """Make the graph of one product with a weight [K, N]."""
    x = ir.Value(name="x", shape=ir.Shape(["batch", "tokens", len(weight)]), type=ir.TensorType(ir.DataType.FLOAT))
    tensor = ir.tensor(weight, name="backbone.w.weight")
    w = ir.Value(
        name="backbone.w.weight", const_value=tensor, shape=ir.Shape(weight.shape), type=ir.TensorType(tensor.dtype)
    )
    node = ir.node("MatMul", [x, w])
    (y,) = node.outputs
    y.name, y.shape = "y", ir.Shape(["batch", "tokens", weight.shape[1]])
    y.type = ir.TensorType(ir.DataType.FLOAT)
    last = ir.node("Identity", [y])
    last.outputs[0].name, last.outputs[0].type = "out", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], last.outputs, nodes=[node, last], initializers=[w], opset_imports={"": 23}, name="product")
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    data = ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def activations(tokens: int = 14) -> np.ndarray:
    """Make activations [2, tokens / 2, 128]: channels go together, and two are large, as in a language model."""
    x = RNG.standard_normal((2, tokens // 2, 12)) @ RNG.standard_normal((12, 128))
    x += 0.3 * RNG.standard_normal(x.shape)
    x[..., [3, 50]] *= 40
    return x.astype(np.float32)


@needs_dot
def test_a_product_is_its_formula() -> None:
    x, weight = activations(), RNG.standard_normal((128, 40)).astype(np.float32)
    in_steps = x / (np.abs(x).max(-1, keepdims=True) / 127)
    planes = np.rint(in_steps) + np.rint((in_steps - np.rint(in_steps)) * 254) / 254
    steps = np.abs(weight).max(0) / 127
    expected = planes @ (np.rint(weight / steps) * steps) * (np.abs(x).max(-1, keepdims=True) / 127)
    assert np.abs(planes - in_steps).max() <= 1 / 500  # 16 bits hold the activation
    found = run(quantize(product(weight)), x)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


@needs_dot
def test_compensated_rounding_keeps_the_product_nearer() -> None:
    texts, unseen = np.split(activations(1_200), 2)  # both sets have the same directions
    weight = RNG.standard_normal((128, 40)).astype(np.float32)
    true = unseen.astype(np.float64) @ weight
    calibration = Calibration()
    calibration.observe("w.weight", torch.from_numpy(texts))
    errors = [
        float(np.sqrt(np.mean((run(quantize(product(weight), how), unseen) - true) ** 2)))
        for how in (None, calibration)
    ]
    assert errors[1] < 0.6 * errors[0]


def test_the_factor_is_that_of_the_inverse_of_the_moments() -> None:
    seen = activations(600).reshape(-1, 128).astype(np.float64)
    moments = seen.T @ seen
    moments[np.diag_indices(128)] += 0.01 * np.diagonal(moments).mean()
    factor = make_factor(seen.astype(np.float32))
    inverse = np.linalg.inv(moments[np.ix_(factor.order, factor.order)])
    assert np.abs(factor.upper.T @ factor.upper - inverse).max() < 1e-4 * np.abs(inverse).max()
    assert (np.tril(factor.upper, -1) == 0).all()


def test_rounding_stays_in_range_and_survives_what_calibration_may_see() -> None:
    weight = RNG.standard_normal((128, 40)).astype(np.float32)
    weight[:, 7] = 0
    steps = column_step_sizes(weight)
    seen = activations(20).reshape(-1, 128)  # fewer tokens than channels
    dead = seen.copy()
    dead[:, 10] = 0
    for tokens in (seen, dead, np.zeros((5, 128), np.float32), np.zeros((0, 128), np.float32)):
        rounded = round_weight(weight, steps, make_factor(tokens))
        assert rounded.min() >= -127
        assert (rounded[:, 7] == 0).all()
        assert np.abs(rounded * steps - weight).max() < 12 * steps.max()
    nothing = round_weight(weight, steps, make_factor(np.zeros((5, 128), np.float32)))
    assert (nothing == round_weight(weight, steps, None)).all()  # no text, no reason to move a row


def test_calibration_keeps_one_copy_of_what_layers_share() -> None:
    calibration = Calibration()
    first, second = torch.randn(1, 30, 8), torch.randn(1, 30, 8)
    for name, seen in (("q", first), ("k", first), ("o", second), ("q", second), ("k", second), ("o", first)):
        calibration.observe(f"{name}.weight", seen)
    plan = Plan(calibration)
    q, k, o = (plan.factor(f"backbone.{name}.weight") for name in "qko")
    assert k is q
    assert o is not q
    expected = make_factor(torch.cat([first[0], second[0]]).to(torch.bfloat16).float().numpy())
    assert (q.upper == expected.upper).all()
    assert set(plan.weights) == {f"backbone.{name}.weight" for name in "qko"}


def test_tokens_that_overflow_do_not_count_and_weights_that_no_text_met_stay() -> None:
    calibration = Calibration()
    seen = torch.randn(1, 30, 128)
    calibration.observe("q.weight", seen)
    odd = torch.cat([seen[0], torch.full((1, 128), 1e30), torch.full((1, 128), float("nan"))])
    calibration.observe("o.weight", odd)
    plan = Plan(calibration)
    q, o = (plan.factor(f"backbone.{name}.weight") for name in "qo")
    assert (o.upper == q.upper).all()
    with pytest.raises(ExportError, match="no products with weights"):
        quantize(product(RNG.standard_normal((128, 8)).astype(np.float32)), calibration)


WEIGHT = RNG.standard_normal((128, 40)).astype(np.float32)
READ = RNG.standard_normal(40).astype(np.float32)  # the reward of a text is the sum of x W READ over its tokens


def calibrated(reward_std: float, texts: int = 20) -> Calibration:
    """Calibrate the product with WEIGHT on texts of 30 tokens, whose rewards spread by `reward_std`."""
    calibration = Calibration()
    calibration.reward_std = reward_std
    weight = torch.nn.Parameter(torch.from_numpy(WEIGHT.T.copy()))
    calibration.watch("w.weight", weight, transposed=False)
    for _ in range(texts):
        given = calibration.observe("w.weight", torch.from_numpy(activations(30)).requires_grad_())
        (given @ weight.T @ torch.from_numpy(READ)).sum().backward()
        calibration.texts += 1
    return calibration


def test_activations_are_rounded_as_cheaply_as_the_reward_allows() -> None:
    found = []
    for reward_std in (1e4, 1_400.0, 1e-3):
        smoothing = Plan(calibrated(reward_std)).smoothing("backbone.w.weight")
        found.append((smoothing.mixed, smoothing.planes))
        assert smoothing.scale is not None
        rest = np.delete(smoothing.scale, [3, 50])
        assert smoothing.scale[[3, 50]].min() > 3 * np.median(rest)  # the two channels that are 40 times larger
    assert found == [(False, 1), (True, 1), (True, 2)]


def test_no_activation_has_two_planes_before_all_are_mixed() -> None:
    calibration = Calibration()
    for _ in range(20):
        for name, gain in (("w", 1.0), ("v", 0.1)):  # the reward depends ten times more on one of them
            given = calibration.observe(f"{name}.weight", torch.from_numpy(activations(30)).requires_grad_())
            (gain * given @ torch.from_numpy(WEIGHT @ READ)).sum().backward()
        calibration.texts += 1
    found = []
    for reward_std in (1e5, 1e3, 100.0, 60.0, 1e-3):
        calibration.reward_std = reward_std
        plan = Plan(calibration)
        kinds = [plan.smoothing(f"backbone.{name}.weight") for name in "wv"]
        assert all(kind.mixed for kind in kinds) or all(kind.planes == 1 for kind in kinds)
        found.append([kind.planes if kind.mixed else 0 for kind in kinds])
    assert [0, 0] in found
    assert [2, 1] in found
    assert found[-1] == [2, 2]


def test_gradients_that_overflow_give_two_planes_and_finite_scales() -> None:
    calibration = Calibration()
    given = calibration.observe("w.weight", torch.from_numpy(activations(30)).requires_grad_())
    (given * 1e25).sum().backward()
    calibration.texts = 1
    smoothing = Plan(calibration).smoothing("backbone.w.weight")
    assert (smoothing.mixed, smoothing.planes) == (True, 2)
    assert smoothing.scale is not None
    assert np.isfinite(smoothing.scale).all()


@pytest.mark.parametrize("mixed", [False, True])
def test_smoothing_leaves_the_product_as_it_was(mixed: bool) -> None:
    smoothing = Smoothing(np.exp(RNG.standard_normal(128)).astype(np.float32), mixed)
    x = activations(30).reshape(-1, 128)
    found = smoothing.activation(torch.from_numpy(x)).numpy() @ smoothing.weight(WEIGHT)
    assert np.abs(found - x @ WEIGHT).max() < 1e-5 * np.abs(x @ WEIGHT).max()
    assert (hadamard() == hadamard().T).all()
    assert np.abs(hadamard() @ hadamard() - np.eye(MIXED)).max() < 1e-6


@needs_dot
def test_learnt_scales_bring_one_plane_near_to_the_product() -> None:
    x = activations(400)
    true = (x.astype(np.float64) @ WEIGHT) @ READ
    steps = np.abs(x).max(-1, keepdims=True) / 127
    columns = np.abs(WEIGHT).max(0) / 127
    plain = (np.rint(x / steps) * steps) @ (np.rint(WEIGHT / columns) * columns) @ READ
    errors = [float(np.sqrt(np.mean((plain - true) ** 2)))]
    for reward_std in (1e4, 1_400.0, 1e-3):  # one plane, mixed, two planes: see above
        found = run(quantize(product(WEIGHT), calibrated(reward_std)), x) @ READ
        errors.append(float(np.sqrt(np.mean((found - true) ** 2))))
    assert max(errors[1:]) < 0.5 * errors[0]
    assert errors[2] < errors[1]


def test_a_gradient_is_that_of_the_products_alone() -> None:
    calibration = Calibration()
    x = torch.randn(1, 5, 8, requires_grad=True) * 1
    q, k = (calibration.observe(f"{name}.weight", x) for name in "qk")
    assert k is q
    (q.sum() + 2 * k.sum() + 100 * x.sum()).backward()  # what else reads an activation is not rounded
    assert calibration.seen("backbone.q.weight").gradients.unique().tolist() == [3.0]


@needs_dot
def test_a_weight_of_two_activations_is_smoothed_as_each_of_them_is() -> None:
    # As DeBERTa's key weights, which read the hidden states and, in a group with another weight, distances.
    calibration = Calibration()
    calibration.reward_std = 1e4
    made = [activations(300), np.ascontiguousarray(activations(300)[..., ::-1])]  # other channels are large
    seen = [torch.from_numpy(each).requires_grad_() for each in made]
    sum(calibration.observe(f"{name}.weight", x).sum() for name, x in zip("wv", seen, strict=True)).backward()
    calibration.texts = 1
    model = product(WEIGHT)
    (x,), (w,) = model.graph.inputs, model.graph.initializers.values()
    z = ir.Value(name="z", shape=x.shape, type=x.type)
    tensor = ir.tensor(WEIGHT[::-1].copy(), name="backbone.v.weight")
    v = ir.Value(name=tensor.name, const_value=tensor, shape=w.shape, type=w.type)
    model.graph.inputs.append(z)
    model.graph.register_initializer(v)
    for name, weight in (("zv", v), ("zw", w)):
        node = ir.node("MatMul", [z, weight])
        last = ir.node("Identity", [node.outputs[0]])
        last.outputs[0].name, last.outputs[0].type = name, x.type
        model.graph.extend([node, last])
        model.graph.outputs.append(last.outputs[0])
    data = ir.serde.serialize_model(quantize(model, calibration)).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    found = session.run(None, dict(zip("xz", made, strict=True)))
    true = (made[0] @ WEIGHT, made[1] @ WEIGHT[::-1], made[1] @ WEIGHT)
    for each, expected in zip(found, true, strict=True):
        assert np.sqrt(np.mean((each - expected) ** 2)) < 0.02 * expected.std()


@needs_dot
def test_scales_go_into_norms_and_weights_and_only_attention_is_scaled_by_itself(made: Bundle) -> None:
    graph = ir.load(made.path / "model.int8.onnx").graph
    attentions = sum(node.op_type.endswith("Attention") for node in graph)
    assert attentions > 0
    assert sum(name.endswith(".smooth") for name in graph.initializers) == attentions
    exact = ir.load(made.path / "model.onnx").graph
    gain = "backbone.layers.0.input_layernorm.weight"
    values = [each.initializers[gain].const_value for each in (graph, exact)]
    assert all(value is not None for value in values)
    assert (values[0].numpy() != values[1].numpy()).any()  # type: ignore[union-attr]


@needs_dot
def test_a_token_of_zeros_stays_zero() -> None:
    weight = RNG.standard_normal((128, 8)).astype(np.float32)
    assert (run(quantize(product(weight)), np.zeros((1, 3, 128), np.float32)) == 0).all()


@pytest.mark.parametrize(("bits", "rows"), [(8, 128), (4, 128), (8, 50), (4, 50)])
def test_weights_alone_are_rounded_by_block(bits: Literal[4, 8], rows: int) -> None:
    weight = RNG.standard_normal((rows, 24)).astype(np.float32)
    x = RNG.standard_normal((1, 5, rows)).astype(np.float32)
    rounded = weight.copy()
    for start in range(0, rows, 32):
        block = weight[start : start + 32]
        steps = np.abs(block).max(0) / (2 ** (bits - 1) - 1)
        rounded[start : start + 32] = np.rint(block / steps) * steps
    found = run(quantize_weights(product(weight), bits=bits), x)
    assert np.abs(found - x @ rounded).max() < 1e-4
    assert np.abs(found - x @ weight).max() > 1e-3


@needs_dot
@pytest.mark.parametrize("compiled", [True, False])
def test_int8_gives_the_same_bits_in_any_company(made: Bundle, monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    if not compiled:  # onnxruntime's kernels, in the functions of the graph
        monkeypatch.setattr(kernels, "LIBRARY", made.path / "none.so")
    plain = RewardModel.load(made.path, provider="cpu", precision="int8", prefix_reuse=False)
    texts = awkward_texts(400)
    expected = [rewards(plain, [text])[0] for text in texts]
    for chunk in (5, 10_000):
        monkeypatch.setattr(prefix, "CHUNK", chunk)
        model = RewardModel.load(made.path, provider="cpu", precision="int8", prefix_cache_mb=8)
        order = np.random.default_rng(chunk).permutation(len(texts)).tolist()
        for size in (1, 9, len(texts)):
            for start in range(0, len(order), size):
                part = order[start : start + size]
                assert rewards(model, [texts[index] for index in part]) == [expected[index] for index in part]
        assert model.statistics.shared > 0.5


def test_the_certificate_says_how_near_each_precision_stays(made: Bundle) -> None:
    near = {item.precision: item.fidelity for item in made.manifest.certificates}
    assert near.pop("fp32") is None
    limits = {"int8": 0.03, "weights8": 0.01, "weights4": 0.2}
    for precision, fidelity in near.items():
        assert fidelity is not None
        assert fidelity.rms_std < limits[precision]
        assert fidelity.pair_order_agreement > 0.97
        assert 0.001 < fidelity.bf16_rms_std < 0.03
        assert fidelity.texts == (14 if precision == "int8" else 29)  # half of the golden texts calibrated it
    assert read_bundle(made.path).manifest == made.manifest


def with_fidelity(made: Bundle, **changes: float) -> Bundle:
    good = Fidelity(20, 0.01, 1.0, 0.02, 1.0)
    variants = tuple(
        dataclasses.replace(variant, precision="int8", needs=("avx_vnni", "dotprod"))
        if variant.precision == "weights8"
        else variant
        for variant in made.manifest.variants[:2]
    )
    certificates = [made.manifest.certificates[0]]
    certificates += [
        dataclasses.replace(
            made.manifest.certificates[1], precision="int8", fidelity=dataclasses.replace(good, **changes)
        )
    ]
    return dataclasses.replace(
        made, manifest=dataclasses.replace(made.manifest, variants=variants, certificates=tuple(certificates))
    )


@pytest.mark.parametrize(
    ("sets", "rms", "chosen"),
    [
        (("avx2", "avx_vnni"), 0.01, "int8"),
        (("avx2",), 0.01, "fp32"),
        (None, 0.01, "fp32"),
        (("avx_vnni",), 0.03, "int8"),
        (("avx_vnni",), 0.031, "fp32"),
    ],
)
def test_auto_takes_int8_where_machine_and_certificate_allow(
    made: Bundle, monkeypatch: pytest.MonkeyPatch, sets: Any, rms: float, chosen: str
) -> None:
    monkeypatch.setattr(bundle, "read_processor", lambda: Processor("A CPU", sets, 2, 2, None))
    assert with_fidelity(made, rms_std=rms).variant().precision == chosen


@needs_dot
def test_a_processor_that_would_overflow_is_refused(made: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "read_processor", lambda: Processor("A CPU", ("avx2",), 2, 2, None))
    with pytest.raises(BundleError, match="int8 graph needs a CPU with avx512_vnni or avx_vnni or dotprod"):
        RewardModel.load(made.path, provider="cpu", precision="int8")


@needs_dot
def test_auto_scores_with_int8_and_says_so(made: Bundle) -> None:
    model = RewardModel.load(made.path)
    assert model.precision == "int8"
    exact = RewardModel.load(made.path, precision="fp32")
    found, expected = ([each.score(prompt="Hi", response=answer) for answer in "abc"] for each in (model, exact))
    assert found != expected
    assert np.abs(np.subtract(found, expected)).max() < 0.1 * 1.915  # a twentieth of the rewards' spread


@needs_dot
@pytest.mark.parametrize("model_type", ["bert", "deberta-v2"])  # norms beside residuals; weights of two activations
def test_encoders_stay_near_in_int8(tmp_path: Path, model_type: str) -> None:
    write_encoder(tmp_path / "rm", model_type)
    made = export(tmp_path / "rm", tmp_path / "bundle", precisions=("int8",))
    fidelity = made.manifest.certificates[0].fidelity
    assert fidelity is not None
    assert fidelity.rms_std < 0.1  # random weights of 32 channels: torch bfloat16 has 0.02 to 0.03
    assert fidelity.bf16_rms_std < 0.1


def rewards_of(model: ir.Model, ids: np.ndarray, *, kernel: bool) -> np.ndarray:
    """Run a decoder's graph on texts of one length, with an empty past."""
    options = onnxruntime.SessionOptions()
    if kernel:
        kernels.register(options)
    data = ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    feeds: dict[str, Any] = {"input_ids": ids, "lengths": np.full(len(ids), ids.shape[1])}
    for item in session.get_inputs():
        if item.name.startswith("past"):
            dtype = np.float16 if "16" in item.type else np.float32
            feeds[item.name] = np.empty((len(ids), item.shape[1], 0, item.shape[3]), dtype)
    return np.asarray(session.run(["rewards"], feeds)[0])


CALLED = {
    "norms": "Norm",
    "sums": "Add",
    "gates": "Gate",
    "products": "Triple",
    "roundings": "RoundProduct",
    "attention": "Attention",
}  # what the operators' names hold


@needs_dot
@pytest.mark.parametrize("passes", [*[(name,) for name in CALLED], tuple(CALLED)])
def test_fusions_keep_the_numbers(passes: tuple[str, ...], made: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def lowered(names: tuple[str, ...]) -> ir.Model:
        def chosen(model: ir.Model) -> None:
            for name in names:
                getattr(fuse, f"fuse_{name}")(model)
            common_passes.RemoveUnusedNodesPass()(model)
            if names:
                pool_early(model)
                common_passes.RemoveUnusedNodesPass()(model)

        monkeypatch.setattr(quantize_module, "fuse", chosen)
        model = ir.load(made.path / "model.onnx")
        ir.external_data.load_to_model(model)
        return quantize(model)

    ids = np.random.default_rng(1).integers(10, 2000, (3, 50))
    expected = rewards_of(lowered(()), ids, kernel=False)
    model = lowered(passes)
    kinds = [node.op_type for node in model.graph if node.domain == "rewardrt"]
    assert all(any(CALLED[name] in kind for kind in kinds) for name in passes)
    spread = 1.9  # standard deviations of this model's rewards
    assert np.abs(rewards_of(model, ids, kernel=False) - expected).max() < 0.002 * spread
    assert np.abs(rewards_of(model, ids, kernel=True) - expected).max() < 0.02 * spread  # attention in 16 bits


@needs_dot
def test_after_the_last_attention_only_the_tokens_that_are_read_are_computed(made: Bundle) -> None:
    graph = ir.load(made.path / "model.int8.onnx").graph
    kinds = [node.op_type for node in graph]
    last = max(place for place, kind in enumerate(kinds) if kind.endswith("Attention"))
    gathers = [place for place, kind in enumerate(kinds) if kind == "GatherND"]
    products = [place for place, kind in enumerate(kinds) if "Product" in kind]
    assert len(gathers) == 2  # attention's result, and the residual beside it
    assert min(gathers) > last
    late = [kinds[place].partition("Product")[2].removeprefix("Twice") for place in products if place > max(gathers)]
    assert late == ["Add", "Gate", "Add"]  # o, gate and up, down
