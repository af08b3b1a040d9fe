"""The operators of int8 graphs: each a function of standard nodes, for which the runtime brings a kernel of its own.

A graph that calls them is complete: onnxruntime puts a function's nodes in the place of the call wherever no kernel is
registered under its name. The kernels are in runtime/kernels. What an operator takes and gives may never change
under its name: a kernel that does not fit is an error, not a reason to take the function.

A weight W [K, N] of integers is stored in panels of 64 columns, [ceil(N / 64), K / 4, 64, 4], as the processor's
instructions take it: the four bytes of four channels of one column lie together.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.tape import Tape
from onnxscript import FLOAT, FLOAT16, INT8, UINT8, opset23, script
from onnxscript.values import OnnxFunction, Opset

DOMAIN = "rewardrt"
PANEL = 64  # columns
CHANNELS = 4  # that lie together
MIXED = 64  # channels of a block that is multiplied with a Hadamard matrix; with 16, rounding's damage is a sixth more

if TYPE_CHECKING:  # tensors of any shape
    Floats: TypeAlias = Any
    Halves: TypeAlias = Any
    Bytes: TypeAlias = Any
    Integers: TypeAlias = Any
else:
    Floats, Halves, Bytes, Integers = FLOAT[...], FLOAT16[...], UINT8[...], INT8[...]

op: Any = opset23
own: Any = Opset(DOMAIN, 1)
microsoft: Any = Opset("com.microsoft", 1)


def pack(integers: npt.NDArray[np.int8]) -> npt.NDArray[np.int8]:
    """Return a weight [K, N], K a multiple of 4, in panels; zeros stand for the columns that the last one lacks."""
    rows, columns = integers.shape
    wide = np.pad(integers, ((0, 0), (0, -columns % PANEL)))
    panels = wide.reshape(rows // CHANNELS, CHANNELS, -1, PANEL).transpose(2, 0, 3, 1)
    return np.ascontiguousarray(panels)


def hadamard() -> npt.NDArray[np.float32]:
    """Return the symmetric orthogonal matrix [MIXED, MIXED] that blocks are mixed with."""
    matrix = np.ones((1, 1), dtype=np.float32)
    while len(matrix) < MIXED:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(np.sqrt(MIXED))


_HADAMARD = ir.to_proto(ir.tensor(hadamard(), name="hadamard"))


@script(own, default_opset=op)
def Mix(values: Floats) -> Floats:
    """Multiply each block of MIXED channels with a Hadamard matrix."""
    ahead = op.Shape(values, start=0, end=-1)
    blocks = op.Reshape(values, op.Concat(ahead, op.Constant(value_ints=[-1, MIXED]), axis=0))
    return op.Reshape(op.MatMul(blocks, op.Constant(value=_HADAMARD)), op.Shape(values))


@script(own, default_opset=op)
def Steps(values: Floats) -> Floats:
    """Return the step of each token: 1/127 of its largest value, and never 0: it is divided by."""
    axis = op.Constant(value_ints=[-1])
    highest = op.ReduceMax(values, axis)
    lowest = op.ReduceMin(values, axis)
    return op.Mul(op.Max(highest, op.Neg(lowest), op.Constant(value_float=1e-30)), op.Constant(value_float=1 / 127))


@script(own, default_opset=op)
def Zeros(steps: Floats) -> Bytes:
    """Return a zero point for each step: QuantizeLinear wants as many. In the largest numbers there are, all are 0."""
    return op.QuantizeLinear(steps, op.Constant(value_float=3e38), op.Cast(op.Constant(value_int=128), to=2))


@script(own, default_opset=op)
def RoundTokens(values: Floats, channels: int) -> tuple[Bytes, Floats]:
    """Round each token in steps of its own: q(x / s) around 128, and s. A block of QuantizeLinear is a token."""
    steps = own.Steps(values)
    plane = op.QuantizeLinear(values, steps, own.Zeros(steps), axis=-1, block_size=channels)
    return plane, steps


@script(own, default_opset=op)
def RoundTokensTwice(values: Floats, channels: int) -> tuple[Bytes, Bytes, Floats]:
    """Round each token, and what that left over, at most half a step, in steps of s / 254."""
    steps = own.Steps(values)
    zeros = own.Zeros(steps)
    plane = op.QuantizeLinear(values, steps, zeros, axis=-1, block_size=channels)
    over = op.Sub(values, op.DequantizeLinear(plane, steps, zeros, axis=-1, block_size=channels))
    finer = op.Mul(steps, op.Constant(value_float=1 / 254))
    rest = op.QuantizeLinear(over, finer, zeros, axis=-1, block_size=channels)
    return plane, rest, steps


@script(own, default_opset=op)
def RoundTokensMixed(values: Floats, channels: int) -> tuple[Bytes, Floats]:
    """Mix each token, then round it."""
    plane, steps = own.RoundTokens(own.Mix(values), channels=channels)
    return plane, steps


@script(own, default_opset=op)
def RoundTokensMixedTwice(values: Floats, channels: int) -> tuple[Bytes, Bytes, Floats]:
    """Mix each token, then round it twice."""
    plane, rest, steps = own.RoundTokensTwice(own.Mix(values), channels=channels)
    return plane, rest, steps


@script(own, default_opset=op)
def ScaleRoundTokens(values: Floats, gain: Floats, channels: int) -> tuple[Bytes, Floats]:
    """Multiply each token with a gain, and round it."""
    plane, steps = own.RoundTokens(op.Mul(values, gain), channels=channels)
    return plane, steps


@script(own, default_opset=op)
def ScaleRoundTokensTwice(values: Floats, gain: Floats, channels: int) -> tuple[Bytes, Bytes, Floats]:
    """Multiply each token with a gain, and round it twice."""
    plane, rest, steps = own.RoundTokensTwice(op.Mul(values, gain), channels=channels)
    return plane, rest, steps


@script(own, default_opset=op)
def ScaleRoundTokensMixed(values: Floats, gain: Floats, channels: int) -> tuple[Bytes, Floats]:
    """Multiply each token with a gain, mix it and round it."""
    plane, steps = own.RoundTokensMixed(op.Mul(values, gain), channels=channels)
    return plane, steps


@script(own, default_opset=op)
def ScaleRoundTokensMixedTwice(values: Floats, gain: Floats, channels: int) -> tuple[Bytes, Bytes, Floats]:
    """Multiply each token with a gain, mix it and round it twice."""
    plane, rest, steps = own.RoundTokensMixedTwice(op.Mul(values, gain), channels=channels)
    return plane, rest, steps


@script(own, default_opset=op)
def NormRoundTokens(values: Floats, gain: Floats, channels: int, epsilon: float) -> tuple[Bytes, Floats]:
    """Divide each token by its root mean square, multiply it with a gain, and round it."""
    normal = op.RMSNormalization(values, gain, axis=-1, epsilon=epsilon)
    plane, steps = own.RoundTokens(normal, channels=channels)
    return plane, steps


@script(own, default_opset=op)
def NormRoundTokensTwice(values: Floats, gain: Floats, channels: int, epsilon: float) -> tuple[Bytes, Bytes, Floats]:
    """Normalise each token and round it twice."""
    normal = op.RMSNormalization(values, gain, axis=-1, epsilon=epsilon)
    plane, rest, steps = own.RoundTokensTwice(normal, channels=channels)
    return plane, rest, steps


@script(own, default_opset=op)
def NormRoundTokensMixed(values: Floats, gain: Floats, channels: int, epsilon: float) -> tuple[Bytes, Floats]:
    """Normalise each token, mix it and round it."""
    normal = op.RMSNormalization(values, gain, axis=-1, epsilon=epsilon)
    plane, steps = own.RoundTokensMixed(normal, channels=channels)
    return plane, steps


@script(own, default_opset=op)
def NormRoundTokensMixedTwice(
    values: Floats, gain: Floats, channels: int, epsilon: float
) -> tuple[Bytes, Bytes, Floats]:
    """Normalise each token, mix it and round it twice."""
    normal = op.RMSNormalization(values, gain, axis=-1, epsilon=epsilon)
    plane, rest, steps = own.RoundTokensMixedTwice(normal, channels=channels)
    return plane, rest, steps


@script(own, default_opset=op)
def GateUp(gate: Floats, up: Floats) -> Floats:
    """Return silu(gate) up."""
    return op.Mul(op.Mul(gate, op.Sigmoid(gate)), up)


@script(own, default_opset=op)
def GateRoundTokens(gate: Floats, up: Floats, channels: int) -> tuple[Bytes, Floats]:
    """Take silu(gate) up of each token, and round it."""
    plane, steps = own.RoundTokens(own.GateUp(gate, up), channels=channels)
    return plane, steps


@script(own, default_opset=op)
def GateRoundTokensTwice(gate: Floats, up: Floats, channels: int) -> tuple[Bytes, Bytes, Floats]:
    """Take silu(gate) up of each token, and round it twice."""
    plane, rest, steps = own.RoundTokensTwice(own.GateUp(gate, up), channels=channels)
    return plane, rest, steps


@script(own, default_opset=op)
def GateRoundTokensMixed(gate: Floats, up: Floats, channels: int) -> tuple[Bytes, Floats]:
    """Take silu(gate) up of each token, and mix it and round it."""
    plane, steps = own.RoundTokensMixed(own.GateUp(gate, up), channels=channels)
    return plane, steps


@script(own, default_opset=op)
def GateRoundTokensMixedTwice(gate: Floats, up: Floats, channels: int) -> tuple[Bytes, Bytes, Floats]:
    """Take silu(gate) up of each token, and mix it and round it twice."""
    plane, rest, steps = own.RoundTokensMixedTwice(own.GateUp(gate, up), channels=channels)
    return plane, rest, steps


@script(own, default_opset=op)
def Unpack(weight: Integers, columns: Floats) -> Integers:
    """Return a weight in panels as [K, N]; `columns` [N]. onnxruntime does so once, when it loads the graph."""
    wide = op.Concat(
        op.Constant(value_ints=[-1]), op.Mul(op.Shape(weight, start=0, end=1), op.Constant(value_ints=[64])), axis=0
    )
    rows = op.Reshape(op.Transpose(weight, perm=[1, 3, 0, 2]), wide)
    return op.Slice(rows, op.Constant(value_ints=[0]), op.Shape(columns), op.Constant(value_ints=[1]))


@script(own, default_opset=op)
def PlaneProduct(plane: Bytes, steps: Floats, weight: Integers, columns: Floats, step: float) -> Floats:
    """Multiply one plane, in `step` of its tokens' steps, with a weight whose columns have steps of their own."""
    integers = own.Unpack(weight, columns)
    zero = op.Cast(op.Constant(value_int=128), to=2)
    result = microsoft.MatMulIntegerToFloat(plane, integers, op.Constant(value_float=step), columns, zero)
    return op.Mul(result, steps)


