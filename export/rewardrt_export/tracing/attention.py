"""Attention for tracing: transformers' attention and mask functions are replaced by custom operators.

Two hooks that transformers offers make a backbone traceable. Attention becomes one custom operator per layer, which is
exported as one standard ONNX `Attention` node. The mask function returns nothing, because the hooks handle causality,
window, prefix and padding. Hooks are called from deep inside transformers, so the data of the forward pass that they
need is in globals, `prefix` and `bidirectional.padding_masks`, which are set before the pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from onnxscript import BOOL, FLOAT, opset23
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig

from rewardrt_export.model.backbone import backbone_class
from rewardrt_export.tracing.attention_masks import Reach, mask_hook, watched_masks
from rewardrt_export.tracing.bidirectional import bidirectional_hook, onnx_bidirectional_attention, refuse_unknown

# The names under which the hooks are registered with transformers, for decoders and for encoders.
ATTENTION, BIDIRECTIONAL = "rewardrt", "rewardrt-bidirectional"


@torch.library.custom_op("rewardrt::attention", mutates_args=())
def attention(
    query: torch.Tensor,  # [batch, heads, tokens, head_dim]
    key: torch.Tensor,  # [batch, kv_heads, tokens, head_dim]
    value: torch.Tensor,  # [batch, kv_heads, tokens, value_dim]
    past_key: torch.Tensor,  # [batch, kv_heads, past, head_dim]
    past_value: torch.Tensor,  # [batch, kv_heads, past, value_dim]
    scale: float,
    softcap: float,  # 0: none
    window: int,  # as in `Reach`, like `chunk`
    chunk: int,
    sinks: int,  # number of keys at the beginning that every token looks at
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Causal attention over past and new tokens; return the output, and the keys and values of all tokens."""
    raise NotImplementedError("this operator exists to be traced")


@attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    scale: float,
    softcap: float,
    window: int,
    chunk: int,
    sinks: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, heads, tokens, _ = query.shape
    total = past_key.shape[2] + tokens
    return (
        query.new_empty(batch, heads, tokens, value.shape[3]),
        key.new_empty(batch, key.shape[1], total, key.shape[3]),
        value.new_empty(batch, value.shape[1], total, value.shape[3]),
    )


def onnx_attention(
    query: FLOAT,
    key: FLOAT,
    value: FLOAT,
    past_key: FLOAT,
    past_value: FLOAT,
    scale: float,
    softcap: float,
    window: int,
    chunk: int,
    sinks: int,
) -> tuple[FLOAT, FLOAT, FLOAT]:
    """Translate one `attention` call to ONNX: a single node, with a mask only for a window or chunks."""
    op: Any = opset23
    if window or chunk:
        mask = _mask(query, past_key, window, chunk, sinks)
        return op.Attention(query, key, value, mask, past_key, past_value, scale=scale, softcap=softcap)[:3]
    return op.Attention(query, key, value, None, past_key, past_value, is_causal=1, scale=scale, softcap=softcap)[:3]


def _mask(query: FLOAT, past_key: FLOAT, window: int, chunk: int, sinks: int) -> BOOL:
    """Return the mask [tokens, past + tokens]: true where 0 <= distance < window, within the token's own chunk."""
    op: Any = opset23
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    past = op.Squeeze(op.Shape(past_key, start=2, end=3))
    total = op.Add(past, op.Squeeze(op.Shape(query, start=2, end=3)))
    asking = op.Unsqueeze(op.Range(past, total, one), op.Constant(value_ints=[1]))
    asked = op.Unsqueeze(op.Range(zero, total, one), op.Constant(value_ints=[0]))
    distance = op.Sub(asking, asked)
    sees = op.GreaterOrEqual(distance, zero)
    if window:
        sees = op.And(sees, op.Less(distance, op.Constant(value_int=window)))
    if chunk:
        length, first = op.Constant(value_int=chunk), op.Constant(value_int=sinks)
        own = op.Equal(op.Div(op.Sub(asking, first), length), op.Div(op.Sub(asked, first), length))
        sees = op.And(sees, own)
    return op.Or(sees, op.Less(asked, op.Constant(value_int=sinks))) if sinks else sees


