"""Causal attention of an int8 graph, with what lies around it, becomes one call of an operator that has a kernel."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.tape import Tape

from rewardrt_export.precisions.functions import DOMAIN
from rewardrt_export.precisions.nodes import attribute, last_size, made_by
from rewardrt_export.precisions.operators import Attention

_TOKENS_FIRST = (0, 2, 1, 3)  # [batch, heads, tokens, size] to or from [batch, tokens, heads, size]
_LANES = 16  # that the kernels take of a head at once
_LARGEST_HEAD = 256


def fuse_attention(model: ir.Model) -> None:
    """Let causal attention, the transposes around it and, where there is one, the rotation before it be one call.

    Attention within a window (it has a mask) and with a softcap is left alone.

    Before: past and present are inputs and outputs of the graph, float32, and heads have a known size. After: of what
    was taken they are float16; the transposes and rotations that went into the call are read by none.
    """
    for node in list(model.graph):
        if node.op_type == "Attention" and not node.domain:
            _fuse_attention(model.graph, node)


def _fuse_attention(graph: ir.Graph, node: ir.Node) -> None:
    query, key, value, mask, *past = [*node.inputs, None, None, None][:6]
    if mask is not None or not attribute(node, "is_causal", 0) or attribute(node, "softcap", 0.0):
        return
    if query is None or key is None or value is None or any(item is None or not item.is_graph_input() for item in past):
        return
    sizes = {last_size(item) for item in (query, key, value)}
    head = sizes.pop()
    if (
        sizes
        or head is None
        or head % _LANES
        or head > _LARGEST_HEAD
        or "scale" not in node.attributes
        or len(node.outputs) != 3
    ):
        return
    tape = Tape()
    angles: list[ir.Value] = []
    rotations = [_rotation(query, head), _rotation(key, head)]
    if rotations[0] is not None and rotations[1] is not None and rotations[0].inputs[1:] == rotations[1].inputs[1:]:
        query, key, *angles = [rotations[0].inputs[0], *rotations[1].inputs]  # type: ignore[list-item]
    operands = [_tokens_first(tape, item) for item in (query, key, value)]  # type: ignore[arg-type]
    called = tape.op_multi_out(
        Attention(rotary=bool(angles)).name,
        [*operands, *past, *angles],
        {"scale": attribute(node, "scale", 1.0)},
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


def _rotation(value: ir.Value, head: int) -> ir.Node | None:
    """Return the node that rotates the halves of whole heads [batch, heads, tokens, head], and nothing else reads."""
    node = made_by(value, "RotaryEmbedding")
    if node is None or len(value.uses()) != 1 or len(node.inputs) != 3 or head % (2 * _LANES):
        return None
    return None if attribute(node, "interleaved", 0) or attribute(node, "rotary_embedding_dim", 0) else node


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
