"""Several nodes of an int8 graph become one call of an operator that has a kernel for all of them.

Each pass takes an `onnx_ir.Model` and changes it in place. What it does not recognise stays as it is. All of them need
the shapes of values, and that heads follow: what is replaced is no output of the graph. All promise that the graph
computes the same, but for the order of roundings in float32.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnx_ir.tape import Tape

from rewardrt_export.precisions.functions import DOMAIN
from rewardrt_export.precisions.fuse_attention import fuse_attention
from rewardrt_export.precisions.nodes import attribute, made_by, put_in_place
from rewardrt_export.precisions.operators import Product, Rounding, operator_of
from rewardrt_export.precisions.pool import pool_early


def fuse(model: ir.Model) -> None:
    """Run all passes.

    Before: products with weights are a rounding each and plain products of its planes, as `quantize` writes them.
    After: no node is left that nothing reads.
    """
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
    """Let tokens be normalised where they are rounded, if nothing else reads what a norm gives.

    Before: nothing comes before the rounding in its call. After: the norm is in the call, and its node is read by none.
    """
    for node in list(model.graph):
        rounding = operator_of(node)
        if not isinstance(rounding, Rounding) or rounding.before:
            continue
        norm = made_by(node.inputs[0], "RMSNormalization")
        if norm is None or len(norm.outputs[0].uses()) != 1 or attribute(norm, "axis", -1) != -1:
            continue
        values, gain = norm.inputs[0], norm.inputs[1]
        if values is None or gain is None or gain.shape is None or len(gain.shape) != 1:
            continue
        epsilon = attribute(norm, "epsilon", 1e-5)
        attributes = {"channels": attribute(node, "channels", 0), "epsilon": epsilon}
        put_in_place(model.graph, node, replace(rounding, before="Norm"), [values, gain], attributes)


def fuse_sums(model: ir.Model) -> None:
    """Let a product that is only added to a tensor of its shape, the residual stream, be added where it is made.

    Before: the product is plain. After: the sum is in its call, and the plain product's node is read by none.
    """
    for node in list(model.graph):
        if node.op_type != "Add" or node.domain:
            continue
        for product, added in (node.inputs, node.inputs[::-1]):
            maker = product.producer() if product is not None else None
            plain = _plain_product(maker)
            if maker is None or plain is None:
                continue
            if product is None or len(product.uses()) != 1 or added is None:
                continue
            if product.shape is None or added.shape != product.shape:
                continue
            put_in_place(model.graph, node, replace(plain, after="Add"), [*maker.inputs, added], {})
            break


def fuse_gates(model: ir.Model) -> None:
    """Let silu(gate) up, gate sigmoid(gate) up in the graph, be taken where both are made, or else where it is rounded.

    Both are made at one place where they are products of one activation that nothing else reads.

    Before: the products are plain, and nothing comes before the rounding in its call. After: the gate is in one of the
    calls, and the nodes that made it are read by none.
    """
    for node in list(model.graph):
        if node.op_type != "Mul" or node.domain:
            continue
        for silu, up in (node.inputs, node.inputs[::-1]):
            gate = _gate(silu)
            if gate is None or up is None or gate.shape is None or gate.shape != up.shape:
                continue
            opened, made = gate.producer(), up.producer()
            first, second = _plain_product(opened), _plain_product(made)
            alone = len(gate.uses()) == 2 and len(up.uses()) == 1
            if alone and opened and made and first and second and opened.inputs[:-2] == made.inputs[:-2]:
                put_in_place(model.graph, node, replace(second, after="Gate"), [*opened.inputs, *made.inputs[-2:]], {})
                break
            readers = [usage.node for usage in node.outputs[0].uses()]
            rounding = operator_of(readers[0]) if len(readers) == 1 else None
            if isinstance(rounding, Rounding) and not rounding.before:
                attributes = {"channels": attribute(readers[0], "channels", 0)}
                put_in_place(model.graph, readers[0], replace(rounding, before="Gate"), [gate, up], attributes)
            break


def fuse_products(model: ir.Model) -> None:
    """Let two or three products of one activation be taken at once: threads share out the work of all of them.

    Before: `fuse_sums` and `fuse_gates` have taken what they can, and what is left plain is read by itself. After: of
    three plain products in the graph's order that share their planes, one node is left.
    """
    common_passes.RemoveUnusedNodesPass()(model)  # products whose results other passes no longer read
    readers: dict[tuple[ir.Value, Product], list[ir.Node]] = {}
    for node in model.graph:
        plain, plane = _plain_product(node), node.inputs[0] if node.inputs else None
        if plain is not None and plane is not None:
            readers.setdefault((plane, plain), []).append(node)
    for (_, plain), nodes in readers.items():
        # Nodes that lie together: what one of them is multiplied with is never made of what another gave.
        for group in (nodes[start : start + 3] for start in range(0, len(nodes), 3)):
            if len(group) == 1:
                continue
            shared = [item for item in group[0].inputs[:-2] if item is not None]
            weights = [item for node in group for item in node.inputs[-2:] if item is not None]
            together = replace(plain, after="Pair" if len(group) == 2 else "Triple")
            tape = Tape()
            results = tape.op_multi_out(together.name, [*shared, *weights], num_outputs=len(group), domain=DOMAIN)
            model.graph.insert_before(group[0], tape.nodes)
            for node, result in zip(group, results, strict=True):
                old = node.outputs[0]
                result.shape, result.type = old.shape, old.type
                old.replace_all_uses_with(result)
            model.graph.remove(group, safe=True)


def fuse_roundings(model: ir.Model) -> None:
    """Let an activation be rounded where it is multiplied, if it is at one place.

    Before: all products of the activation that can be one call are one. After: where they are, so is their rounding.
    """
    for node in list(model.graph):
        rounding = operator_of(node)
        if not isinstance(rounding, Rounding):
            continue
        readers = {usage.node for output in node.outputs for usage in output.uses()}
        if len(readers) != 1:
            continue
        (reader,) = readers
        multiplied = operator_of(reader)
        planes, rest = reader.inputs[: len(node.outputs)], reader.inputs[len(node.outputs) :]
        if not isinstance(multiplied, Product) or multiplied.rounding or tuple(planes) != tuple(node.outputs):
            continue
        attributes = {name: item.value for name, item in node.attributes.items()}
        put_in_place(model.graph, reader, replace(multiplied, rounding=rounding), [*node.inputs, *rest], attributes)
        model.graph.remove(node, safe=True)


def _plain_product(node: ir.Node | None) -> Product | None:
    found = operator_of(node)
    return found if isinstance(found, Product) and found.plain else None


def _gate(silu: ir.Value | None) -> ir.Value | None:
    """Return x where a value that is read once is x sigmoid(x)."""
    product = made_by(silu, "Mul")
    if silu is None or product is None or len(silu.uses()) != 1 or silu.is_graph_output():
        return None
    for x, gate in (product.inputs, product.inputs[::-1]):
        sigmoid = made_by(gate, "Sigmoid")
        if sigmoid is not None and sigmoid.inputs[0] is x:
            return x
    return None
