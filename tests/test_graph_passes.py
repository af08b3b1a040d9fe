"""Each graph pass on a graph of a few nodes: what it promises after, where what it needs is there before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import onnxruntime
import pytest
import torch

from rewardrt.bundle.precisions import INTEGER_DOT
from rewardrt.errors import CheckpointError, ExportError, TraceError
from rewardrt.machine.processor import read_processor
from rewardrt_export.precisions import quantize as quantize_module
from rewardrt_export.precisions.calibrate import Calibration
from rewardrt_export.precisions.functions import pack
from rewardrt_export.precisions.fuse import fuse_gates, fuse_norms, fuse_products, fuse_roundings, fuse_sums
from rewardrt_export.precisions.fuse_attention import fuse_attention
from rewardrt_export.precisions.half import halve
from rewardrt_export.precisions.operators import define, operator_of
from rewardrt_export.precisions.pool import pool_early
from rewardrt_export.precisions.quantize import quantize, quantize_weights
from rewardrt_export.precisions.smoothing import Smoothing
from rewardrt_export.precisions.storage import store
from rewardrt_export.tracing.lower import bind_weights, lower, store_transposed

Array = npt.NDArray[Any]
RNG = np.random.default_rng(17)
W = RNG.standard_normal((64, 64)).astype(np.float32)
V = RNG.standard_normal((64, 64)).astype(np.float32)
GAIN = RNG.uniform(0.5, 2, 64).astype(np.float32)
X = RNG.standard_normal((2, 3, 64)).astype(np.float32)
STATES = "float[batch,tokens,64]"
needs_dot = pytest.mark.skipif(
    not set(INTEGER_DOT) & set(read_processor().instruction_sets or ()), reason="integer products would overflow here"
)


def graph(inputs: str, outputs: str, values: str, nodes: str, **weights: Array) -> ir.Model:
    """Make a model of ONNX's text form; `values` are the types of what nodes give. backbone_w is named backbone.w.

    `out` is given on by an Identity: a head follows, so that no pass replaces an output of the graph.
    """
    first, _, others = outputs.partition(" out")
    outputs, values = f"{first} given{others}", f"{first} out, {values}".rstrip(", ")
    types = {"float32": "float", "int8": "int8", "int64": "int64"}
    declared = [f"{types[str(each.dtype)]}[{','.join(map(str, each.shape))}] {name}" for name, each in weights.items()]
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 23, "rewardrt": 1, "com.microsoft": 1]>\n'
        f"few ({', '.join(filter(None, [inputs, *declared]))}) => ({outputs}) <{values}> {{ {nodes} given = Identity(out) }}"
    )
    for value in list(model.graph.inputs):
        if value.name in weights:
            array = weights[value.name]
            model.graph.inputs.remove(value)
            value.name = value.name.replace("_", ".", 1)
            value.const_value = ir.tensor(array, name=value.name)
            model.graph.register_initializer(value)
    return model


def run(model: ir.Model, **feeds: Array) -> list[Array]:
    """Run a model as it is, its functions added; onnxruntime knows nothing of the kernels here."""
    whole = model.clone()
    define(whole)
    data = ir.serde.serialize_model(whole).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def kinds(model: ir.Model) -> list[str]:
    """Return the kinds of the nodes that are left when those that nothing reads are gone, but for the Identity."""
    common_passes.RemoveUnusedNodesPass()(model)
    return [node.op_type for node in model.graph if node.op_type != "Identity"]


def rounded(name: str, after: str = "", **weights: Array) -> ir.Model:
    """Make a graph that rounds x and multiplies it, as int8 graphs do before nodes are fused, and then does `after`."""
    return graph(
        f"{STATES} x, {STATES} other",
        f"{STATES} out",
        f"uint8[batch,tokens,64] p, float[batch,tokens,1] s, {STATES} y, {STATES} z, {STATES} a, {STATES} b, {STATES} c",
        f"{name} {after}",
        **weights,
    )


ROUND = "p, s = rewardrt.RoundTokens<channels=64>(x)"
PACKED = {
    f"backbone_{name}": pack(np.rint(10 * weight).clip(-127, 127).astype(np.int8))
    for name, weight in (("w", W), ("v", V))
} | {"backbone_c": np.full(64, 0.1, np.float32)}
MULTIPLY = "y = rewardrt.Product(p, s, backbone_w, backbone_c)"
OTHER = "z = rewardrt.Product(p, s, backbone_v, backbone_c)"


def fused(model: ir.Model, *passes: Callable[[ir.Model], None]) -> list[str]:
    """Run passes, and hold the numbers to those of before."""
    feeds = {str(item.name): X if item.name == "x" else X[::-1].copy() for item in model.graph.inputs}
    before = run(model, **feeds)
    for each in passes:
        each(model)
    left = kinds(model)
    for old, new in zip(before, run(model, **feeds), strict=True):
        assert new.dtype == old.dtype
        assert np.abs(new - old).max() < 1e-5 * np.abs(old).max()
    return left


def test_a_norm_goes_into_the_rounding_that_alone_reads_it() -> None:
    norm = "a = RMSNormalization<epsilon=0.00001>(x, backbone_g) p, s = rewardrt.RoundTokens<channels=64>(a)"
    weights = PACKED | {"backbone_g": GAIN}
    assert fused(rounded(norm, f"{MULTIPLY} out = Neg(y)", **weights), fuse_norms) == [
        "NormRoundTokens", "Product", "Neg",
    ]  # fmt: skip
    assert "RMSNormalization" in fused(rounded(norm, f"{MULTIPLY} out = Add(y, a)", **weights), fuse_norms)


def test_a_sum_goes_into_the_product_that_it_alone_reads() -> None:
    assert fused(rounded(ROUND, f"{MULTIPLY} out = Add(other, y)", **PACKED), fuse_sums) == [
        "RoundTokens",
        "ProductAdd",
    ]
    twice = rounded(ROUND, f"{MULTIPLY} a = Add(other, y) out = Mul(a, y)", **PACKED)
    assert fused(twice, fuse_sums) == ["RoundTokens", "Product", "Add", "Mul"]


def test_a_gate_is_opened_where_it_is_made_or_where_the_result_is_rounded() -> None:
    silu = "a = Sigmoid(y) b = Mul(y, a)"
    made = rounded(ROUND, f"{MULTIPLY} {OTHER} {silu} out = Mul(b, z)", **PACKED)
    assert fused(made, fuse_gates) == ["RoundTokens", "ProductGate"]
    later = graph(
        f"{STATES} y, {STATES} z",
        f"{STATES} out",
        f"{STATES} a, {STATES} b, {STATES} x, uint8[batch,tokens,64] p, float[batch,tokens,1] s",
        f"{silu} x = Mul(b, z) {ROUND} out = rewardrt.Product(p, s, backbone_w, backbone_c)",
        backbone_w=PACKED["backbone_w"],
        backbone_c=PACKED["backbone_c"],
    )
    assert fused(later, fuse_gates) == ["GateRoundTokens", "Product"]


@pytest.mark.parametrize(("count", "left"), [(1, ["Product"]), (2, ["ProductPair"]), (4, ["ProductTriple", "Product"])])
def test_products_of_one_activation_are_taken_three_at_a_time(count: int, left: list[str]) -> None:
    names = "yzab"[:count]
    each = [
        f"{name} = rewardrt.Product(p, s, backbone_{'wv'[place % 2]}, backbone_c)" for place, name in enumerate(names)
    ]
    model = rounded(ROUND, f"{' '.join(each)} out = Sum({', '.join(names)})", **PACKED)
    assert fused(model, fuse_products) == ["RoundTokens", *left, "Sum"]


def test_a_rounding_goes_into_the_one_product_that_reads_it() -> None:
    once, twice = f"{MULTIPLY} out = Neg(y)", f"{MULTIPLY} {OTHER} out = Add(y, z)"
    assert fused(rounded(ROUND, once, **PACKED), fuse_roundings) == ["RoundProduct", "Neg"]
    assert fused(rounded(ROUND, twice, **PACKED), fuse_roundings) == ["RoundTokens", "Product", "Product", "Add"]
    assert fused(rounded(ROUND, twice, **PACKED), fuse_products, fuse_roundings) == ["RoundProductPair", "Add"]


HEADS = "float[batch,4,tokens,32]"


def attention(extra: str = "", mask: str = "") -> ir.Model:
    inputs = [f"float[batch,tokens,4,32] {name}" for name in "qkv"] + [
        "float[batch,4,past,32] past_k, float[batch,4,past,32] past_v"
    ]
    turned = [f"{name}t = Transpose<perm=[0,2,1,3]>({name})" for name in "qkv"]
    return graph(
        ", ".join([*inputs, "float[batch,tokens,16] cos, float[batch,tokens,16] sin"]),
        "float[batch,tokens,4,32] out, float[batch,4,total,32] present_k, float[batch,4,total,32] present_v",
        ", ".join(f"{HEADS} {name}" for name in ("qt", "kt", "vt", "qr", "kr", "y")),
        " ".join(
            [
                *turned,
                "qr = RotaryEmbedding(qt, cos, sin) kr = RotaryEmbedding(kt, cos, sin)",
                f"y, present_k, present_v = Attention<is_causal=1, scale=0.2{extra}>(qr, kr, vt, {mask}, past_k, past_v)",
                "out = Transpose<perm=[0,2,1,3]>(y)",
            ]
        ),
    )


def test_attention_takes_in_its_transposes_and_rotation_and_keeps_its_past_in_float16() -> None:
    model, angles = attention(), RNG.uniform(0, 3, (2, 3, 16)).astype(np.float32)
    feeds = {name: RNG.standard_normal((2, 3, 4, 32)).astype(np.float32) for name in "qkv"}
    past = {f"past_{name}": RNG.standard_normal((2, 4, 2, 32)).astype(np.float16) for name in "kv"}
    turn = {"cos": np.cos(angles), "sin": np.sin(angles)}
    before = run(model, **feeds, **turn, **{name: each.astype(np.float32) for name, each in past.items()})
    fuse_attention(model)
    assert kinds(model) == ["RotaryCausalAttention"]
    found = run(model, **feeds, **turn, **past)
    assert [each.dtype for each in found] == [np.float32, np.float16, np.float16]
    assert [value.name for value in model.graph.outputs[1:]] == ["present_k", "present_v"]
    assert all(np.abs(new - old).max() < 0.01 for old, new in zip(before, found, strict=True))


def test_attention_with_a_softcap_is_left_alone() -> None:
    model = attention(", softcap=30.0")
    fuse_attention(model)
    assert "Attention" in kinds(model)
    assert all(value.dtype == ir.DataType.FLOAT for value in model.graph.inputs)


def pooled(read_elsewhere: str = "") -> ir.Model:
    return graph(
        f"{STATES} x, {STATES} other, int64[pooled,2] places",
        f"float[pooled,64] out{f', {STATES} every' if read_elsewhere else ''}",
        f"{STATES} a, {STATES} y",
        f"a = MatMul(x, backbone_w) y = Add(a, other) {read_elsewhere} out = GatherND(y, places)",
        backbone_w=W,
    )


def test_states_that_are_read_are_taken_before_the_nodes_that_treat_each_token_by_itself() -> None:
    places = np.array([[0, 2], [1, 0]])
    feeds = {"x": X, "other": X[::-1].copy(), "places": places}
    model = pooled()
    before = run(model, **feeds)
    pool_early(model)
    assert kinds(model) == ["MatMul", "Add", "GatherND"]  # the product of another number of tokens has other bits
    pool_early(model, standard=True)
    assert kinds(model) == ["GatherND", "MatMul", "GatherND", "Add"]
    assert np.abs(run(model, **feeds)[0] - before[0]).max() < 1e-4
    model = pooled("every = Neg(y)")
    pool_early(model, standard=True)
    assert kinds(model) == ["MatMul", "Add", "Neg", "GatherND"]


def block() -> ir.Model:
    """Make a norm, two products with it and a residual, of the backbone, and a head's product."""
    return graph(
        f"{STATES} x",
        f"{STATES} out",
        ", ".join(f"{STATES} {name}" for name in ("n", "a", "b", "c", "y")),
        "n = RMSNormalization<epsilon=0.00001>(x, backbone_g) a = MatMul(n, backbone_w) b = MatMul(n, backbone_v) "
        "c = Mul(a, b) y = Add(x, c) out = MatMul(y, head_h)",
        backbone_g=GAIN,
        backbone_w=W / 8,
        backbone_v=V / 8,
        head_h=W / 8,
    )