@script(own, default_opset=op)
def Product(plane: Bytes, steps: Floats, weight: Integers, columns: Floats) -> Floats:
    """Multiply rounded tokens."""
    return own.PlaneProduct(plane, steps, weight, columns, step=1.0)


@script(own, default_opset=op)
def Rest(rest: Bytes, steps: Floats, weight: Integers, columns: Floats) -> Floats:
    """Multiply what was rounded the second time."""
    return own.PlaneProduct(rest, steps, weight, columns, step=1 / 254)


@script(own, default_opset=op)
def ProductTwice(plane: Bytes, rest: Bytes, steps: Floats, weight: Integers, columns: Floats) -> Floats:
    """Multiply tokens that were rounded twice."""
    return op.Add(own.Product(plane, steps, weight, columns), own.Rest(rest, steps, weight, columns))


@script(own, default_opset=op)
def ProductAdd(plane: Bytes, steps: Floats, weight: Integers, columns: Floats, added: Floats) -> Floats:
    """Multiply rounded tokens, and add what is there already."""
    return op.Add(own.Product(plane, steps, weight, columns), added)


@script(own, default_opset=op)
def ProductTwiceAdd(
    plane: Bytes, rest: Bytes, steps: Floats, weight: Integers, columns: Floats, added: Floats
) -> Floats:
    """Multiply tokens that were rounded twice, and add what is there already."""
    return op.Add(own.ProductAdd(plane, steps, weight, columns, added), own.Rest(rest, steps, weight, columns))


