"""The text length up to which a model's class computes in one way, so that one graph is exact.

Some backbones change with the length: they use other rotary frequencies for long texts, or replace full attention by
sparse attention. A graph contains the short-text version, and longer texts are cut, as at any model's limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig

# Types of rotary frequencies that depend on the length of the whole text, which would also rule out prefix reuse.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class LengthLimit:
    """The number of tokens up to which a backbone computes in one way, and what it does beyond."""

    tokens: int
    beyond: str


def length_limit(config: PretrainedConfig) -> LengthLimit | None:
    """Return the length up to which the backbone computes in one way; None if there is no such limit."""
    limits = [limit for limit in (_rotary_limit(config), _sparse_limit(config)) if limit is not None]
    return min(limits, key=lambda limit: limit.tokens, default=None)


def hold(config: PretrainedConfig) -> PretrainedConfig:
    """Set a config so that its backbone treats every text like a short one. Changes the config in place."""
    if _sparse_limit(config) is not None:
        config.attention_type = "original_full"
    return config


def hold_rotary(model: nn.Module) -> nn.Module:
    """Fix a backbone's rotary frequencies at those for short texts, with which it was built. Changes it in place."""
    for module in model.modules():
        kind: Any = getattr(module, "rope_type", None)
        if isinstance(kind, dict):
            module.rope_type = {  # type: ignore[assignment]
                layer: "default" if each in LENGTH_DEPENDENT_ROPE else each for layer, each in kind.items()
            }
        elif kind in LENGTH_DEPENDENT_ROPE:
            module.rope_type = "default"  # type: ignore[assignment]
    return model


def _rotary_limit(config: PretrainedConfig) -> LengthLimit | None:
    rope = getattr(config, "rope_parameters", None)
    rope = rope if isinstance(rope, dict) else {}
    every = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    limits = [
        LengthLimit(
            int(
                part.get("original_max_position_embeddings")
                or getattr(config, "original_max_position_embeddings", None)
                or config.max_position_embeddings
            ),
            f"beyond them its rotary frequencies depend on the length of each text (rope_type {part['rope_type']!r})",
        )
        for part in every
        if part.get("rope_type") in LENGTH_DEPENDENT_ROPE
    ]
    return min(limits, key=lambda limit: limit.tokens, default=None)


def _sparse_limit(config: PretrainedConfig) -> LengthLimit | None:
    if getattr(config, "attention_type", None) != "block_sparse":
        return None
    # BigBird: up to this length, the end blocks, neighbouring blocks and random blocks cover the whole text.
    tokens = (5 + 2 * int(config.num_random_blocks)) * int(config.block_size)
    return LengthLimit(tokens, "beyond them its attention is over blocks of tokens, some of them chosen at random")