@needs_dot
def test_int8_takes_the_backbones_products_and_no_other() -> None:
    model, before = block(), run(block(), x=X)[0]
    quantize(model)
    assert kinds(model) == ["NormRoundProductTwicePair", "Mul", "Add", "MatMul"]
    assert all(operator_of(node) is not None for node in model.graph if node.domain)
    assert ("rewardrt", "NormRoundProductTwicePair", "") in model.functions
    weights = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert weights["head.h"].dtype == ir.DataType.FLOAT  # type: ignore[union-attr]
    assert weights["backbone.w.int8"].shape.numpy() == (1, 16, 64, 4)  # type: ignore[union-attr]
    assert np.abs(run(model, x=X)[0] - before).max() < 0.05 * np.abs(before).max()
    only = graph(f"{STATES} x", f"{STATES} out", "", "out = MatMul(x, head_h)", head_h=W)
    with pytest.raises(ExportError, match="no products with weights"):
        quantize(only)


@needs_dot
def test_a_scale_goes_into_the_norm_before_where_nothing_else_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    scale = RNG.uniform(0.25, 4, 64).astype(np.float32)

    class Plan:
        weights = ("backbone.w", "backbone.v")
        same = Smoothing(scale, planes=2)

        def __init__(self, calibration: Calibration, count: object) -> None: ...

        def smoothing(self, weight: str) -> Smoothing:
            return self.same

        def factor(self, weight: str) -> None:
            return None

    monkeypatch.setattr(quantize_module, "Plan", Plan)
    model, before = block(), run(block(), x=X)[0]
    quantize(model, Calibration())
    assert kinds(model) == ["NormRoundProductTwicePair", "Mul", "Add", "MatMul"]  # no Scale
    assert np.allclose(model.graph.initializers["backbone.g"].const_value.numpy(), GAIN / scale)  # type: ignore[union-attr]
    assert np.abs(run(model, x=X)[0] - before).max() < 0.05 * np.abs(before).max()
    seen = rounded("out = MatMul(x, backbone_w)", backbone_w=W)
    quantize(seen, Calibration())
    assert kinds(seen) == ["ScaleRoundProductTwice"]  # an input of the graph divides nothing


