"""The operators of int8 graphs: each one object, which says its name, its function, and what its kernel is told of it.

A graph that calls them is complete: onnxruntime puts a function's nodes in the place of the call wherever no kernel is
registered under its name. The kernels are in runtime/kernels, and `table.h` there is written by `kernel_table`. What an
operator takes and gives may never change under its name: a kernel that does not fit is an error, not a reason to take
the function.

A name is written here and read nowhere: `operator_of` finds a node's object by the name that it has.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import onnx_ir as ir
from onnx_ir.tape import Tape

from rewardrt_export.precisions.functions import DOMAIN, written

Before = Literal["", "Scale", "Norm", "Gate"]  # what is done to a token before it is mixed and rounded
After = Literal["", "Add", "Gate", "Pair", "Triple"]  # what becomes of a product; how many there are

FLOAT, FLOAT16, UINT8, INT8 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.UINT8, ir.DataType.INT8
Types: TypeAlias = tuple[ir.DataType, ...]

_ATTRIBUTES = {"channels": ir.AttributeType.INT, "epsilon": ir.AttributeType.FLOAT}
_WEIGHTS = {"": 1, "Add": 1, "Gate": 2, "Pair": 2, "Triple": 3}  # each with the steps of its columns
_RESULTS = {"": 1, "Add": 1, "Gate": 1, "Pair": 2, "Triple": 3}


def _twice(planes: int) -> str:
    return "Twice" if planes == 2 else ""


def _undefined(attributes: Sequence[str]) -> list[ir.Attr]:
    """Make a function's attributes, which have no defaults."""
    return [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in attributes]


@dataclass(frozen=True)
class Rounding:
    """Tokens become one plane of unsigned integers around 128, or two, and the step of each token."""

    before: Before = ""
    mixed: bool = False
    planes: int = 1

    @property
    def name(self) -> str:
        """The name in the graph: NormRoundTokensMixedTwice."""
        return f"{self.before}RoundTokens{'Mixed' if self.mixed else ''}{_twice(self.planes)}"

    @property
    def inputs(self) -> Types:
        """The values, and what comes before has an input of its own: a gain, or for Gate the values behind it."""
        return (FLOAT,) if not self.before else (FLOAT, FLOAT)

    @property
    def outputs(self) -> Types:
        """The planes, and the steps."""
        return (*[UINT8] * self.planes, FLOAT)

    @property
    def attributes(self) -> tuple[str, ...]:
        """The names of the node's attributes."""
        return ("channels", "epsilon") if self.before == "Norm" else ("channels",)

    @property
    def kernel(self) -> dict[str, str | int]:
        """What the kernel is told, as members of the table's structure; what is 0 or empty is left out there."""
        before = self.before.upper()
        return {"compute": "compute_rounding", "before": before, "mixed": int(self.mixed), "twice": self.planes - 1}

    def function(self) -> ir.Function:
        """Make what the operator computes: what comes before, as one node, and a call of what is left."""
        if (found := written(self.name)) is not None:
            return found
        inner = Rounding(planes=self.planes, mixed=self.mixed and bool(self.before))
        names = {"": ["values"], "Gate": ["gate", "up"]}.get(self.before, ["values", "gain"])
        inputs = [ir.Value(name=name) for name in names]
        attributes = {name: ir.RefAttr(name, name, _ATTRIBUTES[name]) for name in self.attributes}
        tape = Tape()
        if self.before == "Norm":
            norm: dict[str, ir.Attr | int] = {"epsilon": attributes["epsilon"], "axis": -1}
            ready = tape.op("RMSNormalization", inputs, norm, output=ir.Value(name="normal"))
        else:
            kind = {"": "Mix", "Scale": "Mul", "Gate": "GateUp"}[self.before]
            domain = "" if self.before == "Scale" else DOMAIN
            ready = tape.op(kind, inputs, domain=domain, output=ir.Value(name="tmp"))
        planes = [ir.Value(name=name, type=ir.TensorType(UINT8)) for name in ("plane", "rest")[: self.planes]]
        outputs = [*planes, ir.Value(name="steps", type=ir.TensorType(FLOAT))]
        tape.op_multi_out(inner.name, [ready], {"channels": attributes["channels"]}, outputs=outputs, domain=DOMAIN)
        for place, node in enumerate(tape.nodes):
            node.name = f"n{place}"
        imports = {"": 23, DOMAIN: 1} if self.before in ("Scale", "Norm") else {DOMAIN: 1}
        graph = ir.Graph(inputs, outputs, nodes=tape.nodes, opset_imports=imports, doc_string=self._text())
        return ir.Function(DOMAIN, self.name, graph=graph, attributes=_undefined(self.attributes))

    def _text(self) -> str:
        """Say what is computed, as graphs hold it."""
        mixes, rounds = "mix it and " if self.mixed else "", f"round it{' twice' if self.planes == 2 else ''}."
        if self.before == "Norm" and not self.mixed and self.planes == 1:
            return "Divide each token by its root mean square, multiply it with a gain, and round it."
        begun = {
            "": "Mix each token, then ",
            "Scale": f"Multiply each token with a gain, {mixes or 'and '}",
            "Norm": f"Normalise each token{f', {mixes}' if mixes else ' and '}",
            "Gate": f"Take silu(gate) up of each token, and {mixes}",
        }
        return begun[self.before] + rounds


