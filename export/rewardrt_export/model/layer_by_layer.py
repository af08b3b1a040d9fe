"""A layer that is in memory only while it runs, forwards and backwards, so that a model need not fit in memory.

On the way forward only the layer's inputs are kept. Where gradients are derived, the layer gets its weights again on
the way back, runs again from those inputs, and its gradients are derived from there: activation checkpointing (Chen et
al. 2016, https://arxiv.org/abs/1604.06174) that releases the weights too. The gradients have the bits of those of the
whole model, since the same operations run on the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

Weights = Callable[[], dict[str, torch.Tensor]]  # reads those of a layer, by the names in its state


class UnderivableError(Exception):
    """A layer hands numbers to another in a way that gradients cannot be followed through."""


def hold_only_while_it_runs(layer: nn.Module, read: Weights) -> None:
    """Let a layer on the meta device read its weights whenever it runs, and release them after."""
    layer.forward = _Layer(layer, read)


class _Layer:
    """What stands for a layer's `forward`."""

    def __init__(self, layer: nn.Module, read: Weights) -> None:
        self._layer, self._read, self._forward = layer, read, layer.forward
        self._empty = layer.state_dict()
        self._result: pytree.TreeSpec | None = None  # how the outputs of the latest run lie in what it returned

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            with self.weights():
                return self._forward(*args, **kwargs)
        _check_containers((args, kwargs))
        leaves, structure = pytree.tree_flatten((args, kwargs))
        found = _RunTwice.apply(self, structure, *leaves)
        assert self._result is not None
        return pytree.tree_unflatten(found, self._result)

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Have the weights within the block, and nothing of them after it."""
        self._layer.load_state_dict(self._read(), strict=True, assign=True)
        try:
            yield
        finally:
            self._layer.load_state_dict(self._empty, strict=True, assign=True)
            self._layer.requires_grad_(False)  # the next weights would take it over from these

    def run(self, structure: pytree.TreeSpec, leaves: Iterable[Any]) -> list[Any]:
        """Return the outputs, with the weights in place."""
        args, kwargs = pytree.tree_unflatten(leaves, structure)
        found = self._forward(*args, **kwargs)
        _check_containers(found)
        outputs, self._result = pytree.tree_flatten(found)
        return outputs


class _RunTwice(torch.autograd.Function):
    """Forwards without gradients; backwards again from the inputs, with them."""

    @staticmethod
    def forward(ctx: Any, layer: _Layer, structure: pytree.TreeSpec, *leaves: Any) -> tuple[Any, ...]:
        ctx.layer, ctx.structure, ctx.leaves = layer, structure, leaves
        with layer.weights():
            return tuple(layer.run(structure, map(_copied, leaves)))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        inputs = [
            leaf.detach().requires_grad_() if isinstance(leaf, torch.Tensor) and leaf.requires_grad else leaf
            for leaf in ctx.leaves
        ]
        with ctx.layer.weights():
            with torch.enable_grad():
                outputs = ctx.layer.run(ctx.structure, map(_copied, inputs))
            pairs = [
                (output, gradient)
                for output, gradient in zip(outputs, gradients, strict=True)
                if isinstance(output, torch.Tensor) and output.requires_grad and gradient is not None
            ]
            torch.autograd.backward([output for output, _ in pairs], [gradient for _, gradient in pairs])
        return (None, None, *(leaf.grad if isinstance(leaf, torch.Tensor) else None for leaf in inputs))


def _copied(leaf: Any) -> Any:
    """Return a copy of what gradients go through, since a layer may write into its input."""
    return leaf.clone() if isinstance(leaf, torch.Tensor) and leaf.requires_grad else leaf


def _check_containers(value: Any) -> None:
    """Raise UnderivableError where a tensor lies in something else than tuples and lists, which may be shared."""
    args, kwargs = value if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict) else (value, {})
    for leaf in pytree.tree_leaves((args, list(kwargs.values())), is_leaf=_is_other_container):
        if _is_other_container(leaf) and any(isinstance(each, torch.Tensor) for each in pytree.tree_leaves(leaf)):
            raise UnderivableError(f"its layers hand each other a {type(leaf).__name__}")


def _is_other_container(value: Any) -> bool:
    return isinstance(value, dict)