def test_weights_of_few_bits_take_the_backbones_products_and_no_other() -> None:
    model, before = block(), run(block(), x=X)[0]
    quantize_weights(model, bits=8)
    assert kinds(model) == ["RMSNormalization", "MatMulNBits", "MatMulNBits", "Mul", "Add", "MatMul"]
    packed = model.graph.initializers["backbone.w.int8"].const_value
    assert packed is not None and packed.dtype == ir.DataType.UINT8 and packed.shape.numpy() == (64, 2, 32)
    assert np.abs(run(model, x=X)[0] - before).max() < 0.05 * np.abs(before).max()


@pytest.mark.parametrize(("dtype", "ending"), [(ir.DataType.FLOAT16, "fp16"), (ir.DataType.BFLOAT16, "bf16")])
def test_stored_matrices_are_read_through_a_cast_and_vectors_stay(dtype: ir.DataType, ending: str) -> None:
    model, before = block(), run(block(), x=X)[0]
    store(model, dtype)
    assert sorted(model.graph.initializers) == ["backbone.g", f"backbone.v.{ending}", f"backbone.w.{ending}", "head.h"]
    assert model.graph.initializers[f"backbone.w.{ending}"].dtype == dtype
    assert kinds(model).count("Cast") == 2
    assert np.abs(run(model, x=X)[0] - before).max() < 0.02 * np.abs(before).max()


