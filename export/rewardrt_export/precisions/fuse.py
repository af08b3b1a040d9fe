"""Several nodes of an int8 graph become one call of an operator that has a kernel for all of them.

Each pass takes an `onnx_ir.Model` and changes it in place. What it does not recognise stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx_ir.tape import Tape

from rewardrt_export.precisions.operators import DOMAIN, rounded_product

_TOKENS_FIRST = (0, 2, 1, 3)  # [batch, heads, tokens, size] to or from [batch, tokens, heads, size]
_LANES = 16  # that the kernels take of a head at once
_LARGEST_HEAD = 256
_POINTWISE = ("Add", "Div", "Erf", "Gelu", "Mul", "Relu", "Sigmoid", "Sub", "Tanh")  # of values of one shape


def fuse(model: ir.Model) -> None:
    """Run all passes."""
    fuse_norms(model)
    fuse_sums(model)
    fuse_gates(model)
    fuse_products(model)
    fuse_roundings(model)
    fuse_attention(model)
    common_passes.RemoveUnusedNodesPass()(model)  # what was replaced no longer reads anything
    pool_early(model)
    common_passes.RemoveUnusedNodesPass()(model)


def fuse_norms(model: ir.Model) -> None:
    """Let tokens be normalised where they are rounded, if nothing else reads what a norm gives."""
    for node in list(model.graph):
        norm = _maker(node.inputs[0], "RMSNormalization") if node.op_type.startswith("RoundTokens") else None
        if norm is None or len(norm.outputs[0].uses()) != 1 or _attribute(norm, "axis", -1) != -1:
            continue
        values, gain = norm.inputs[0], norm.inputs[1]
        if values is None or gain is None or gain.shape is None or len(gain.shape) != 1:
            continue
        epsilon = _attribute(norm, "epsilon", 1e-5)
        attributes = {"channels": _attribute(node, "channels", 0), "epsilon": epsilon}
        _replace(model.graph, node, f"Norm{node.op_type}", [values, gain], attributes)


def fuse_sums(model: ir.Model) -> None:
    """Let a product that is only added to a tensor of its shape, the residual stream, be added where it is made."""
    for node in list(model.graph):
        if node.op_type != "Add" or node.domain:
            continue
        for product, added in (node.inputs, node.inputs[::-1]):
            maker = product.producer() if product is not None else None
            if not _is_product(maker):
                continue
            if product is None or len(product.uses()) != 1 or added is None:
                continue
            if product.shape is None or added.shape != product.shape:
                continue
            _replace(model.graph, node, f"{maker.op_type}Add", [*maker.inputs, added], {})
            break


def fuse_gates(model: ir.Model) -> None:
    """Let silu(gate) up, gate sigmoid(gate) up in the graph, be taken where both are made, or else where it is rounded.

    Both are made at one place where they are products of one activation that nothing else reads.
    """
    for node in list(model.graph):
        if node.op_type != "Mul" or node.domain:
            continue
        for silu, up in (node.inputs, node.inputs[::-1]):
            gate = _gate(silu)
            if gate is None or up is None or gate.shape is None or gate.shape != up.shape:
                continue
            opened, made = gate.producer(), up.producer()
            alone = len(gate.uses()) == 2 and len(up.uses()) == 1
            if alone and _is_product(opened) and _is_product(made) and opened.inputs[:-2] == made.inputs[:-2]:
                _replace(model.graph, node, f"{made.op_type}Gate", [*opened.inputs, *made.inputs[-2:]], {})
                break
            readers = [usage.node for usage in node.outputs[0].uses()]
            if len(readers) == 1 and readers[0].op_type.startswith("RoundTokens"):
                attributes = {"channels": _attribute(readers[0], "channels", 0)}
                _replace(model.graph, readers[0], f"Gate{readers[0].op_type}", [gate, up], attributes)
            break


def _is_product(node: ir.Node | None) -> TypeGuard[ir.Node]:
    return node is not None and node.domain == DOMAIN and node.op_type in ("Product", "ProductTwice")


def fuse_products(model: ir.Model) -> None:
    """Let two or three products of one activation be taken at once: threads share out the work of all of them."""
    common_passes.RemoveUnusedNodesPass()(model)  # products whose results other passes no longer read
    readers: dict[tuple[ir.Value, str], list[ir.Node]] = {}
    for node in model.graph:
        plane = node.inputs[0] if _is_product(node) else None
        if plane is not None:
            readers.setdefault((plane, node.op_type), []).append(node)
    for (_, kind), nodes in readers.items():
        # Nodes that lie together: what one of them is multiplied with is never made of what another gave.
        for group in (nodes[start : start + 3] for start in range(0, len(nodes), 3)):
            if len(group) == 1:
                continue
            shared = [item for item in group[0].inputs[:-2] if item is not None]
            weights = [item for node in group for item in node.inputs[-2:] if item is not None]
            tape = Tape()
            called = f"{kind}{'Pair' if len(group) == 2 else 'Triple'}"
            results = tape.op_multi_out(called, [*shared, *weights], num_outputs=len(group), domain=DOMAIN)
            model.graph.insert_before(group[0], tape.nodes)
            for node, result in zip(group, results, strict=True):
                old = node.outputs[0]
                result.shape, result.type = old.shape, old.type
                old.replace_all_uses_with(result)
            model.graph.remove(group, safe=True)


def fuse_roundings(model: ir.Model) -> None:
    """Let an activation be rounded where it is multiplied, if it is at one place."""
    for node in list(model.graph):
        if node.domain != DOMAIN or "RoundTokens" not in node.op_type:
            continue
        readers = {usage.node for output in node.outputs for usage in output.uses()}
        if len(readers) != 1:
            continue
        (reader,) = readers
        planes, rest = reader.inputs[: len(node.outputs)], reader.inputs[len(node.outputs) :]
        if reader.domain == DOMAIN and reader.op_type.startswith("Product") and tuple(planes) == tuple(node.outputs):
            attributes = {name: item.value for name, item in node.attributes.items()}
            called = rounded_product(node.op_type, reader.op_type)
            _replace(model.graph, reader, called, [*node.inputs, *rest], attributes)
            model.graph.remove(node, safe=True)


def _gate(silu: ir.Value | None) -> ir.Value | None:
    """Return x where a value that is read once is x sigmoid(x)."""
    product = _maker(silu, "Mul")
    if silu is None or product is None or len(silu.uses()) != 1 or silu.is_graph_output():
        return None
    for x, gate in (product.inputs, product.inputs[::-1]):
        sigmoid = _maker(gate, "Sigmoid")
        if sigmoid is not None and sigmoid.inputs[0] is x:
            return x
    return None


def fuse_attention(model: ir.Model) -> None:
    """Let causal attention, the transposes around it and, where there is one, the rotation before it be one call.

    Its past and present become float16. Attention within a window (it has a mask) and with a softcap is left alone.
    """
    for node in list(model.graph):
        if node.op_type == "Attention" and not node.domain:
            _fuse_attention(model.graph, node)


def pool_early(model: ir.Model, *, standard: bool = False) -> None:
    """Take the states that heads read before the nodes that treat each token by itself, not after.

    What follows the last attention is then computed of these tokens alone. Where something else reads the last states
    (rewards of every token do) nothing changes. With `standard` the nodes are ONNX's own as well: their products round
    a token otherwise where there are fewer beside it, which graphs of one reward to the bit cannot have.
    """
    for node in list(model.graph):
        if node.op_type != "GatherND" or node.domain or _attribute(node, "batch_dims", 0):
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
    if node.domain == DOMAIN:
        return "Round" in node.op_type or "Product" in node.op_type
    if node.op_type in ("RMSNormalization", "LayerNormalization") and len(node.outputs) == 1:
        return _attribute(node, "axis", -1) == -1 and (standard or node.op_type == "RMSNormalization")
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


def _fuse_attention(graph: ir.Graph, node: ir.Node) -> None:
    query, key, value, mask, *past = [*node.inputs, None, None, None][:6]
    if mask is not None or not _attribute(node, "is_causal", 0) or _attribute(node, "softcap", 0.0):
        return
    if query is None or key is None or value is None or any(item is None or not item.is_graph_input() for item in past):
        return
    sizes = {_size(item) for item in (query, key, value)}
    size = sizes.pop()
    if (
        sizes
        or size is None
        or size % _LANES
        or size > _LARGEST_HEAD
        or "scale" not in node.attributes
        or len(node.outputs) != 3
    ):
        return
    tape = Tape()
    angles: list[ir.Value] = []
    rotations = [_rotation(query, size), _rotation(key, size)]
    if rotations[0] is not None and rotations[1] is not None and rotations[0].inputs[1:] == rotations[1].inputs[1:]:
        query, key, *angles = [rotations[0].inputs[0], *rotations[1].inputs]  # type: ignore[list-item]
    operands = [_tokens_first(tape, item) for item in (query, key, value)]  # type: ignore[arg-type]
    called = tape.op_multi_out(
        "RotaryCausalAttention" if angles else "CausalAttention",
        [*operands, *past, *angles],
        {"scale": _attribute(node, "scale", 1.0)},
        num_outputs=3,
        domain=DOMAIN,
    )
    result = tape.op("Transpose", [called[0]], {"perm": _TOKENS_FIRST})
    graph.insert_before(node, tape.nodes)
    for old, new in zip(node.outputs, [result, *called[1:]], strict=True):
        new.shape, new.type = old.shape, old.type
    for item in past:
        item.type = ir.TensorType(ir.DataType.FLOAT16)  # type: ignore[union-attr]
    for old, new in zip(node.outputs[1:], called[1:], strict=True):
        new.type, new.name = ir.TensorType(ir.DataType.FLOAT16), old.name
        graph.outputs[graph.outputs.index(old)] = new
    for reader in [usage.node for usage in node.outputs[0].uses()]:
        if _is_tokens_first(reader):  # the way back, which is not gone after all
            reader.outputs[0].replace_all_uses_with(called[0])
    node.outputs[0].replace_all_uses_with(result)
    graph.remove(node, safe=True)


def _rotation(value: ir.Value, size: int) -> ir.Node | None:
    """Return the node that rotates the halves of whole heads [batch, heads, tokens, size], and nothing else reads."""
    node = _maker(value, "RotaryEmbedding")
    if node is None or len(value.uses()) != 1 or len(node.inputs) != 3 or size % (2 * _LANES):
        return None
    return None if _attribute(node, "interleaved", 0) or _attribute(node, "rotary_embedding_dim", 0) else node


def _tokens_first(tape: Tape, value: ir.Value) -> ir.Value:
    """Return [batch, heads, tokens, size] as [batch, tokens, heads, size]: what it was transposed from, if it was."""
    node = value.producer()
    if node is not None and _is_tokens_first(node) and node.inputs[0] is not None:
        return node.inputs[0]
    return tape.op("Transpose", [value], {"perm": _TOKENS_FIRST})


def _is_tokens_first(node: ir.Node) -> bool:
    if node.op_type != "Transpose" or node.domain or "perm" not in node.attributes:
        return False
    return tuple(node.attributes["perm"].as_ints()) == _TOKENS_FIRST


def _maker(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind and not node.domain else None


def _size(value: ir.Value) -> int | None:
    last = value.shape[-1] if value.shape is not None else None
    return last if isinstance(last, int) else None


def _attribute(node: ir.Node, name: str, default: float) -> float:
    return node.attributes[name].value if name in node.attributes else default


def _replace(
    graph: ir.Graph, node: ir.Node, kind: str, inputs: Sequence[ir.Value | None], attributes: dict[str, float]
) -> None:
    tape = Tape()
    results = tape.op_multi_out(kind, inputs, attributes, num_outputs=len(node.outputs), domain=DOMAIN)
    graph.insert_before(node, tape.nodes)
    for old, new in zip(node.outputs, results, strict=True):
        new.shape, new.type = old.shape, old.type
        old.replace_all_uses_with(new)
    graph.remove(node, safe=True)
