"""Checkpoints that transformers has no class for, read as an architecture that it has: a table by model_type.

An entry only renames and slices: the config becomes that of the other architecture, and every tensor gets its name and
its rows there. Nothing is read from disk before it is needed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import GPTNeoXConfig, LlamaConfig, PretrainedConfig

from rewardrt.errors import CheckpointError
from rewardrt_export.source.directions import set_two_way
from rewardrt_export.source.weights import StoredTensor

Stored = dict[str, StoredTensor]


@dataclass(frozen=True)
class Layout:
    """`config` makes the other architecture's config from config.json; `tensors` renames and slices stored tensors."""

    config: Callable[[dict[str, Any]], PretrainedConfig]
    tensors: Callable[[Stored, dict[str, Any]], Stored]


def _internlm2_config(raw: dict[str, Any]) -> PretrainedConfig:
    """InternLM2 is Llama with one matrix for queries, keys and values; its `bias` only applies to attention."""
    taken = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta",
        "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    fields: dict[str, Any] = {name: raw[name] for name in taken if name in raw}
    fields |= {"attention_bias": bool(raw.get("bias", True)), "rope_scaling": _internlm2_scaling(raw)}
    return LlamaConfig.from_dict({"rms_norm_eps": 1e-6, "max_position_embeddings": 2048} | fields)


def _internlm2_scaling(raw: dict[str, Any]) -> dict[str, Any] | None:
    """Return its RoPE scaling; dynamic scaling counts as none.

    Dynamic scaling only has an effect beyond max_position_embeddings, and texts are cut before that.
    """
    scaling = raw.get("rope_scaling")
    if not scaling or scaling.get("type", scaling.get("rope_type")) == "dynamic":
        return None
    return {"rope_type": scaling.get("type", scaling.get("rope_type")), "factor": float(scaling["factor"])}


_INTERNLM2_NAMES = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_INTERNLM2_LAYER = re.compile(r"(?P<layer>(?:.*\.)?layers\.\d+)\.(?P<part>.+)\.(?P<kind>weight|bias)")


def _internlm2_tensors(stored: Stored, raw: dict[str, Any]) -> Stored:
    """Rename tensors as in `_INTERNLM2_NAMES`, and split `attention.wqkv` into q_proj, k_proj and v_proj."""
    found: Stored = {}
    for name, tensor in stored.items():
        match = _INTERNLM2_LAYER.fullmatch(name)
        if match is None:
            renamed = name.replace("tok_embeddings.", "embed_tokens.")
            found[renamed] = replace(tensor, name=renamed)
        elif match["part"] == "attention.wqkv":
            for part, rows in _internlm2_rows(tensor, raw).items():
                renamed = f"{match['layer']}.self_attn.{part}_proj.{match['kind']}"
                found[renamed] = _take_rows(tensor, renamed, rows)
        else:
            part = _INTERNLM2_NAMES.get(match["part"], match["part"])
            renamed = f"{match['layer']}.{part}.{match['kind']}"
            found[renamed] = replace(tensor, name=renamed)
    return found


def _internlm2_rows(tensor: StoredTensor, raw: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the row indices of the queries, keys and values in wqkv.

    wqkv has one group of rows for each key/value head: the query heads that share it, then its key head, then its value
    head.
    """
    heads = int(raw["num_attention_heads"])
    groups = int(raw.get("num_key_value_heads") or heads)
    head_dim, queries = int(raw["hidden_size"]) // heads, heads // groups
    expected = groups * (queries + 2) * head_dim
    if tensor.shape[0] != expected:
        raise CheckpointError(f"{tensor.name}: expected {expected} rows from config.json's heads, found {tensor.shape}")
    rows = torch.arange(expected).reshape(groups, queries + 2, head_dim)
    return {"q": rows[:, :queries].flatten(), "k": rows[:, -2].flatten(), "v": rows[:, -1].flatten()}


def _take_rows(tensor: StoredTensor, name: str, rows: torch.Tensor) -> StoredTensor:
    return StoredTensor(name, (len(rows), *tensor.shape[1:]), tensor.dtype, lambda: tensor.read()[rows])


def _llama_two_way_config(raw: dict[str, Any]) -> PretrainedConfig:
    """NVIDIA's Llama for rerankers and embeddings: the same tensors, with tokens that attend in both directions."""
    config = LlamaConfig.from_dict({name: value for name, value in raw.items() if name != "model_type"})
    config.use_cache = False
    set_two_way(config)
    return config


LAYOUTS: dict[str, Layout] = {
    "llama_bidirec": Layout(_llama_two_way_config, lambda stored, raw: stored),
    "internlm2": Layout(_internlm2_config, _internlm2_tensors),
    # OpenAssistant's subclass of GPT-NeoX adds `pooling` to the config and nothing to the backbone.
    "gpt_neox_reward_model": Layout(
        lambda raw: GPTNeoXConfig.from_dict({name: value for name, value in raw.items() if name != "model_type"}),
        lambda stored, raw: stored,
    ),
}
