"""What int8 graphs compute, as ONNX functions that are written out: operators, and the pieces that they are made of.

Each is a function of standard nodes and of calls of others. Names of functions and values, and the texts, are in every
int8 graph: they stay as they are.

A weight W [K, N] of integers is stored in panels of 64 columns, [ceil(N / 64), K / 4, 64, 4], as the processor's
instructions take it: the four bytes of four channels of one column lie together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
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
def GateUp(gate: Floats, up: Floats) -> Floats:
    """Return silu(gate) up."""
    return op.Mul(op.Mul(gate, op.Sigmoid(gate)), up)


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


_WRITTEN: tuple[OnnxFunction[Any, Any], ...] = (
    Mix, Steps, Zeros, GateUp, Unpack, PlaneProduct, Rest,
    RoundTokens, RoundTokensTwice,
    Product, ProductTwice, ProductAdd, ProductTwiceAdd, ProductGate, ProductTwiceGate,
    CausalAttention, RotaryCausalAttention,
)  # fmt: skip
_BY_NAME = {function.name: function for function in _WRITTEN}


def written(name: str) -> ir.Function | None:
    """Return the function of this name, made anew, if it is written out here."""
    return ir.serde.deserialize_function(_BY_NAME[name].to_function_proto()) if name in _BY_NAME else None