def test_half_multiplies_in_float16_and_adds_in_float32() -> None:
    model, before = block(), run(block(), x=X)[0]
    halve(model)
    types = {node.op_type: node.outputs[0].dtype for node in model.graph if node.op_type not in ("Cast", "Identity")}
    assert types == {
        "RMSNormalization": ir.DataType.FLOAT,
        "MatMul": ir.DataType.FLOAT,  # the last of them, the head's
        "Mul": ir.DataType.FLOAT16,
        "Add": ir.DataType.FLOAT,
    }
    assert [node.outputs[0].dtype for node in model.graph if node.op_type == "MatMul"] == [
        ir.DataType.FLOAT16, ir.DataType.FLOAT16, ir.DataType.FLOAT,
    ]  # fmt: skip
    assert np.abs(run(model, x=X)[0] - before).max() < 0.01 * np.abs(before).max()


def linear(weight: Array) -> ir.Model:
    """Make a product as torch stores it, the weight [out, in], which is looked up too where `x` is."""
    return graph(
        f"{STATES} x",
        f"{STATES} out",
        f"float[64,64] t, {STATES} y",
        "t = Transpose<perm=[1,0]>(backbone_w) y = MatMul(x, t) out = Neg(y)",
        backbone_w=weight,
    )


def test_a_weight_that_is_only_read_transposed_is_stored_transposed() -> None:
    model = linear(W)
    before = run(model, x=X)[0]
    store_transposed(model)
    assert kinds(model) == ["MatMul", "Neg"]
    assert np.array_equal(model.graph.initializers["backbone.w"].const_value.numpy(), W.T)  # type: ignore[union-attr]
    assert np.array_equal(run(model, x=X)[0], before)
    tied = graph(
        f"int64[batch,tokens] ids, {STATES} x",
        f"{STATES} out",
        f"float[64,64] t, {STATES} y, {STATES} rows",
        "rows = Gather(backbone_w, ids) t = Transpose<perm=[1,0]>(backbone_w) y = MatMul(x, t) out = Add(y, rows)",
        backbone_w=W,
    )
    store_transposed(tied)
    assert kinds(tied) == ["Gather", "Transpose", "MatMul", "Add"]