@dataclass(frozen=True)
class Product:
    """Rounded tokens are multiplied with one weight or several; with `rounding`, they are rounded there and then."""

    planes: int = 1
    after: After = ""
    rounding: Rounding | None = None

    @property
    def name(self) -> str:
        """The name in the graph: NormRoundMixedProductTwiceAdd."""
        rounds = self.rounding
        begun = f"{rounds.before}Round{'Mixed' if rounds.mixed else ''}" if rounds is not None else ""
        return f"{begun}Product{_twice(self.planes)}{self.after}"

    @property
    def plain(self) -> bool:
        """Whether there is one product and nothing else."""
        return self.rounding is None and not self.after

    @property
    def inputs(self) -> Types:
        """What is multiplied, each weight with the steps of its columns, and what is added."""
        first = self.rounding.inputs if self.rounding is not None else Rounding(planes=self.planes).outputs
        return first + (INT8, FLOAT) * _WEIGHTS[self.after] + ((FLOAT,) if self.after == "Add" else ())

    @property
    def outputs(self) -> Types:
        """The results."""
        return (FLOAT,) * _RESULTS[self.after]

    @property
    def attributes(self) -> tuple[str, ...]:
        """The names of the node's attributes: those of its rounding."""
        return self.rounding.attributes if self.rounding is not None else ()

    @property
    def kernel(self) -> dict[str, str | int]:
        """What the kernel is told, as members of the table's structure; what is 0 or empty is left out there."""
        told = {} if self.rounding is None else self.rounding.kernel
        compute = "compute_products" if self.rounding is None else "compute_rounded_products"
        counts = {
            "products": _WEIGHTS[self.after],
            "added": int(self.after == "Add"),
            "gated": int(self.after == "Gate"),
        }
        return told | {"compute": compute, "twice": self.planes - 1} | counts

    def function(self) -> ir.Function:
        """Make what the operator computes: calls of others, of the rounding first where there is one."""
        if (found := written(self.name)) is not None:
            return found
        weights = [
            [ir.Value(name=f"{part}{place}") for part in ("weight", "columns")] for place in range(_WEIGHTS[self.after])
        ]
        rest = [value for weight in weights for value in weight]
        rest += [ir.Value(name="added")] if self.after == "Add" else []
        tape = Tape()
        results: Sequence[ir.Value]
        if self.rounding is not None:
            inputs = [ir.Value(name=name) for name in ("values", "second")[: len(self.rounding.inputs)]]
            attributes = {name: ir.RefAttr(name, name, _ATTRIBUTES[name]) for name in self.attributes}
            planes = tape.op_multi_out(
                self.rounding.name, inputs, attributes, num_outputs=len(self.rounding.outputs), domain=DOMAIN
            )
            multiplied = Product(self.planes, self.after)
            results = tape.op_multi_out(
                multiplied.name, [*planes, *rest], num_outputs=len(multiplied.outputs), domain=DOMAIN
            )
        else:
            inputs = [ir.Value(name=name) for name in (*("plane", "rest")[: self.planes], "steps")]
            one = Product(self.planes)
            results = [tape.op(one.name, [*inputs, *weight], domain=DOMAIN) for weight in weights]
        for place, value in enumerate(value for node in tape.nodes for value in node.outputs):
            value.name = f"made{place}"
        graph = ir.Graph([*inputs, *rest], results, nodes=tape.nodes, opset_imports={DOMAIN: 1})
        return ir.Function(DOMAIN, self.name, graph=graph, attributes=_undefined(self.attributes))


