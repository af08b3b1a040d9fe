"""Mixtures of experts: tokens are grouped by expert, and each expert multiplies only its own tokens.

transformers' traceable implementation gathers an expert's weights for every token, a copy of a matrix per token. Here
the tokens' rows are sorted by expert and split, and every expert multiplies its rows by weights that are constants of
the graph, as in any other layer. So precisions store, round and multiply them in the usual way, and a row gets the same
bits however many others its expert has.

A layer is traced with one expert, between two marks. `copy_experts` then copies the nodes between the marks for each
expert.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript import FLOAT, INT64, opset23
from onnxscript.values import Op, Opset
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

EXPERTS = "rewardrt"  # the name under which the hook is registered with transformers
MARKS = "rewardrt.marks"  # the domain of nodes that `copy_experts` removes


@torch.library.custom_op("rewardrt::order_of", mutates_args=())
def order_of(values: torch.Tensor) -> torch.Tensor:
    """Return the indices [n] int64 that sort values [n] int64; equal values keep their order."""
    raise NotImplementedError("this operator exists to be traced")


@order_of.register_fake
def _(values: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(values)


def _onnx_order_of(values: INT64) -> INT64:
    op: Any = opset23
    return op.TopK(values, op.Shape(values), axis=0, largest=0, sorted=1)[1]


@torch.library.custom_op("rewardrt::to_experts", mutates_args=())
def to_experts(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mark where rows [1, rows, width], sorted by expert, are split among the experts; `counts` [experts] int64."""
    raise NotImplementedError("this operator exists to be traced")


