"""Graphs whose weights are stored in two bytes, and turned into float32 before they are used.

Where the checkpoint has the same type, nothing is rounded, and the rewards are those of the float32 graph to the bit.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from rewardrt.errors import ExportError

_ENDINGS = {ir.DataType.BFLOAT16: "bf16", ir.DataType.FLOAT16: "fp16"}  # of the names of stored weights, in graphs


def store(model: ir.Model, dtype: ir.DataType) -> ir.Model:
    """Store the backbone's matrices in two bytes, in place. Vectors, which weigh little, and the heads stay float32.

    What a Gather looks up is turned into float32 after it: an embedding stays small in memory too.

    Before: weights are float32 initializers named `backbone.*`. After: matrices among them are initializers of `dtype`,
    and what reads them reads a Cast to float32; values that are computed have the types that they had, but for the rows
    of a Gather before their Cast. Raises ExportError for a weight that `dtype` cannot hold, when the model is saved.
    """
    ending = _ENDINGS[dtype]
    for name, weight in list(model.graph.initializers.items()):
        tensor = weight.const_value
        if tensor is None or not name.startswith("backbone.") or len(tensor.shape) < 2:
            continue
        if tensor.dtype != ir.DataType.FLOAT:
            continue
        small = ir.Value(
            name=f"{name}.{ending}",
            shape=weight.shape,
            type=ir.TensorType(dtype),
            const_value=ir.LazyTensor(
                partial(_rounded, tensor, dtype),
                dtype=dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=f"{name}.{ending}",
            ),
        )
        model.graph.register_initializer(small)
        whole = None
        for node, index in list(weight.uses()):
            if node.op_type == "Gather" and not node.domain and index == 0:
                _cast_after(model.graph, node, small)
                continue
            if whole is None:
                made = cast(small)
                model.graph.insert_before(model.graph[0], made)
                whole = made.outputs[0]
            node.replace_input_with(index, whole)
        del model.graph.initializers[name]
    return model


def cast(value: ir.Value, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Node:
    """Make the node, which is not yet in the graph, that turns a value into another type."""
    node = ir.node("Cast", [value], {"to": dtype})
    node.outputs[0].name = f"{value.name}.{'float32' if dtype == ir.DataType.FLOAT else 'half'}"
    node.outputs[0].shape, node.outputs[0].type = value.shape, ir.TensorType(dtype)
    return node


def _cast_after(graph: ir.Graph, gather: ir.Node, small: ir.Value) -> None:
    rows = gather.outputs[0]
    readers = list(rows.uses())
    gather.replace_input_with(0, small)
    rows.type = ir.TensorType(small.dtype)  # type: ignore[arg-type]
    made = cast(rows)
    graph.insert_after(gather, made)
    for node, index in readers:
        node.replace_input_with(index, made.outputs[0])


def _rounded(weight: ir.TensorProtocol, dtype: ir.DataType) -> ir.TensorProtocol:
    with np.errstate(over="ignore"):
        small = weight.numpy().astype(dtype.numpy())
    if not np.isfinite(small).all():
        raise ExportError(
            f"{weight.name}: holds values that {dtype.name.lower()} cannot; export it with another precision"
        )
    return ir.tensor(small, name=f"{weight.name}.{_ENDINGS[dtype]}")
