"""The inputs a graph is traced with: samples, their dynamic axes, and the names of the bundle's graph contract."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from rewardrt.bundle.spec import Spec


@dataclass(frozen=True)
class AttentionShape:
    """One attention layer of a decoder: the number of key/value heads, and the size of a head's keys and values."""

    kv_heads: int
    key_size: int
    value_size: int


@dataclass(frozen=True)
class PastShape:
    """What a decoder's graph takes from a past: its attention layers, and the sizes of each state without the batch.

    A graph that takes no past has neither.
    """

    layers: Sequence[AttentionShape] = ()
    states: Sequence[tuple[int, ...]] = ()


@dataclass(frozen=True)
class Signature:
    """Sample inputs to trace a graph with, which of their axes are dynamic, and the names of inputs and outputs."""

    inputs: dict[str, Any]
    axes: dict[str, Any]
    input_names: list[str]
    output_names: list[str]


def signature_of(spec: Spec, taken: PastShape, every_token: bool) -> Signature:
    """Return the signature of a spec's graph with this past; call it where tensors are made as fakes."""
    layers = taken.layers
    batch, tokens, past = (torch.export.Dim(name) for name in ("batch", "tokens", "past"))
    inputs: dict[str, Any] = {"input_ids": torch.zeros(2, 5, dtype=torch.long), "lengths": torch.full((2,), 5)}
    axes: dict[str, Any] = {"input_ids": {0: batch, 1: tokens}, "lengths": {0: batch}}
    names, outputs = ["input_ids", "lengths"], ["rewards", *(["token_rewards"] if every_token else [])]
    if layers:
        # Each input needs its own tensor: the exporter would connect a shared one to only one of its inputs.
        inputs["past_keys"] = [torch.zeros(2, layer.kv_heads, 3, layer.key_size) for layer in layers]
        inputs["past_values"] = [torch.zeros(2, layer.kv_heads, 3, layer.value_size) for layer in layers]
        axes |= {name: [{0: batch, 2: past} for _ in layers] for name in ("past_keys", "past_values")}
        names += [f"past_{part}.{i}" for part in ("key", "value") for i in range(len(layers))]
        outputs += [f"present_{part}.{i}" for i in range(len(layers)) for part in ("key", "value")]
    if taken.states:
        inputs["past_states"] = [torch.zeros(2, *sizes) for sizes in taken.states]
        axes["past_states"] = [{0: batch} for _ in taken.states]
        names += [f"past_state.{i}" for i in range(len(taken.states))]
        outputs += [f"present_state.{i}" for i in range(len(taken.states))]
    if spec.text.type_ids:
        inputs["token_type_ids"] = torch.zeros(2, 5, dtype=torch.long)
        axes["token_type_ids"] = {0: batch, 1: tokens}
        names.append("token_type_ids")
    if spec.has_positions:
        inputs["positions"] = torch.zeros(2, len(spec.taps), dtype=torch.long)
        axes["positions"] = {0: batch}
        names.append("positions")
    return Signature(inputs, axes, names, outputs)


def name_axes(model: ir.Model) -> None:
    """Give every input and output the axis names of the bundle's graph contract."""
    names = {
        "input_ids": ("batch", "tokens"),
        "lengths": ("batch",),
        "rewards": ("batch", None),
        "token_rewards": ("batch", "tokens", None),
        "positions": ("batch", None),
        "token_type_ids": ("batch", "tokens"),
    }
    past, total = ("batch", None, "past", None), ("batch", None, "past + tokens", None)
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.name is not None and value.shape is not None
        kind = value.name.split(".")[0]
        state = ("batch", *[None] * (len(value.shape) - 1)) if kind in ("past_state", "present_state") else None
        axes = names.get(kind) or state or (past if kind.startswith("past") else total)
        value.shape = ir.Shape([axis or size for axis, size in zip(axes, value.shape, strict=True)])
