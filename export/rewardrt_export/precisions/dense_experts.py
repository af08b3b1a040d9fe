"""Experts for engines: every expert over every token, since an engine's sizes may not depend on what is computed.

A graph puts tokens in the order of their experts and splits them, and how many each gets shows only when it runs.
TensorRT plans for sizes that are known from those of its inputs. So each expert takes all tokens, and what it gives is
weighted by 0 for those that did not choose it: `experts / top` times the products, in one engine.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from rewardrt.errors import TraceError
from rewardrt_export.precisions.nodes import register

_LARGE = ir.DataType.FLOAT


def spread_experts(graph: ir.Graph) -> None:
    """Let every expert take all tokens.

    Before: rows are gathered, split by counts that are computed, joined and gathered back, as `experts` traces them.
    After: no size in the graph depends on values.
    """
    for node in list(graph):
        sizes = node.inputs[1] if node.op_type == "Split" and len(node.inputs) > 1 else None
        if sizes is not None and sizes.const_value is None and sizes.producer() is not None:
            _spread(graph, node)


def _spread(graph: ir.Graph, split: ir.Node) -> None:
    hidden = _before(_before(split.inputs[0], "Unsqueeze").inputs[0], "Gather").inputs[0]  # [tokens, width]
    chosen = _before(_before(split.inputs[1], "ReduceSum").inputs[0], "Equal").outputs[0]  # [tokens * top, experts]
    join = _after(split.outputs[0], "Concat")
    mix = _after(join.outputs[0], "MatMul")  # [tokens, 1, top] by [tokens, top, width]
    weights = mix.inputs[0]
    if hidden is None or weights is None or weights.shape is None or not isinstance(weights.shape[2], int):
        raise TraceError("a mixture of experts is laid out in a way that cannot be written for TensorRT")
    tape = Tape()
    rows = split.inputs[0]
    assert rows is not None
    first = register(graph, ir.tensor(np.array([0], np.int64), name="experts.first"))
    hidden = tape.op("Unsqueeze", [hidden, first])  # [1, tokens, width], as the rows are
    if rows.dtype != _LARGE:
        hidden = tape.op("Cast", [hidden], {"to": rows.dtype})
    experts = len(split.outputs)
    shape = register(graph, ir.tensor(np.array([-1, weights.shape[2], experts], np.int64), name=f"{mix.name}.shape"))
    picked = tape.op("Reshape", [tape.op("Cast", [chosen], {"to": _LARGE}), shape])
    share = tape.op("MatMul", [weights, picked])  # [tokens, 1, experts]
    share.dtype = _LARGE
    graph.insert_before(split, tape.nodes)
    for piece in split.outputs:
        piece.replace_all_uses_with(hidden)
    tape = Tape()
    total: ir.Value | None = None
    order = {"perm": (1, 0, 2)}  # [tokens, 1, width]
    for expert, result in enumerate(join.inputs):
        assert result is not None
        own = register(graph, ir.tensor(np.array([expert], np.int64), name=f"experts.{expert}"))
        large = tape.op("Cast", [tape.op("Transpose", [result], order)], {"to": _LARGE})
        part = tape.op("Mul", [large, tape.op("Gather", [share, own], {"axis": 2})])
        total = part if total is None else tape.op("Add", [total, part])
    assert total is not None
    graph.insert_before(mix, tape.nodes)
    total.shape, total.type = mix.outputs[0].shape, mix.outputs[0].type
    mix.outputs[0].replace_all_uses_with(total)
    graph.remove(mix, safe=True)


def _before(value: ir.Value | None, kind: str) -> ir.Node:
    """Return the node of a kind that makes a value, or what it is a cast of."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type == "Cast" and kind != "Cast":
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None or node.op_type != kind:
        raise TraceError(f"a mixture of experts without the {kind} that it is traced with")
    return node


def _after(value: ir.Value, kind: str) -> ir.Node:
    """Return the first node of a kind that a value goes to, by way of one node after the other."""
    seen = 0
    while seen < 100:  # longer than any expert
        node = next((usage.node for usage in value.uses()), None)
        if node is None:
            break
        if node.op_type == kind:
            weight = node.inputs[1] if kind == "MatMul" else None
            if weight is None or (not weight.is_initializer() and _of_initializer(weight) is None):
                return node
        value, seen = node.outputs[0], seen + 1
    raise TraceError(f"a mixture of experts without the {kind} that it is traced with")


def _of_initializer(value: ir.Value) -> ir.Value | None:
    node = value.producer()
    found = node.inputs[0] if node is not None and node.op_type == "Cast" else None
    return found if found is not None and found.is_initializer() else None
