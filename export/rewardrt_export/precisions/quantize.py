"""int8 graphs: each product of the backbone with a weight, in integers, and every token by itself.

Of a product x W, x [tokens, K] float32 as `smoothing` leaves it, W [K, N]:

    s = max |x| of a token / 127            [tokens, 1]
    y = s * (q(x / s) Q * w)                Q int8 [K, N] with a step size w [N] for each column

- A token is scaled by its own values alone, so that its result does not depend on what is in the batch.
- Where 8 bits of an activation are too few, what rounding left over, x - s q(x / s), is rounded again in steps of
  s / 254 and multiplied too. The two planes hold 16 bits of x, and what remains is the weights' rounding: `rounding`.
- The scale that an activation is smoothed by goes into what makes it, the gain of a norm or the columns of a weight,
  where that makes nothing else.

Rounding and products are calls of `operators`. In graphs step sizes are called `steps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx_ir.tape import Tape

from rewardrt.errors import ExportError
from rewardrt.steps import Count, uncounted
from rewardrt_export.precisions.calibrate import Calibration
from rewardrt_export.precisions.functions import CHANNELS, DOMAIN, PANEL, pack
from rewardrt_export.precisions.fuse import fuse
from rewardrt_export.precisions.nodes import choosing, input_of, register, weight_name
from rewardrt_export.precisions.operators import Product, Rounding, define
from rewardrt_export.precisions.rounding import Floats, column_step_sizes, round_weight
from rewardrt_export.precisions.smoothing import UNSMOOTHED, Plan

BLOCK = 32  # rows of a weight that share a step size, where only weights are rounded


def quantize(model: ir.Model, calibration: Calibration | None = None, count: Count = uncounted) -> ir.Model:
    """Replace the backbone's products with weights, in place; with a calibration, those that its texts went through.

    Weights are rounded as `calibration` says, or else to the nearest, when the model is saved. Products of one
    activation share its planes. Raises ExportError where there are no such products.

    Before: weights are float32 initializers named `backbone.*`, [K, N], as `lower` leaves them. After: those that are
    multiplied, K a multiple of CHANNELS, and choose no experts, are int8 in panels, with float32 step sizes of their
    columns; the graph calls operators of DOMAIN and has the functions of all of them.
    """
    plan = None if calibration is None else Plan(calibration, count)
    readers: dict[ir.Value, list[ir.Node]] = {}
    exact = choosing(model.graph)
    for node in model.graph:
        name = weight_name(node)
        if (
            name is not None
            and node not in exact
            and _rows(node) % CHANNELS == 0
            and (plan is None or name in plan.weights)
        ):
            readers.setdefault(input_of(node, 0), []).append(node)
    if not readers:
        raise ExportError("int8: the backbone has no products with weights; export it in another precision")
    quantizers = [_Quantizer(model.graph, activation, nodes, plan) for activation, nodes in readers.items()]
    for quantizer in quantizers:  # all before the first is replaced: weights change that others are multiplied with
        quantizer.fold_scale()
    for quantizer in quantizers:
        quantizer.replace()
    fuse(model)
    define(model)
    return model


def _rows(node: ir.Node) -> int:
    weight = input_of(node, 1).const_value
    assert weight is not None
    return weight.shape.numpy()[0]


class _Quantizer:
    """Writes the nodes that stand for the products `nodes` of one activation."""

    def __init__(self, graph: ir.Graph, activation: ir.Value, nodes: Sequence[ir.Node], plan: Plan | None) -> None:
        self.graph = graph
        self.activation = activation
        self.nodes = nodes
        self.plan = plan
        self.tape = Tape()
        self.first = str(weight_name(nodes[0]))  # what holds of this weight's activation is done to all of them
        self.smoothing = UNSMOOTHED if plan is None else plan.smoothing(self.first)
        self.scale = self.smoothing.scale  # that is still to be divided by

    def fold_scale(self) -> None:
        """Let what makes the activation divide it by its scale, where nothing else reads it.

        1. A norm: its gain and bias are divided.
        2. A product, element by element, one side of which is a product with a weight that nothing else reads: the
           weight's columns are.

        Before: no activation's products were replaced yet. After: where `scale` is None nothing is left to divide by.
        """
        maker = self.activation.producer()
        if self.scale is None or maker is None or self.activation.is_graph_output():
            return
        if {usage.node for usage in self.activation.uses()} != set(self.nodes):
            return
        if maker.op_type in ("RMSNormalization", "LayerNormalization"):
            parts = [part for part in maker.inputs[1:] if part is not None]
        elif maker.op_type == "Mul":
            sides = [side.producer() for side in maker.inputs if side is not None and len(side.uses()) == 1]
            parts = [input_of(side, 1) for side in sides if side is not None and weight_name(side) is not None][:1]
        else:
            return
        if not parts or not all(self._divides(part) for part in parts):
            return
        for part in parts:
            stored = part.const_value
            assert stored is not None
            part.const_value = ir.LazyTensor(
                partial(_quotient, stored, self.scale),
                dtype=stored.dtype,
                shape=ir.Shape(stored.shape.numpy()),
                name=part.name,
            )
        self.scale = None

    def _divides(self, part: ir.Value) -> bool:
        """Whether a value is a weight that is read once and has the scale's length."""
        assert self.scale is not None
        once = part.is_initializer() and not part.is_graph_input() and len(part.uses()) == 1
        return once and part.shape is not None and part.shape[-1] == len(self.scale)

    def replace(self) -> None:
        """Put the integer products in the place of the float32 ones."""
        rounding = Rounding("" if self.scale is None else "Scale", self.smoothing.mixed, self.smoothing.planes)
        operands = [self.activation]
        if self.scale is not None:
            operands.append(register(self.graph, ir.tensor(1 / self.scale, name=f"{self.first}.smooth")))
        rounded = self.tape.op_multi_out(
            rounding.name,
            operands,
            {"channels": _rows(self.nodes[0])},
            num_outputs=len(rounding.outputs),
            domain=DOMAIN,
        )
        product = Product(rounding.planes)
        results = [
            self.tape.op(product.name, [*rounded, *self._weight(input_of(node, 1))], domain=DOMAIN)
            for node in self.nodes
        ]
        self.graph.insert_before(self.nodes[0], self.tape.nodes)
        for node, result in zip(self.nodes, results, strict=True):
            result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
            node.outputs[0].replace_all_uses_with(result)
        self.graph.remove(list(self.nodes), safe=True)

    def _weight(self, weight: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return the integers of a weight, in panels, and the step sizes of its columns.

        A weight that is multiplied with several activations (DeBERTa's, with hidden states and with the embeddings of
        distances) is there once for each way that these are smoothed.
        """
        stored, name = weight.const_value, weight.name
        assert stored is not None and name is not None
        if self.plan is not None and self.plan.smoothing(name) is not self.smoothing:
            name = f"{name}.as.{self.first}"
        columns = column_step_sizes(self.smoothing.weight(stored.numpy()))
        rows = stored.shape.numpy()[0]
        integers = ir.LazyTensor(
            partial(_integers, stored, columns, self),
            dtype=ir.DataType.INT8,
            shape=ir.Shape([-(-len(columns) // PANEL), rows // CHANNELS, PANEL, CHANNELS]),
            name=f"{name}.int8",
        )
        return register(self.graph, integers), register(self.graph, ir.tensor(columns, name=f"{name}.steps"))


def _integers(weight: ir.TensorProtocol, columns: Floats, quantizer: _Quantizer) -> ir.TensorProtocol:
    factor = quantizer.plan.factor(quantizer.first) if quantizer.plan is not None else None
    return ir.tensor(pack(round_weight(quantizer.smoothing.weight(weight.numpy()), columns, factor)))


def _quotient(stored: ir.TensorProtocol, scale: Floats) -> ir.TensorProtocol:
    return ir.tensor(stored.numpy() / scale, name=stored.name)


def quantize_weights(model: ir.Model, *, bits: Literal[4, 8]) -> ir.Model:
    """Store the backbone's weights in `bits` bits, a step size for each BLOCK of a column; products stay float32.

    Less to read where memory is what a machine waits for: few tokens at a time, or a model near the memory's size.

    Before: as for `quantize`. After: each such product is one MatMulNBits, whose weight is uint8 [N, blocks, bytes].
    """
    model.opset_imports["com.microsoft"] = 1
    tape = Tape()
    exact = choosing(model.graph)
    for node in list(model.graph):
        if weight_name(node) is None or node in exact:
            continue
        weight = input_of(node, 1)
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
        step_sizes = ir.LazyTensor(
            partial(_block_step_sizes, stored, bits),
            dtype=ir.DataType.FLOAT,
            shape=ir.Shape([columns, blocks]),
            name=f"{weight.name}.steps",
        )
        attributes = {"K": rows, "N": columns, "bits": bits, "block_size": BLOCK}
        inputs = [input_of(node, 0), *(register(model.graph, tensor) for tensor in (packed, step_sizes))]
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


def _step_sizes(blocks: Floats, bits: int) -> Floats:
    largest = np.abs(blocks).max(axis=-1)
    return np.maximum(largest / (2 ** (bits - 1) - 1), np.finfo(np.float32).tiny).astype(np.float32)


def _block_step_sizes(weight: ir.TensorProtocol, bits: int) -> ir.TensorProtocol:
    return ir.tensor(_step_sizes(_blocks(weight), bits), name=f"{weight.name}.steps")


def _packed(weight: ir.TensorProtocol, bits: int) -> ir.TensorProtocol:
    """Return the integers of a weight around 2 ** (bits - 1), uint8 [N, blocks, BLOCK * bits / 8], low bits first."""
    blocks = _blocks(weight)
    integers = (np.rint(blocks / _step_sizes(blocks, bits)[..., None]) + 2 ** (bits - 1)).astype(np.uint8)
    if bits == 4:
        integers = integers[..., ::2] | (integers[..., 1::2] << 4)
    return ir.tensor(integers, name=f"{weight.name}.int{bits}")
