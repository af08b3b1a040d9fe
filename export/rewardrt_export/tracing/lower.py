"""From the traced graph to the float32 graph to write: bind weights, remove transposes, apply standard fusions.

Each pass changes an `onnx_ir.Model` in place; `lower` calls them in order.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import onnxscript.optimizer
import onnxscript.rewriter.onnx_fusions
import torch
from onnx_ir.tape import Tape

from rewardrt.errors import CheckpointError, TraceError
from rewardrt_export.model.heads import Reader
from rewardrt_export.tracing.experts import copy_experts
from rewardrt_export.tracing.trace import root_cause
from rewardrt_export.tracing.whole_vectors import pad_rows, write_softplus


def lower(model: ir.Model, weights: dict[str, Reader]) -> ir.Model:
    """Bind `weights` (readers by initializer name) and optimize the graph.

    Before: a graph as the exporter traced it. After: no weight is only read through a Transpose, no two nodes compute
    the same, no node is unused, and no node names a file of this machine. Only small tensors are read here; data stays
    lazy until the model is saved.
    """
    bind_weights(model, weights)
    open_products(model)
    store_transposed(model)
    try:
        onnxscript.optimizer.optimize_ir(model)
        onnxscript.rewriter.onnx_fusions.fuse(model)
    except ir.passes.PassError as error:  # folding reads small weights, and wraps the error about a bad one
        raise root_cause(error) from error
    write_softplus(model)
    pad_rows(model)
    copy_experts(model)  # after the passes that are slow in graphs with many nodes
    # The rotary fusion computes cosines and sines for each layer, and each window layer makes its own mask; merge them.
    common_passes.CommonSubexpressionEliminationPass()(model)
    common_passes.RemoveUnusedNodesPass()(model)
    common_passes.RemoveUnusedOpsetsPass()(model)
    for value in model.graph.all_nodes():
        value.metadata_props.clear()  # the exporter's stack traces, which contain paths of this machine
    return model


def bind_weights(model: ir.Model, weights: dict[str, Reader]) -> None:
    """Give each parameter's initializer its data, as float32, read when it is written.

    Before: initializers without a reader already have data (buffers computed from the config). After: every initializer
    can be written. Raises TraceError for one that cannot, and, when the data is read, CheckpointError for a tensor with
    another shape or with values that are not finite.
    """
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        if name in weights:
            value.const_value = _lazy(name, weights[name], tuple(tensor.shape.numpy()))
        elif isinstance(getattr(tensor, "raw", None), torch._subclasses.FakeTensor):
            raise TraceError(f"{name}: the graph needs a tensor that the checkpoint does not give")


def _lazy(name: str, read: Reader, shape: tuple[int, ...]) -> ir.LazyTensor:
    def evaluate() -> ir.TensorProtocol:
        tensor = read().detach().to(torch.float32)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{name}: shape {list(tensor.shape)} in the checkpoint, {list(shape)} expected")
        # isfinite on all values would make copies as large as the tensor, which may barely fit into memory.
        if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
            raise CheckpointError(f"{name}: holds values that are not finite (NaN or infinity); the training diverged")
        return ir.tensor(tensor.numpy(), name=name)

    return ir.LazyTensor(evaluate, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=name)


def open_products(model: ir.Model) -> None:
    """Write every product with a weight of the backbone as MatMul, whatever its number of axes.

    Before: the exporter makes a Gemm of a product of two axes, for example where a mixture has flattened batch and
    tokens. After: it is a MatMul and an Add of its bias, as for three axes; precisions recognise products by that.
    """
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == "Gemm" and not node.domain else None
        if weight is None or not str(weight.name).startswith("backbone.") or not weight.is_initializer():
            continue
        given = {name: item.value for name, item in node.attributes.items()}
        if given.get("transA") or given.get("alpha", 1.0) != 1.0 or given.get("beta", 1.0) != 1.0:
            continue
        tape = Tape()
        right = tape.op("Transpose", [weight], {"perm": (1, 0)}) if given.get("transB") else weight
        found = tape.op("MatMul", [node.inputs[0], right])
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        result = found if bias is None else tape.op("Add", [found, bias])
        for value in {found, result}:
            value.shape, value.type = node.outputs[0].shape, node.outputs[0].type
        model.graph.insert_before(node, tape.nodes)
        node.outputs[0].replace_all_uses_with(result)
        model.graph.remove(node, safe=True)


def store_transposed(model: ir.Model) -> None:
    """Store a weight that is only used transposed in its transposed layout.

    torch stores Linear weights as [out, in], and ONNX MatMul takes [in, out]. Left alone, the Transpose would be folded
    into a second copy of the weight, by the optimizer or by every onnxruntime session that loads the file.

    1. If all uses of the weight are the same 2-D Transpose, the initializer itself is replaced.
    2. Otherwise (a tied embedding that is also looked up) it is left unchanged.

    Before: weights are bound. After: the results are the same to the bit, and each weight is stored once.
    """
    for name, value in list(model.graph.initializers.items()):
        uses = [usage.node for usage in value.uses()]
        stored = value.const_value
        if len(stored.shape) != 2 or not uses or any(not _is_plain_transpose(node) for node in uses):  # type: ignore[union-attr]
            continue
        assert stored is not None
        rows, columns = stored.shape.numpy()
        flipped = ir.LazyTensor(
            partial(_transposed, stored), dtype=stored.dtype, shape=ir.Shape([columns, rows]), name=name
        )
        value.const_value = flipped
        value.shape = ir.Shape([columns, rows])
        for node in uses:
            node.outputs[0].replace_all_uses_with(value)
            model.graph.remove(node, safe=True)


def _transposed(stored: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(np.ascontiguousarray(stored.numpy().T), name=stored.name)


def _is_plain_transpose(node: ir.Node) -> bool:
    perm = node.attributes.get("perm")
    return node.op_type == "Transpose" and node.domain == "" and (perm is None or list(perm.as_ints()) == [1, 0])