@script(own, default_opset=op)
def ProductGate(
    plane: Bytes, steps: Floats, gate: Integers, gate_columns: Floats, up: Integers, up_columns: Floats
) -> Floats:
    """Multiply rounded tokens with two weights, and take silu(gate) up of the results."""
    return own.GateUp(own.Product(plane, steps, gate, gate_columns), own.Product(plane, steps, up, up_columns))


@script(own, default_opset=op)
def ProductTwiceGate(
    plane: Bytes, rest: Bytes, steps: Floats, gate: Integers, gate_columns: Floats, up: Integers, up_columns: Floats
) -> Floats:
    """Multiply tokens that were rounded twice with two weights, and take silu(gate) up of the results."""
    opened = own.ProductTwice(plane, rest, steps, gate, gate_columns)
    return own.GateUp(opened, own.ProductTwice(plane, rest, steps, up, up_columns))


@script(own, default_opset=op)
def CausalAttention(
    query: Floats,
    key: Floats,
    value: Floats,
    past_key: Halves,
    past_value: Halves,
    scale: float,
) -> tuple[Floats, Halves, Halves]:
    """Attend from [batch, tokens, heads, size]; keys and values are what float16 holds of them, past or not."""
    keys = op.Cast(op.Cast(op.Transpose(key, perm=[0, 2, 1, 3]), to=10), to=1)
    values = op.Cast(op.Cast(op.Transpose(value, perm=[0, 2, 1, 3]), to=10), to=1)
    result, present_key, present_value = op.Attention(
        op.Transpose(query, perm=[0, 2, 1, 3]),
        keys,
        values,
        None,
        op.Cast(past_key, to=1),
        op.Cast(past_value, to=1),
        is_causal=1,
        scale=scale,
    )
    kept_key = op.Cast(present_key, to=10)
    kept_value = op.Cast(present_value, to=10)
    return op.Transpose(result, perm=[0, 2, 1, 3]), kept_key, kept_value


