"""Nodes of a graph: what passes ask of them, and how they put others in their place."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.tape import Tape

from rewardrt_export.precisions.functions import DOMAIN
from rewardrt_export.precisions.operators import Operator


def input_of(node: ir.Node, index: int) -> ir.Value:
    """Return an input that the node must have."""
    value = node.inputs[index]
    assert value is not None
    return value


def made_by(value: ir.Value | None, kind: str) -> ir.Node | None:
    """Return the node that makes a value, if it is a standard node of this kind."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind and not node.domain else None


def attribute(node: ir.Node, name: str, default: float) -> float:
    """Return a number that the node says, or else the operator's default."""
    return node.attributes[name].value if name in node.attributes else default


def last_size(value: ir.Value) -> int | None:
    """Return the length of a value's last axis, if it is known."""
    last = value.shape[-1] if value.shape is not None else None
    return last if isinstance(last, int) else None


def weight_name(node: ir.Node) -> str | None:
    """Return the name of the backbone's 2-D weight that this node multiplies with; None for any other node."""
    if node.op_type != "MatMul" or node.domain:
        return None
    weight = input_of(node, 1)
    if not weight.is_initializer() or weight.shape is None or len(weight.shape) != 2:
        return None
    return weight.name if weight.name and weight.name.startswith("backbone.") else None


def choosing(graph: ir.Graph) -> set[ir.Node]:
    """Return the products that decide which experts a token goes to, as far back from each `TopK` as there is one.

    Rounded, they would choose other experts for tokens that two of them suit alike, and a choice has no small error.
    """
    found: set[ir.Node] = set()
    seen: set[ir.Node] = set()
    ahead = [node.inputs[0].producer() for node in graph if node.op_type == "TopK" and node.inputs[0] is not None]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen or node.op_type == "TopK":
            continue
        seen.add(node)
        if node.op_type in ("MatMul", "Gemm"):
            found.add(node)
        else:
            ahead += [value.producer() for value in node.inputs if value is not None]
    return found


def put_in_place(
    graph: ir.Graph, node: ir.Node, call: Operator, inputs: Sequence[ir.Value | None], attributes: dict[str, float]
) -> None:
    """Put a call of an operator in the place of a node; its results have the same shapes and types."""
    tape = Tape()
    results = tape.op_multi_out(call.name, inputs, attributes, num_outputs=len(node.outputs), domain=DOMAIN)
    graph.insert_before(node, tape.nodes)
    for old, new in zip(node.outputs, results, strict=True):
        new.shape, new.type = old.shape, old.type
        old.replace_all_uses_with(new)
    graph.remove(node, safe=True)


def register(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Return the graph's initializer of this tensor's name, made of it unless it is there."""
    assert tensor.name is not None
    if tensor.name not in graph.initializers:
        value = ir.Value(
            name=tensor.name, const_value=tensor, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype)
        )
        graph.register_initializer(value)
    return graph.initializers[tensor.name]
