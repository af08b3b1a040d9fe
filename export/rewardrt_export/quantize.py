"""int8 graphs: each product of the backbone with a weight, in integers, and every token by itself.

Of a product x W, x [tokens, K] float32, W [K, N]:

    s = max |x| of a token / 127                           [tokens, 1]
    y = s * (q(x / s) Q * w + q(rest / f) Q * w * f)       Q int8 [K, N] with a step w [N] for each column

- A token is scaled by its own values alone, so that its result does not depend on what is in the batch.
- A few channels of a language model carry values many times larger than the rest, so 8 bits of a scale for all of them
  are too few. x is given in two planes: rest = x / s - q(x / s), what the first left over, is rounded again in steps of
  f. Together they hold 16 bits of x, and what remains is the weights' own rounding: see `rounding`.

Activations are unsigned with a zero point of 128: onnxruntime's kernels for signed ones are many times slower.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx_ir.tape import Tape

from rewardrt.errors import ExportError
from rewardrt_export.calibrate import Calibration
from rewardrt_export.rounding import column_steps, round_weight

Floats = npt.NDArray[np.float32]

FINER = 1 / 254  # the step of the second plane: half a step of the first is 127 of its own
BLOCK = 32  # rows of a weight that share a step, where only weights are rounded
TINY = 1e-30  # of a token whose channels are all 0: it is divided by


def quantize(model: ir.Model, calibration: Calibration | None = None) -> ir.Model:
    """Replace the backbone's products with weights, in place; with a calibration, those that its texts went through.

    Weights are rounded as `calibration` says, or else to the nearest, when the model is saved. Products of one
    activation share its planes. Raises ExportError where there are no such products.
    """
    model.opset_imports["com.microsoft"] = 1
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        name = weight_name(node)
        if name is not None and (calibration is None or name in calibration.weights):
            readers.setdefault(_input(node, 0), []).append(node)
    if not readers:
        raise ExportError("int8: the backbone has no products with weights; export it in another precision")
    for activation, nodes in readers.items():
        _Quantizer(model.graph, nodes, calibration).replace(activation)
    common_passes.RemoveUnusedNodesPass()(model)
    return model


def weight_name(node: ir.Node) -> str | None:
    """Return the name of the backbone's 2-D weight that this node multiplies with; None for any other node."""
    if node.op_type != "MatMul" or node.domain:
        return None
    weight = _input(node, 1)
    if not weight.is_initializer() or weight.shape is None or len(weight.shape) != 2:
        return None
    return weight.name if weight.name and weight.name.startswith("backbone.") else None


