"""How long a text may be before a class computes something else: the length up to which one graph is exact.

Some backbones have two ways: rotary frequencies for short texts and others for long ones, or attention that is whole in
short texts and sparse in long ones. A graph has the first, and longer texts are cut as they are at any model's limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig

# Kinds of rotary frequencies that depend on the text's length, for which no prefix could be shared either.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class LengthLimit:
    """Up to how many tokens a backbone computes in one way, and what it does beyond."""

    tokens: int
    beyond: str


def length_limit(config: PretrainedConfig) -> LengthLimit | None:
    """Return the length up to which the backbone computes in one way; None: any."""
    limits = [limit for limit in (_rotary_limit(config), _sparse_limit(config)) if limit is not None]
    return min(limits, key=lambda limit: limit.tokens, default=None)


def hold(config: PretrainedConfig) -> PretrainedConfig:
    """Let a config's backbone compute what it does of short texts, whatever the length; changed in place."""
    if _sparse_limit(config) is not None:
        config.attention_type = "original_full"
    return config


def hold_rotary(model: nn.Module) -> nn.Module:
    """Let the rotary frequencies of a backbone stay those of short texts, which it was built with; in place."""
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
    # Of BigBird: blocks of both ends, of a token's own neighbourhood and the random ones are then all there are.
    tokens = (5 + 2 * int(config.num_random_blocks)) * int(config.block_size)
    return LengthLimit(tokens, "beyond them its attention is over blocks of tokens, some of them chosen at random")