@dataclass(frozen=True)
class Attention:
    """Causal attention of new tokens to a past and each other; `rotary`: queries and new keys are rotated first."""

    rotary: bool = False

    @property
    def name(self) -> str:
        """The name in the graph."""
        return f"{'Rotary' if self.rotary else ''}CausalAttention"

    @property
    def inputs(self) -> Types:
        """Queries, keys and values, the past's keys and values, and the angles' cosines and sines."""
        return (FLOAT, FLOAT, FLOAT, FLOAT16, FLOAT16) + ((FLOAT, FLOAT) if self.rotary else ())

    @property
    def outputs(self) -> Types:
        """The result, and keys and values of past and new tokens."""
        return (FLOAT, FLOAT16, FLOAT16)

    @property
    def attributes(self) -> tuple[str, ...]:
        """The names of the node's attributes."""
        return ("scale",)

    @property
    def kernel(self) -> dict[str, str | int]:
        """What the kernel is told, as members of the table's structure; what is 0 or empty is left out there."""
        return {"compute": "compute_attention"}

    def function(self) -> ir.Function:
        """Make what the operator computes."""
        found = written(self.name)
        assert found is not None
        return found


Operator: TypeAlias = Rounding | Product | Attention

_ROUNDINGS = [
    Rounding(before, mixed, planes) for before in get_args(Before) for mixed in (False, True) for planes in (1, 2)
]
_MULTIPLIED = [*(Product(planes) for planes in (1, 2)), *(Product(each.planes, rounding=each) for each in _ROUNDINGS)]
# By the name of the C table, in its order.
OPERATORS: dict[str, Sequence[Operator]] = {
    "ROUNDINGS": _ROUNDINGS,
    "PRODUCTS": [replace(product, after=after) for product in _MULTIPLIED for after in get_args(After)],
    "ATTENTIONS": [Attention(), Attention(rotary=True)],
}
_BY_NAME: dict[str, Operator] = {operator.name: operator for table in OPERATORS.values() for operator in table}


def operator_of(node: ir.Node | None) -> Operator | None:
    """Return the operator that a node calls; None for a node of another domain."""
    return _BY_NAME[node.op_type] if node is not None and node.domain == DOMAIN else None


def define(model: ir.Model) -> None:
    """Give the model the functions that its nodes call, and those that these call."""
    pending = [node.op_type for node in model.graph if node.domain == DOMAIN]
    while pending:
        name = pending.pop()
        if (DOMAIN, name, "") in model.functions:
            continue
        function = _BY_NAME[name].function() if name in _BY_NAME else written(name)
        assert function is not None, f"no operator {name!r}"
        model.functions[function.identifier()] = function
        pending += [node.op_type for node in function if node.domain == DOMAIN]
    model.opset_imports.update({DOMAIN: 1, "com.microsoft": 1})


def kernel_table() -> str:
    """Return runtime/kernels/table.h: what the kernels know of each operator."""
    lines = ["/* The operators of int8 graphs, as operators.py of the export says. Written by `make kernel-table`. */"]
    for name, operators in OPERATORS.items():
        lines.append(f"static const Operator {name}[] = {{")
        for operator in operators:
            inputs, outputs = (", ".join(kind.name for kind in kinds) for kinds in (operator.inputs, operator.outputs))
            told = ", ".join(f".{key} = {value}" for key, value in operator.kernel.items() if value)
            lines.append(
                f'    {{.base = BASE, .name = "{operator.name}", .inputs = {{{inputs}}}, .outputs = {{{outputs}}},'
            )
            lines.append(f"     {told}}},")
        lines.append("};")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(kernel_table())