class _Quantizer:
    """Writes the nodes that stand for the products `nodes` of one activation."""

    def __init__(self, graph: ir.Graph, nodes: Sequence[ir.Node], calibration: Calibration | None) -> None:
        self.graph = graph
        self.nodes = nodes
        self.calibration = calibration
        self.tape = Tape()

    def replace(self, activation: ir.Value) -> None:
        scale = self._scale(activation)  # [batch, tokens, 1]
        planes = self._planes(self._op("Mul", activation, self._op("Reciprocal", scale)))
        results = [self._op("Mul", self._product(_input(node, 1), planes), scale) for node in self.nodes]
        self.graph.insert_before(self.nodes[0], self.tape.nodes)
        for node, result in zip(self.nodes, results, strict=True):
            result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
            node.outputs[0].replace_all_uses_with(result)
        self.graph.remove(list(self.nodes), safe=True)

    def _scale(self, activation: ir.Value) -> ir.Value:
        """Return the step of each token: 1/127 of its largest value."""
        axis = self._constant("axis", np.array([-1]))
        highest, lowest = self._op("ReduceMax", activation, axis), self._op("ReduceMin", activation, axis)
        largest = self._op("Max", highest, self._op("Neg", lowest), self._constant("tiny", np.float32(TINY)))
        return self._op("Mul", largest, self._constant("step", np.float32(1 / 127)))

    def _planes(self, in_steps: ir.Value) -> list[tuple[ir.Value, ir.Value]]:
        """Return the two planes of an activation, uint8 around 128, and the size of each one's steps."""
        one, finer = self._constant("unit", np.float32(1)), self._constant("unit", np.float32(FINER))
        zero = self._constant("zero", np.uint8(128))
        first = self._op("QuantizeLinear", in_steps, one, zero)
        # What rounding left over is at most half a step.
        rest = self._op("Sub", in_steps, self._op("DequantizeLinear", first, one, zero))
        return [(first, one), (self._op("QuantizeLinear", rest, finer, zero), finer)]

    def _product(self, weight: ir.Value, planes: Sequence[tuple[ir.Value, ir.Value]]) -> ir.Value:
        """Return the product in units of the token's scale."""
        stored = weight.const_value
        assert stored is not None and weight.name is not None
        steps = column_steps(stored.numpy())
        integers = self._initializer(
            ir.LazyTensor(
                partial(_integers, stored, steps, self.calibration),
                dtype=ir.DataType.INT8,
                shape=ir.Shape(stored.shape.numpy()),
                name=f"{weight.name}.int8",
            )
        )
        columns = self._initializer(ir.tensor(steps, name=f"{weight.name}.steps"))
        zero = self._constant("zero", np.uint8(128))
        first, second = (
            self.tape.op("MatMulIntegerToFloat", [plane, integers, unit, columns, zero], domain="com.microsoft")
            for plane, unit in planes
        )
        return self._op("Add", first, second)

    def _op(self, kind: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        return self.tape.op(kind, inputs, attributes)

    def _constant(self, name: str, array: npt.NDArray[Any] | np.generic) -> ir.Value:
        """Return a small initializer: the graph's one of these values, or a new one."""
        data = np.asarray(array)
        digest = hashlib.sha256(data.tobytes()).hexdigest()[:8]
        return self._initializer(ir.tensor(data, name=f"int8.{name}.{digest}"))

    def _initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        return _register(self.graph, tensor)


def _register(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Return the graph's initializer of this tensor's name, made of it unless it is there."""
    assert tensor.name is not None
    if tensor.name not in graph.initializers:
        value = ir.Value(
            name=tensor.name, const_value=tensor, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype)
        )
        graph.register_initializer(value)
    return graph.initializers[tensor.name]


def _integers(weight: ir.TensorProtocol, steps: Floats, calibration: Calibration | None) -> ir.TensorProtocol:
    assert weight.name is not None
    factor = calibration.factor(weight.name) if calibration is not None else None
    return ir.tensor(round_weight(weight.numpy(), steps, factor), name=f"{weight.name}.int8")


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def quantize_weights(model: ir.Model, *, bits: Literal[4, 8]) -> ir.Model:
    """Store the backbone's weights in `bits` bits, a step for each BLOCK of a column; products stay float32.

    Less to read where memory is what a machine waits for: few tokens at a time, or a model near the memory's size.
    """
    model.opset_imports["com.microsoft"] = 1
    tape = Tape()
    for node in list(model.graph):
        if weight_name(node) is None:
            continue
        weight = _input(node, 1)
        stored = weight.const_value
        assert stored is not None and weight.name is not None
        rows, columns = stored.shape.numpy()
        blocks = -(-rows // BLOCK)
        packed = ir.LazyTensor(
            partial(_packed, stored, bits),
            dtype=ir.DataType.UINT8,
            shape=ir.Shape([columns, blocks, BLOCK * bits // 8]),
            name=f"{weight.name}.int{bits}",
        )
        steps = ir.LazyTensor(
            partial(_block_steps, stored, bits),
            dtype=ir.DataType.FLOAT,
            shape=ir.Shape([columns, blocks]),
            name=f"{weight.name}.steps",
        )
        attributes = {"K": rows, "N": columns, "bits": bits, "block_size": BLOCK}
        inputs = [_input(node, 0), *(_register(model.graph, tensor) for tensor in (packed, steps))]
        product = tape.op("MatMulNBits", inputs, attributes, domain="com.microsoft")
        model.graph.insert_before(node, tape.nodes[-1:])
        product.shape, product.type = node.outputs[0].shape, node.outputs[0].type
        node.outputs[0].replace_all_uses_with(product)
        model.graph.remove(node, safe=True)
    common_passes.RemoveUnusedNodesPass()(model)
    return model


def _blocks(weight: ir.TensorProtocol) -> Floats:
    """Return a weight [K, N] as [N, blocks, BLOCK], with zeros after the last row."""
    columns = np.ascontiguousarray(weight.numpy().T)
    return np.pad(columns, ((0, 0), (0, -columns.shape[1] % BLOCK))).reshape(len(columns), -1, BLOCK)


def _steps(blocks: Floats, bits: int) -> Floats:
    largest = np.abs(blocks).max(axis=-1)
    return np.maximum(largest / (2 ** (bits - 1) - 1), np.finfo(np.float32).tiny).astype(np.float32)


def _block_steps(weight: ir.TensorProtocol, bits: int) -> ir.TensorProtocol:
    return ir.tensor(_steps(_blocks(weight), bits), name=f"{weight.name}.steps")


def _packed(weight: ir.TensorProtocol, bits: int) -> ir.TensorProtocol:
    """Return the integers of a weight around 2 ** (bits - 1), uint8 [N, blocks, BLOCK * bits / 8], low bits first."""
    blocks = _blocks(weight)
    integers = (np.rint(blocks / _steps(blocks, bits)[..., None]) + 2 ** (bits - 1)).astype(np.uint8)
    if bits == 4:
        integers = integers[..., ::2] | (integers[..., 1::2] << 4)
    return ir.tensor(integers, name=f"{weight.name}.int{bits}")