class Prefix:
    """A decoder's past during a forward pass: given to the attention hook layer by layer, with what each layer adds."""

    def __init__(self) -> None:
        self._past: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        self.present: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.reaches: list[Reach] = []  # for each layer, found in the pass that records masks

    def begin(self, past: list[tuple[torch.Tensor, torch.Tensor]] | None) -> None:
        """Begin a pass with these keys and values of each layer; None: an empty past of any shape."""
        self._past, self.present = past, {}

    def past(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the past of the next layer, whose new keys and values are given."""
        return (key[:, :, :0], value[:, :, :0]) if self._past is None else self._past[len(self.present)]

    def add(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Record the next layer's keys and values of all tokens, past and new."""
        self.present[len(self.present)] = (key, value)


prefix = Prefix()


def _attention_hook(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Replace transformers' attention functions; return [batch, tokens, heads, value_dim] as they do."""
    sinks = others.pop("s_aux", None)
    refuse_unknown(module, attention_mask, others, causal=True)
    if (watch := watched_masks()) is not None:
        prefix.reaches.append(watch.reach(module, attention_mask, int(sliding_window or 0), bidirectional=False))
    reach = prefix.reaches[len(prefix.present)]
    past_key, past_value = prefix.past(key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    size = key.shape[3]
    if sinks is not None:
        query, key, past_key, past_value = _with_sink(query, key, past_key, past_value, sinks / scale)
    output, *present = torch.ops.rewardrt.attention(
        query, key, value, past_key, past_value, scale, float(softcap or 0.0), reach.window, reach.chunk,
        int(sinks is not None),
    )  # fmt: skip
    if sinks is not None:
        present = [present[0][:, :, 1:, :size], present[1][:, :, 1:]]
    prefix.add(*present)
    return output.transpose(1, 2).contiguous(), None


def _with_sink(
    query: torch.Tensor, key: torch.Tensor, past_key: torch.Tensor, past_value: torch.Tensor, scores: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add one key to each head's softmax, with the same score for every token and the value 0.

    These are attention sinks, as in GPT-OSS. The added key is (0, ..., 0, 1); all other keys get a 0 in that last
    place, and the queries get the score.
    """
    batch, heads, tokens, _ = query.shape
    column = scores.to(query.dtype).view(1, heads, 1, 1).expand(batch, heads, tokens, 1)
    first = nn.functional.pad(torch.ones_like(key[:, :, :1, :1]), (key.shape[3], 0))
    past = torch.cat([first, nn.functional.pad(past_key, (0, 1))], dim=2)
    values = nn.functional.pad(past_value, (0, 0, 1, 0))
    return torch.cat([query, column], dim=3), nn.functional.pad(key, (0, 1)), past, values


for _name, _hook in ((ATTENTION, _attention_hook), (BIDIRECTIONAL, bidirectional_hook)):
    AttentionInterface.register(_name, _hook)
    AttentionMaskInterface.register(_name, mask_hook)


def attention_name(config: PretrainedConfig, causal: bool) -> str:
    """Return the attention implementation with which to trace a backbone.

    A class that does not use transformers' hook (DeBERTa and BLOOM have their own attention) is traced as it is: it
    computes its own masks, and takes no past.
    """
    if not hasattr(sys.modules[backbone_class(config).__module__], "ALL_ATTENTION_FUNCTIONS"):
        return "eager"
    return ATTENTION if causal else BIDIRECTIONAL


# Translations of the custom operators to ONNX.
TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.rewardrt.attention.default: onnx_attention,
    torch.ops.rewardrt.bidirectional_attention.default: onnx_bidirectional_attention,
}
