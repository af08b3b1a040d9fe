"""A token's values have the same bits wherever its row lies: functions whose kernels compute in vectors get whole ones.

onnxruntime computes cosines, exponentials and the like for as many numbers at once as a vector of the processor holds,
and those that are left over at the end one by one, by other instructions and with other last bits. Where rows are no
whole number of vectors, which numbers these are depends on how many rows there are. So such rows are made longer.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

VECTOR = 16  # float32 numbers in the longest vectors of x86-64; a multiple of those of other processors
FUNCTIONS = ("Atanh", "Cos", "Erf", "Exp", "Gelu", "Log", "Sigmoid", "Sin", "Tanh")


def write_softplus(model: ir.Model) -> None:
    """Write log(1 + e^x) as max(x, 0) + 2 artanh(u / (2 + u)), u = e^-|x|.

    onnxruntime's Softplus shares its numbers out among threads wherever they come to lie, and so has other last bits
    where there are more of them; its Exp and Atanh do not. The form is exact in small results too.

    Before: any graph. After: none of its nodes is a Softplus.
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
    """Let FUNCTIONS be taken of rows of whole vectors.

    Before: their last axis has any length. After: where it is known and no multiple of VECTOR, what they are taken of
    is padded with zeros, and what they give is cut again.
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
    """Put the tape's nodes in the place of a node; what it gave keeps its name, which may be that of an output."""
    graph.insert_before(node, tape.nodes)
    old = node.outputs[0]
    name, old.name = old.name, None
    old.replace_all_uses_with(found, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    found.name = name


def _constant(tape: Tape, array: np.ndarray) -> ir.Value:
    return tape.op("Constant", [], {"value": ir.tensor(array)})
