"""Graphs that TensorRT takes whole, as one engine: made of half's, whose weights they read from half's own file.

TensorRT's parser has no `Attention` with a past, with several outputs or with a softcap, and its attention kernels are
for float16 heads of some sizes. So the past goes, which is always empty, and attention that has no kernel is written
out. What is computed stays half's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx_ir.tape import Tape

from rewardrt.errors import TraceError
from rewardrt_export.precisions.dense_experts import spread_experts
from rewardrt_export.precisions.nodes import register

_SMALL, _LARGE = ir.DataType.FLOAT16, ir.DataType.FLOAT
_SMALLEST, _LARGEST = 16, 256  # heads that the kernels of TensorRT-RTX 1.7 take, in steps of 8


def for_tensorrt(model: ir.Model) -> ir.Model:
    """Turn a half graph into one that TensorRT parses whole, in place.

    Raises TraceError for an operator that is onnxruntime's own: a layer with state.
    """
    own = sorted({node.op_type for node in model.graph if node.domain == "com.microsoft"})
    if own:
        raise TraceError(
            f"tensorrt: the graph computes layers with state by onnxruntime's {', '.join(own)}, which TensorRT lacks; "
            "export it in another precision"
        )
    drop_past(model)
    spread_experts(model.graph)
    for node in list(model.graph):
        if node.op_type == "Attention" and not node.domain and not has_kernel(node):
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


def has_kernel(node: ir.Node) -> bool:
    """Whether TensorRT has a kernel for an `Attention`, as far as the node shows."""
    sizes = [value.shape[-1] for value in node.inputs[:3] if value is not None and value.shape is not None]
    fits = all(isinstance(size, int) and size % 8 == 0 and _SMALLEST <= size <= _LARGEST for size in sizes)
    return fits and not _attribute(node, "softcap", 0.0)


def write_out_attention(graph: ir.Graph, node: ir.Node) -> None:
    """Write attention [batch, heads, tokens, size] as products and a softmax.

    Scores are float32, which a kernel has inside: of float16 operands TF32's products are exact.
    """
    query, key, value, mask = [*node.inputs, None][:4]
    assert query is not None and key is not None and value is not None
    heads, kv_heads, size, deep = _known(query, 1), _known(key, 1), _known(query, 3), _known(value, 3)
    softcap, scale = float(_attribute(node, "softcap", 0.0)), float(_attribute(node, "scale", size**-0.5))
    tape = Tape()
    tokens = tape.op("Shape", [query], {"start": 2, "end": 3})
    rows = _rows_of(tape, query)

    def shaped(tensor: ir.Value, *inner: int, last: int) -> ir.Value:
        """Return [batch, *inner, tokens, last] of a tensor [batch, heads, tokens, last]."""
        shape = tape.op("Concat", [rows, _integers(graph, inner), tokens, _integers(graph, [last])], {"axis": 0})
        return tape.op("Reshape", [tensor, shape])

    large, turned = (tape.op("Cast", [item], {"to": _LARGE}) for item in (query, key))
    turned = tape.op("Transpose", [shaped(turned, kv_heads, 1, last=size)], {"perm": (0, 1, 2, 4, 3)})
    scores = tape.op("MatMul", [shaped(large, kv_heads, heads // kv_heads, last=size), turned])
    scores = tape.op("Mul", [scores, _number(graph, scale / (softcap or 1))])
    if softcap:
        scores = tape.op("Mul", [tape.op("Tanh", [scores]), _number(graph, softcap)])
    if mask is None and _attribute(node, "is_causal", 0):
        mask = _causal_mask(graph, tape, tokens)
    elif mask is not None and mask.shape is not None and len(mask.shape) == 4:
        mask = tape.op("Unsqueeze", [mask, _integers(graph, [1])])
    if mask is not None:
        scores = tape.op("Where", [mask, scores, _number(graph, -1e30)])
    weights = tape.op("Cast", [tape.op("Softmax", [scores], {"axis": -1})], {"to": _SMALL})
    mixed = tape.op("MatMul", [weights, shaped(value, kv_heads, 1, last=deep)])
    _replace(graph, node, tape, shaped(mixed, heads, last=deep))


def _known(value: ir.Value, axis: int) -> int:
    size = value.shape[axis] if value.shape is not None else None
    if not isinstance(size, int):
        raise TraceError(f"{value.name}: attention whose heads have no fixed size cannot be written out for TensorRT")
    return size


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


def _number(graph: ir.Graph, number: float) -> ir.Value:
    return register(graph, ir.tensor(np.array(number, np.float32), name=f"tensorrt.{number!r}"))


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