@script(own, default_opset=op)
def RotaryCausalAttention(
    query: Floats,
    key: Floats,
    value: Floats,
    past_key: Halves,
    past_value: Halves,
    cosines: Floats,
    sines: Floats,
    scale: float,
) -> tuple[Floats, Halves, Halves]:
    """Rotate queries and new keys by angles [batch, tokens, size / 2], then attend."""
    turned = op.RotaryEmbedding(op.Transpose(query, perm=[0, 2, 1, 3]), cosines, sines)
    keys = op.RotaryEmbedding(op.Transpose(key, perm=[0, 2, 1, 3]), cosines, sines)
    result, present_key, present_value = own.CausalAttention(
        op.Transpose(turned, perm=[0, 2, 1, 3]),
        op.Transpose(keys, perm=[0, 2, 1, 3]),
        value,
        past_key,
        past_value,
        scale=scale,
    )
    return result, present_key, present_value


OPERATORS: tuple[OnnxFunction[Any, Any], ...] = (
    Mix, Steps, Zeros, GateUp, Unpack, PlaneProduct, Rest,
    RoundTokens, RoundTokensTwice, RoundTokensMixed, RoundTokensMixedTwice,
    ScaleRoundTokens, ScaleRoundTokensTwice, ScaleRoundTokensMixed, ScaleRoundTokensMixedTwice,
    GateRoundTokens, GateRoundTokensTwice, GateRoundTokensMixed, GateRoundTokensMixedTwice,
    NormRoundTokens, NormRoundTokensTwice, NormRoundTokensMixed, NormRoundTokensMixedTwice,
    Product, ProductTwice, ProductAdd, ProductTwiceAdd,
    ProductGate, ProductTwiceGate, CausalAttention, RotaryCausalAttention,
)  # fmt: skip