def test_weights_are_bound_by_name_and_read_when_they_are_written() -> None:
    read = []

    def reader(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: (read.append(1), tensor)[1]

    model = linear(W)
    bind_weights(model, {"backbone.w": reader(torch.from_numpy(V))})
    assert not read
    weight = model.graph.initializers["backbone.w"].const_value
    assert weight is not None and np.array_equal(weight.numpy(), V) and read == [1]
    for wrong, said in ((torch.zeros(3, 64), "shape"), (torch.full((64, 64), torch.nan), "not finite")):
        bind_weights(model, {"backbone.w": reader(wrong)})
        with pytest.raises(CheckpointError, match=f"^backbone.w: .*{said}"):
            model.graph.initializers["backbone.w"].const_value.numpy()  # type: ignore[union-attr]


def test_a_weight_that_nothing_gives_is_named() -> None:
    model = linear(W)
    with torch._subclasses.FakeTensorMode():
        fake = ir.tensor_adapters.TorchTensor(torch.zeros(64, 64), name="backbone.w")
    model.graph.initializers["backbone.w"].const_value = fake
    with pytest.raises(TraceError, match=r"^backbone\.w: the graph needs a tensor that the checkpoint does not give$"):
        bind_weights(model, {})


def test_lowering_leaves_each_computation_once_and_no_trace_of_this_machine() -> None:
    model = graph(
        f"{STATES} x",
        f"{STATES} out",
        f"float[64,64] t, {STATES} y, {STATES} z, {STATES} a, {STATES} unread",
        "t = Transpose<perm=[1,0]>(backbone_w) y = MatMul(x, t) a = Sigmoid(y) z = Sigmoid(y) out = Mul(a, z) "
        "unread = Neg(x)",
        backbone_w=W,
    )
    for node in model.graph:
        node.metadata_props["pkg.torch.onnx.stack_trace"] = "File /home/somebody/model.py"
    before = run(model, x=X)[0]
    lower(model, {"backbone.w": lambda: torch.from_numpy(W)})
    assert kinds(model) == ["MatMul", "Sigmoid", "Mul"]
    assert not any(node.metadata_props for node in model.graph)
    assert np.array_equal(run(model, x=X)[0], before)