@to_experts.register_fake
def _(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(rows)  # in the trace, one expert gets all rows


@torch.library.custom_op("rewardrt::one_expert", mutates_args=())
def one_expert(stacked: torch.Tensor) -> torch.Tensor:
    """Mark the use of one expert's weight or bias out of the stacked ones [experts, ...]."""
    raise NotImplementedError("this operator exists to be traced")


@one_expert.register_fake
def _(stacked: torch.Tensor) -> torch.Tensor:
    return stacked.new_empty(stacked.shape[1:])


@torch.library.custom_op("rewardrt::from_experts", mutates_args=())
def from_experts(rows: torch.Tensor) -> torch.Tensor:
    """Mark where the rows of all experts are joined again."""
    raise NotImplementedError("this operator exists to be traced")


@from_experts.register_fake
def _(rows: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(rows)


def _mark(name: str, *inputs: str) -> Op:
    """Return a mark operator of this name, whose output has the type of its first input."""
    schema = OpSchema(
        name,
        MARKS,
        1,
        inputs=[
            OpSchema.FormalParameter(item, kind) for item, kind in zip(inputs, ("T", "tensor(int64)"), strict=False)
        ],
        outputs=[OpSchema.FormalParameter("found", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
    )
    return Op(Opset(MARKS, 1), name, schema)


_TO_EXPERTS = _mark("ToExperts", "rows", "counts")
_ONE_EXPERT = _mark("OneExpert", "stacked")
_FROM_EXPERTS = _mark("FromExperts", "rows")


def _onnx_to_experts(rows: FLOAT, counts: INT64) -> FLOAT:
    return _TO_EXPERTS(rows, counts)


def _onnx_one_expert(stacked: FLOAT) -> FLOAT:
    return _ONE_EXPERT(stacked)


def _onnx_from_experts(rows: FLOAT) -> FLOAT:
    return _FROM_EXPERTS(rows)


# Translations of the custom operators to ONNX.
EXPERT_TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.rewardrt.order_of.default: _onnx_order_of,
    torch.ops.rewardrt.to_experts.default: _onnx_to_experts,
    torch.ops.rewardrt.one_expert.default: _onnx_one_expert,
    torch.ops.rewardrt.from_experts.default: _onnx_from_experts,
}


def _experts_hook(
    module: Any,  # of the classes that transformers' `use_experts_implementation` makes
    hidden: torch.Tensor,  # [tokens, hidden]
    chosen: torch.Tensor,  # [tokens, top] int64: the experts of each token
    weights: torch.Tensor,  # [tokens, top]
) -> torch.Tensor:
    """Replace transformers' functions for experts; return [tokens, hidden]."""
    top, width = chosen.shape[1], hidden.shape[1]
    flat = chosen.reshape(-1)
    order = torch.ops.rewardrt.order_of(flat)
    counts = (flat.unsqueeze(1) == torch.arange(module.num_experts)).to(torch.int64).sum(0)
    given = hidden.index_select(0, torch.div(order, top, rounding_mode="trunc"))
    # [1, rows, width], because with two axes the exporter would make a Gemm, which no precision handles.
    rows = torch.ops.rewardrt.to_experts(given.unsqueeze(0), counts)
    rows = through_expert(module, rows, partial(_product, module))
    rows = torch.ops.rewardrt.from_experts(rows).squeeze(0)
    place = torch.ops.rewardrt.order_of(order)
    # A product, not a sum over experts, which onnxruntime would add in an order that depends on the other tokens.
    return torch.bmm(weights.to(rows.dtype).unsqueeze(1), rows.index_select(0, place).view(-1, top, width)).squeeze(1)


def through_expert(
    module: Any, rows: torch.Tensor, multiply: Callable[[str, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Compute one expert over its rows; `multiply(name, rows)` is the product with the weight of that name."""
    if module.has_gate:
        rows = module._apply_gate(multiply("gate_up_proj", rows))
    else:
        rows = module.act_fn(multiply("up_proj", rows))
    rows = multiply("down_proj", rows)
    return module.post_expert_norm(rows) if module.has_post_expert_norm else rows


def _product(module: Any, name: str, rows: torch.Tensor) -> torch.Tensor:
    weight = torch.ops.rewardrt.one_expert(getattr(module, name))
    bias = torch.ops.rewardrt.one_expert(getattr(module, f"{name}_bias")) if module.has_bias else None
    return nn.functional.linear(rows, weight.T if module.is_transposed else weight, bias)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _experts_hook)


def weight_of_expert(stack: str, expert: int, *, turned: bool) -> str:
    """Return the name of one expert's weight; `turned` if the graph stores the transpose of the model's weight."""
    return f"{stack}.{expert}{'.T' if turned else ''}"


def copy_experts(model: ir.Model) -> None:
    """Copy the nodes between the marks of each layer, once for each expert.

    Before: one expert's nodes are between `ToExperts` and `FromExperts`, and `OneExpert` reads stacked weights. After:
    there are no marks; each expert's weights are initializers named after the stacked weight, with the expert's number.
    """
    nodes = list(model.graph)
    inside: set[ir.Value] = set()  # values that depend on a mark
    begin: ir.Node | None = None
    body: list[ir.Node] = []
    for node in nodes:
        if node.domain == MARKS and node.op_type == "ToExperts":
            begin, body = node, []
            inside = set(node.outputs)
        elif node.domain == MARKS and node.op_type == "FromExperts":
            assert begin is not None
            _copy(model.graph, begin, body, node)
            begin = None
        elif (node.domain == MARKS and node.op_type == "OneExpert") or any(value in inside for value in node.inputs):
            body.append(node)
            inside.update(node.outputs)
    stacks = {node.inputs[0] for node in nodes if node.domain == MARKS and node.op_type == "OneExpert"}
    for stack in stacks:
        if stack is not None and not stack.uses():
            del model.graph.initializers[str(stack.name)]
    model.opset_imports.pop(MARKS, None)


def _copy(graph: ir.Graph, begin: ir.Node, body: list[ir.Node], end: ir.Node) -> None:
    rows, counts = begin.inputs
    assert rows is not None and counts is not None and counts.shape is not None
    experts = int(counts.shape[0])  # type: ignore[arg-type]
    split = ir.Node("", "Split", [rows, counts], attributes=[ir.AttrInt64("axis", 1)], num_outputs=experts)
    graph.insert_before(begin, split)
    marks = {node.outputs[0]: _Stack(node) for node in body if node.domain == MARKS}
    results = []
    for expert, piece in enumerate(split.outputs):
        own = f"{end.outputs[0].name}.{expert}"  # an axis name of its own: equal names mean equal sizes
        copies: dict[ir.Value, ir.Value] = {begin.outputs[0]: piece}
        _take_type(piece, begin.outputs[0], own)

        def copy_of(
            value: ir.Value | None, copies: dict[ir.Value, ir.Value] = copies, expert: int = expert
        ) -> ir.Value | None:
            if value in marks:
                return marks[value].weight(graph, expert, turned=False)
            return value if value is None else copies.get(value, value)

        for node in body:
            if node.domain == MARKS:
                continue
            if (stack := _turned(node, marks)) is not None:
                copies[node.outputs[0]] = stack.weight(graph, expert, turned=True)
                continue
            new = ir.Node(
                node.domain,
                node.op_type,
                [copy_of(value) for value in node.inputs],
                attributes=list(node.attributes.values()),
                num_outputs=len(node.outputs),
            )
            graph.insert_before(end, new)
            for old, made in zip(node.outputs, new.outputs, strict=True):
                _take_type(made, old, own)
                copies[old] = made
        results.append(copy_of(end.inputs[0]))
    joined = ir.Node("", "Concat", results, attributes=[ir.AttrInt64("axis", 1)])
    graph.insert_before(end, joined)
    joined.outputs[0].shape, joined.outputs[0].type = end.outputs[0].shape, end.outputs[0].type
    end.outputs[0].replace_all_uses_with(joined.outputs[0])
    graph.remove([begin, *body, end], safe=True)


def _turned(node: ir.Node, marks: dict[ir.Value, _Stack]) -> _Stack | None:
    """Return the stacked weights if the node transposes one of them, else None."""
    read = node.inputs[0] if node.op_type == "Transpose" else None
    return marks.get(read) if read is not None else None


def _take_type(value: ir.Value, of: ir.Value, rows: str) -> None:
    """Give an expert's value the type and shape of the traced one, with an own name for its number of rows."""
    value.type = of.type
    if of.shape is not None:
        value.shape = ir.Shape([1, rows, *of.shape[2:]]) if len(of.shape) > 2 else of.shape


class _Stack:
    """The stacked weights of a layer's experts. They are read one by one, and kept in memory until the last is read."""

    def __init__(self, mark: ir.Node) -> None:
        stack = mark.inputs[0]
        assert stack is not None and stack.const_value is not None and stack.name is not None
        self._stored: ir.TensorProtocol = stack.const_value
        self._name = stack.name
        self._held: npt.NDArray[Any] | None = None

    def weight(self, graph: ir.Graph, expert: int, *, turned: bool) -> ir.Value:
        """Return the initializer of one expert's weight; `turned` means transposed."""
        name = weight_of_expert(self._name, expert, turned=turned)
        if name not in graph.initializers:
            shape = list(self._stored.shape.numpy()[1:])
            shape = shape[::-1] if turned else shape
            tensor = ir.LazyTensor(
                partial(self._read, expert, name, turned),
                dtype=self._stored.dtype,
                shape=ir.Shape(shape),
                name=name,
            )
            value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype))
            graph.register_initializer(value)
        return graph.initializers[name]

    def _read(self, expert: int, name: str, turned: bool) -> ir.TensorProtocol:
        stack = self._stored.numpy() if self._held is None else self._held
        one = stack[expert]
        self._held = None if expert == len(stack) - 1 else stack
        return ir.tensor(np.ascontiguousarray(one.T if turned else one), name=name)
