"""Pad rows for functions whose kernels work on vectors, so that a token's bits do not depend on where its row is.

onnxruntime computes cosines, exponentials and similar functions for as many numbers at once as fit into a vector
register. It computes the remaining numbers at the end one by one, with other instructions and other last bits. If the
row length is not a multiple of the vector length, which numbers these are depends on the number of rows. So such rows
are padded.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

VECTOR = 16  # float32 numbers in the longest vector registers of x86-64; a multiple of those of other processors
FUNCTIONS = ("Atanh", "Cos", "Erf", "Exp", "Gelu", "Log", "Sigmoid", "Sin", "Tanh")


def write_softplus(model: ir.Model) -> None:
    """Replace log(1 + e^x) by max(x, 0) + 2 artanh(u / (2 + u)) with u = e^-|x|.

    onnxruntime's Softplus divides its numbers among threads without regard to vectors, so its last bits change with the
    number of rows; its Exp and Atanh do not. The new form is also exact for small results.

    Before: any graph. After: it has no Softplus node.
    """
    for node in list(model.graph):
        value = node.inputs[0] if node.inputs else None
        if node.op_type != "Softplus" or node.domain or value is None:
            continue
        tape = Tape()
        two = _constant(tape, np.array(2, np.float32))
        power = tape.op("Exp", [tape.op("Neg", [tape.op("Abs", [value])])])
        ratio = tape.op("Div", [power, tape.op("Add", [power, two])])
        large = tape.op("Mul", [tape.op("Atanh", [ratio]), two])
        found = tape.op("Add", [tape.op("Relu", [value]), large])
        for made in tape.nodes:
            if made.op_type != "Constant":
                made.outputs[0].shape, made.outputs[0].type = value.shape, ir.TensorType(ir.DataType.FLOAT)
        _put(model.graph, node, tape, found)


def pad_rows(model: ir.Model) -> None:
    """Apply FUNCTIONS to rows of whole vectors.

    Before: their last axis has any length. After: if that length is known and not a multiple of VECTOR, the input is
    padded with zeros, and the output is cut again.
    """
    for node in list(model.graph):
        value = node.inputs[0] if node.inputs else None
        if node.op_type not in FUNCTIONS or node.domain or value is None or not value.shape:
            continue
        length = value.shape[-1]
        if not isinstance(length, int) or not length % VECTOR or value.is_initializer():
            continue
        tape = Tape()
        ends = np.zeros(2 * len(value.shape), np.int64)
        ends[-1] = -length % VECTOR
        padded = tape.op("Pad", [value, _constant(tape, ends)])
        found = tape.op(node.op_type, [padded], {name: item.value for name, item in node.attributes.items()})
        bounds = [_constant(tape, np.array([number], np.int64)) for number in (0, length, -1)]
        cut = tape.op("Slice", [found, *bounds])
        for made, last in ((padded, length + int(ends[-1])), (found, length + int(ends[-1])), (cut, length)):
            made.type, made.shape = value.type, ir.Shape([*value.shape[:-1], last])
        _put(model.graph, node, tape, cut)


def _put(graph: ir.Graph, node: ir.Node, tape: Tape, found: ir.Value) -> None:
    """Replace a node by the tape's nodes; the result keeps the old name, which may be that of a graph output."""
    graph.insert_before(node, tape.nodes)
    old = node.outputs[0]
    name, old.name = old.name, None
    old.replace_all_uses_with(found, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    found.name = name


def _constant(tape: Tape, array: np.ndarray) -> ir.Value:
    return tape.op("Constant", [], {"value": ir.tensor(array)})
