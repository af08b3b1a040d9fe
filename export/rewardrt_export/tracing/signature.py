"""What a graph is traced with: sample inputs, their dynamic axes, and the names of the bundle's contract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from optimum.utils import NormalizedConfigManager
from optimum.utils.normalized_config import NormalizedTextConfigWithGQA
from transformers import PretrainedConfig

from rewardrt.bundle.spec import Spec


@dataclass(frozen=True)
class AttentionShape:
    """Of a decoder: attention layers, key/value heads and the size of one head."""

    layers: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> AttentionShape:
        """Read the shape from a config of any architecture; optimum knows what each calls its fields."""
        try:
            normalized = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
        except KeyError:  # optimum does not list every architecture (gemma2 and gemma3 are not): the usual names
            normalized = NormalizedTextConfigWithGQA(config)
        heads = normalized.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or normalized.hidden_size // heads
        return cls(normalized.num_layers, kv_heads, head_dim)


@dataclass(frozen=True)
class Signature:
    """What a graph is traced with: sample inputs, which of their axes are dynamic, and the names of the contract."""

    inputs: dict[str, Any]
    axes: dict[str, Any]
    input_names: list[str]
    output_names: list[str]


def signature_of(spec: Spec, config: PretrainedConfig, every_token: bool) -> Signature:
    """Make the signature of a spec's graph; to be called where fake tensors are made."""
    batch, tokens, past = (torch.export.Dim(name) for name in ("batch", "tokens", "past"))
    inputs: dict[str, Any] = {"input_ids": torch.zeros(2, 5, dtype=torch.long), "lengths": torch.full((2,), 5)}
    axes: dict[str, Any] = {"input_ids": {0: batch, 1: tokens}, "lengths": {0: batch}}
    names, outputs = ["input_ids", "lengths"], ["rewards", *(["token_rewards"] if every_token else [])]
    if spec.causal:
        shape = AttentionShape.of(config)
        layers = range(shape.layers)
        # A tensor of its own for each: the exporter would wire one that stands for both to one of the two inputs.
        for name in ("past_keys", "past_values"):
            inputs[name] = [torch.zeros(2, shape.kv_heads, 3, shape.head_dim) for _ in layers]
        axes |= {name: [{0: batch, 2: past} for _ in layers] for name in ("past_keys", "past_values")}
        names += [f"past_{part}.{i}" for part in ("key", "value") for i in layers]
        outputs += [f"present_{part}.{i}" for i in layers for part in ("key", "value")]
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
    """Give every input and output the axis names of the bundle's contract."""
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
        axes = names.get(kind) or (past if kind.startswith("past") else total)
        value.shape = ir.Shape([axis or size for axis, size in zip(axes, value.shape, strict=True)])
