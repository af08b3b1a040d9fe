"""Graphs that TensorRT takes whole, as one engine: made of half's, whose weights they read from half's own file.

TensorRT's parser has no `Attention` with a past, with several outputs or with a softcap, and its attention kernels are
for float16. So the past goes, which is always empty, and a softcap is written out. What is computed stays half's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx_ir.tape import Tape

from rewardrt_export.precisions.quantize import register

_SMALL, _LARGE = ir.DataType.FLOAT16, ir.DataType.FLOAT


def for_tensorrt(model: ir.Model) -> ir.Model:
    """Turn a half graph into one that TensorRT parses whole, in place."""
    drop_past(model)
    for node in list(model.graph):
        if node.op_type == "Attention" and not node.domain and _attribute(node, "softcap", 0.0):
            write_out_attention(model.graph, node)
    common_passes.RemoveUnusedNodesPass()(model)
    return model


def drop_past(model: ir.Model) -> None:
    """Let attention be over the tokens that are given alone, as with a past of none, and have one output."""
    graph = model.graph
    past = [value for value in graph.inputs if str(value.name).startswith("past_")]
    if not past:
        return
    for value in past:
        _drop(graph, value)
    for node in list(graph):
        if node.op_type == "Attention" and not node.domain:
            tape = Tape()
            inputs = list(node.inputs[:4])
            while inputs[-1] is None:
                inputs.pop()
            attributes = {name: item.value for name, item in node.attributes.items()}
            _replace(graph, node, tape, tape.op("Attention", inputs, attributes))
    graph.inputs[:] = [value for value in graph.inputs if value not in past]
    graph.outputs[:] = [value for value in graph.outputs if not str(value.name).startswith("present_")]
    common_passes.RemoveUnusedNodesPass()(model)


def _drop(graph: ir.Graph, past: ir.Value) -> None:
    """Answer what the graph asks of the shape of a past, or of its rows: those of the batch, and no tokens."""
    rows = [usage.node for usage in past.uses() if usage.node.op_type == "Expand"]
    for value in (past, *(node.outputs[0] for node in rows)):
        for reader in [usage.node for usage in value.uses()]:
            if reader.op_type == "Shape":
                tape = Tape()
                _replace(graph, reader, tape, _empty_shape(graph, tape, past, reader))


def _empty_shape(graph: ir.Graph, tape: Tape, past: ir.Value, node: ir.Node) -> ir.Value:
    """Return [batch, kv_heads, 0, head_dim], or what a Shape takes of it."""
    ids = next(value for value in graph.inputs if value.name == "input_ids")
    assert past.shape is not None
    sizes = [_rows_of(tape, ids), past.shape[1], 0, past.shape[3]]
    kept = sizes[int(_attribute(node, "start", 0)) : int(_attribute(node, "end", len(sizes)))]
    parts = [size if isinstance(size, ir.Value) else _integers(graph, [int(size)]) for size in kept]  # type: ignore[arg-type]
    return parts[0] if len(parts) == 1 else tape.op("Concat", parts, {"axis": 0})


def _rows_of(tape: Tape, value: ir.Value) -> ir.Value:
    return tape.op("Shape", [value], {"start": 0, "end": 1})


def write_out_attention(graph: ir.Graph, node: ir.Node) -> None:
    """Write attention [batch, heads, tokens, size] with a softcap as products and a softmax, which is float32.

    Scores are taken in float16 as the operator takes them, a `softcap`-th of each, which is far from overflowing.
    """
    query, key, value, mask = [*node.inputs, None][:4]
    assert query is not None and key is not None and value is not None
    assert query.shape is not None and key.shape is not None
    heads, kv_heads, size = int(query.shape[1]), int(key.shape[1]), int(query.shape[3])  # type: ignore[arg-type]
    softcap, scale = float(_attribute(node, "softcap", 0.0)), float(_attribute(node, "scale", size**-0.5))
    tape = Tape()
    tokens = tape.op("Shape", [query], {"start": 2, "end": 3})
    rows = _rows_of(tape, query)

    def grouped(tensor: ir.Value, *inner: int) -> ir.Value:
        """Return [batch, kv_heads, group, tokens, size] of a tensor [batch, heads, tokens, size]."""
        shape = tape.op("Concat", [rows, _integers(graph, inner), tokens, _integers(graph, [size])], {"axis": 0})
        return tape.op("Reshape", [tensor, shape])

    scaled = tape.op("Mul", [query, _number(graph, scale / softcap, _SMALL)])
    turned = tape.op("Transpose", [grouped(key, kv_heads, 1)], {"perm": (0, 1, 2, 4, 3)})
    scores = tape.op("MatMul", [grouped(scaled, kv_heads, heads // kv_heads), turned])
    capped = tape.op("Tanh", [tape.op("Cast", [scores], {"to": _LARGE})])
    capped = tape.op("Mul", [capped, _number(graph, softcap, _LARGE)])
    if mask is None:
        mask = _causal_mask(graph, tape, tokens)
    elif mask.shape is not None and len(mask.shape) == 4:
        mask = tape.op("Unsqueeze", [mask, _integers(graph, [1])])
    capped = tape.op("Where", [mask, capped, _number(graph, -1e30, _LARGE)])
    weights = tape.op("Cast", [tape.op("Softmax", [capped], {"axis": -1})], {"to": _SMALL})
    mixed = tape.op("MatMul", [weights, grouped(value, kv_heads, 1)])
    shape = tape.op("Concat", [rows, _integers(graph, [heads]), tokens, _integers(graph, [size])], {"axis": 0})
    _replace(graph, node, tape, tape.op("Reshape", [mixed, shape]))


def _causal_mask(graph: ir.Graph, tape: Tape, tokens: ir.Value) -> ir.Value:
    """Return [tokens, tokens] bool: true where a token may look."""
    first = register(graph, ir.tensor(np.array(0, np.int64), name="tensorrt.zero"))
    step = register(graph, ir.tensor(np.array(1, np.int64), name="tensorrt.one"))
    places = tape.op("Range", [first, tape.op("Squeeze", [tokens]), step])
    asking = tape.op("Unsqueeze", [places, _integers(graph, [1])])
    return tape.op("GreaterOrEqual", [asking, tape.op("Unsqueeze", [places, _integers(graph, [0])])])


def _integers(graph: ir.Graph, numbers: Sequence[int]) -> ir.Value:
    name = f"tensorrt.{'x'.join(map(str, numbers))}"
    return register(graph, ir.tensor(np.array(numbers, np.int64), name=name))


def _number(graph: ir.Graph, number: float, dtype: ir.DataType) -> ir.Value:
    name = f"tensorrt.{number!r}.{'half' if dtype == _SMALL else 'float32'}"
    return register(graph, ir.tensor(np.array(number, dtype.numpy()), name=name))


def _replace(graph: ir.Graph, node: ir.Node, tape: Tape, new: ir.Value) -> None:
    """Put the tape's nodes in the place of a node, of whose outputs the first is read, or was a present."""
    graph.insert_before(node, tape.nodes)
    old = node.outputs[0]
    if not new.is_initializer():
        new.shape, new.type = old.shape, old.type
    old.replace_all_uses_with(new)
    graph.outputs[:] = [value for value in graph.outputs if value not in node.outputs[1:]]
    graph.remove(node, safe=True)


def _attribute(node: ir.Node, name: str, default: float) -> float:
    return node.attributes[name].value if name in node.attributes else default
