"""States that heads read are taken before the nodes that treat each token by itself, not after."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.tape import Tape

from rewardrt_export.precisions.nodes import attribute
from rewardrt_export.precisions.operators import Attention, operator_of

_POINTWISE = ("Add", "Div", "Erf", "Gelu", "Mul", "Relu", "Sigmoid", "Sub", "Tanh")  # of values of one shape


def pool_early(model: ir.Model, *, standard: bool = False) -> None:
    """Take the states that heads read before the nodes that treat each token by itself, not after.

    What follows the last attention is then computed of these tokens alone. Where something else reads the last states
    (rewards of every token do) nothing changes. With `standard` the nodes are ONNX's own as well: their products round
    a token otherwise where there are fewer beside it, which graphs of one reward to the bit cannot have.

    Before: for heads, states [batch, tokens, size] are gathered at [pooled, 2] places, and have known shapes. After:
    what lies between the last attention and the heads is computed of [pooled, ...], and the nodes that did it for all
    tokens are read by none.
    """
    for node in list(model.graph):
        if node.op_type != "GatherND" or node.domain or attribute(node, "batch_dims", 0):
            continue
        states, places = node.inputs[0], node.inputs[1]
        if states is None or places is None or len(states.uses()) != 1 or states.is_graph_output():
            continue
        if states.shape is None or len(states.shape) != 3 or places.shape is None or places.shape[-1] != 2:
            continue
        late = {node}  # nodes whose results nothing reads but what leads here
        for each in reversed(model.graph):
            uses = [usage.node for output in each.outputs for usage in output.uses()]
            outputs = any(output.is_graph_output() for output in each.outputs)
            if _is_by_token(each, standard) and uses and not outputs and late.issuperset(uses):
                late.add(each)
        tape = Tape()
        pooled = _pooled(tape, states, places, late, {})
        model.graph.insert_before(node, tape.nodes)
        pooled.shape, pooled.type = node.outputs[0].shape, node.outputs[0].type
        node.outputs[0].replace_all_uses_with(pooled)
        model.graph.remove(node, safe=True)


def _is_by_token(node: ir.Node, standard: bool) -> bool:
    if (own := operator_of(node)) is not None:
        return not isinstance(own, Attention)
    if node.op_type in ("RMSNormalization", "LayerNormalization") and len(node.outputs) == 1:
        return attribute(node, "axis", -1) == -1 and (standard or node.op_type == "RMSNormalization")
    if not standard or node.domain:
        return False
    if node.op_type == "MatMul":
        weight = node.inputs[1]
        return weight is not None and weight.is_initializer() and weight.shape is not None and len(weight.shape) == 2
    shape = node.outputs[0].shape
    computed = [value for value in node.inputs if value is not None and not value.is_initializer()]
    return node.op_type in _POINTWISE and shape is not None and all(value.shape == shape for value in computed)


def _pooled(
    tape: Tape, value: ir.Value, places: ir.Value, late: set[ir.Node], done: dict[ir.Value, ir.Value]
) -> ir.Value:
    """Return the tokens of a value [batch, tokens, ...] at places [pooled, 2]: [pooled, ...]."""
    if value in done:
        return done[value]
    node = value.producer()
    if node is None or node not in late:
        done[value] = tape.op("GatherND", [value, places])
        done[value].type = value.type
        return done[value]
    inputs = [
        item if item is None or item.is_initializer() else _pooled(tape, item, places, late, done)
        for item in node.inputs
    ]
    attributes = {name: item.value for name, item in node.attributes.items()}
    results = tape.op_multi_out(node.op_type, inputs, attributes, num_outputs=len(node.outputs), domain=node.domain)
    for old, new in zip(node.outputs, results, strict=True):
        new.type = old.type
        done[old] = new
    return done[value]
