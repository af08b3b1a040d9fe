"""Graphs for accelerators: products and attention in float16, and what adds up over the layers in float32.

Tensor cores multiply float16 some ten times as fast as float32, and add up in float32. Rounded to it are the weights
and what they are multiplied with, 11 bits of each, where bfloat16 keeps 8. The residual stream, norms, rotations and
heads stay float32, as do the products that choose experts; keys and values are float16.

What is larger than float16 can hold (65,504) becomes infinite, and the reward then is no finite number, which scoring
refuses. onnxruntime's CPU has no float16 products: it computes in float32, with most of the roundings between nodes
left out. That is slow, and nearer to float32 than a GPU comes, by half where it was measured.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx_ir.tape import Tape

from rewardrt.graph.session import PAST_BATCH
from rewardrt_export.precisions.nodes import choosing, register
from rewardrt_export.precisions.pool import pool_early
from rewardrt_export.precisions.storage import cast, store

_SMALL, _LARGE = ir.DataType.FLOAT16, ir.DataType.FLOAT
_PRODUCTS = ("MatMul", "Gemm")
_MOVES = ("Expand", "GatherND", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
_POINTWISE = ("Add", "Gelu", "Mul", "Relu", "Sigmoid")


def halve(model: ir.Model) -> ir.Model:
    """Let products with the backbone's weights, attention, and what lies between them be float16, in place.

    Before: weights are float32 initializers named `backbone.*`, and every value has a type. After: keys and values are
    float16, and they and the states of a past are of one text or of as many as there are rows; norms, sums, states and
    heads are float32; no weight is stored twice.
    Raises ExportError for a weight that float16 cannot hold, when the model is saved.
    """
    pool_early(model, standard=True)
    store(model, _SMALL)
    past = [value for value in model.graph.inputs if str(value.name).startswith("past_")]
    for value in past:
        if not str(value.name).startswith("past_state."):
            value.type = ir.TensorType(_SMALL)
    if past:
        share_past(model.graph, past)
    halver = _Halver(model.graph)
    for node in list(model.graph):
        halver.convert(node)
    common_passes.RemoveUnusedNodesPass()(model)  # the casts of weights to float32
    return model


def share_past(graph: ir.Graph, past: list[ir.Value]) -> None:
    """Let the past of one text stand for that of every row: the answers to a prompt are one batch after it.

    Before: the past [batch, ...] has as many rows as `input_ids`. After: it may have one, and is read expanded.
    """
    tape = Tape()
    ids = next(value for value in graph.inputs if value.name == "input_ids")
    batch = tape.op("Shape", [ids], {"start": 0, "end": 1})
    shapes = {}
    for value in past:
        assert value.shape is not None
        if (axes := len(value.shape)) not in shapes:
            ones = register(graph, ir.tensor(np.ones(axes - 1, np.int64), name=f"past.ones.{axes - 1}"))
            shapes[axes] = tape.op("Concat", [batch, ones], {"axis": 0})
        rows = tape.op("Expand", [value, shapes[axes]])
        rows.name = f"{value.name}.rows"
        rows.shape, rows.type = value.shape, value.type
        value.replace_all_uses_with(rows)
        rows.producer().replace_input_with(0, value)  # type: ignore[union-attr]
        value.shape = ir.Shape([PAST_BATCH, *value.shape[1:]])
    graph.insert_before(graph[0], tape.nodes)


class _Halver:
    """Goes through the nodes in their order, and knows of every value so far whether it is float16."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.exact = choosing(graph)
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def convert(self, node: ir.Node) -> None:
        """Give the node inputs of the type that it computes in."""
        small = self._is_small(node)
        wanted, other = (_SMALL, _LARGE) if small else (_LARGE, _SMALL)
        for index, value in enumerate(node.inputs):
            # A Shape reads no numbers; the rows of a table, and the casts of weights, are as storage wrote them.
            kept = node.op_type in ("Shape", "Cast") or (value is not None and value.is_initializer() and not small)
            if value is not None and value.dtype == other and not kept:
                node.replace_input_with(index, self._cast(value, wanted))
        if small:
            for output in node.outputs:
                output.type = ir.TensorType(_SMALL)

    def _is_small(self, node: ir.Node) -> bool:
        if node.domain:
            return False
        if node.op_type == "Attention":
            return True
        if node.op_type in _PRODUCTS:
            return node not in self.exact and any(_stored(value) is not None for value in node.inputs[:2])
        if node.op_type in _MOVES:
            return _is(node.inputs[0], _SMALL)
        if node.op_type in _POINTWISE:
            computed = [value for value in node.inputs if value is not None and value.const_value is None]
            return bool(computed) and all(_is(value, _SMALL) for value in computed)
        return False

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        stored = _stored(value)
        if stored is not None and dtype == _SMALL:
            return stored
        if (value, dtype) not in self.casts:
            self.casts[value, dtype] = self._constant(value) if value.is_initializer() else self._node(value, dtype)
        return self.casts[value, dtype]

    def _constant(self, value: ir.Value) -> ir.Value:
        assert value.const_value is not None
        return register(self.graph, ir.tensor(value.const_value.numpy().astype(np.float16), name=f"{value.name}.half"))

    def _node(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        node = cast(value, dtype)
        maker = value.producer()
        if maker is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(maker, node)
        return node.outputs[0]


def _is(value: ir.Value | None, dtype: ir.DataType) -> bool:
    return value is not None and value.dtype == dtype


def _stored(value: ir.Value | None) -> ir.Value | None:
    """Return the float16 weight that a value is, as storage wrote it: the Cast of an initializer."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Cast" or node.inputs[0] is None:
        return None
    return node.inputs[0] if node.inputs[0].is_initializer() and node.inputs[0].dtype == _SMALL else None