# What is not written out above: products of several weights, and rounding with the products that read it.
_PRODUCT = re.compile("((?:(?:Scale|Norm|Gate|)Round(?:Mixed|))?)(Product(?:Twice|))(Add|Gate|Pair|Triple|)")
_WEIGHTS = {"": 1, "Add": 1, "Gate": 2, "Pair": 2, "Triple": 3}  # of a product; each has the steps of its columns
_RESULTS = {"Pair": 2, "Triple": 3}  # else 1


def rounded_product(rounding: str, product: str) -> str:
    """Return the name of the operator that rounds and multiplies: NormRoundMixedProductAdd."""
    return rounding.replace("RoundTokens", "Round").removesuffix("Twice") + product


def _product(name: str) -> ir.Function:
    """Make the function of an operator that multiplies with several weights, or that rounds before: calls of others."""
    parts = _PRODUCT.fullmatch(name)
    if parts is None:
        raise ValueError(f"no operator {name!r}")
    rounding, product, kind = parts.groups()
    twice = product.removeprefix("Product")
    weights = [[ir.Value(name=f"{part}{i}") for part in ("weight", "columns")] for i in range(_WEIGHTS[kind])]
    flat = [value for weight in weights for value in weight]
    added = [ir.Value(name="added")] if kind == "Add" else []
    kinds: dict[str, ir.AttributeType] = {}
    tape = Tape()
    if rounding:
        kinds["channels"] = ir.AttributeType.INT
        if rounding.startswith("Norm"):
            kinds["epsilon"] = ir.AttributeType.FLOAT
        inputs = [ir.Value(name=name) for name in ("values", *([] if rounding.startswith("Round") else ["second"]))]
        planes = tape.op_multi_out(
            rounding.replace("Round", "RoundTokens") + twice,
            inputs,
            {key: ir.RefAttr(key, key, type_) for key, type_ in kinds.items()},
            num_outputs=3 if twice else 2,
            domain=DOMAIN,
        )
        results = tape.op_multi_out(
            product + kind, [*planes, *flat, *added], num_outputs=_RESULTS.get(kind, 1), domain=DOMAIN
        )
    else:
        inputs = planes = [ir.Value(name=name) for name in ("plane", *(["rest"] if twice else []), "steps")]
        results = [tape.op(product, [*planes, *weight], domain=DOMAIN) for weight in weights]
    for place, value in enumerate(value for node in tape.nodes for value in node.outputs):
        value.name = f"made{place}"
    graph = ir.Graph([*inputs, *flat, *added], results, nodes=tape.nodes, opset_imports={DOMAIN: 1})
    needed = [ir.Attr(key, ir.AttributeType.UNDEFINED, None) for key in kinds]
    return ir.Function(DOMAIN, name, graph=graph, attributes=needed)


def define(model: ir.Model) -> None:
    """Give the model the functions that its nodes call, and those that these call."""
    functions: dict[str, ir.Function] = {
        function.name: ir.serde.deserialize_function(function.to_function_proto()) for function in OPERATORS
    }
    pending = [node.op_type for node in model.graph if node.domain == DOMAIN]
    while pending:
        name = pending.pop()
        if (DOMAIN, name, "") in model.functions:
            continue
        function = functions[name] if name in functions else _product(name)
        model.functions[function.identifier()] = function
        pending += [node.op_type for node in function if node.domain == DOMAIN]
    model.opset_imports.update({DOMAIN: 1, "com.microsoft": 1})
