"""Attention as it is traced: transformers' attention functions and masks are replaced by custom operators of ours.

Two of transformers' registered hooks make a backbone traceable: attention becomes one custom operator a layer (one
standard ONNX `Attention` node), and the mask function returns nothing, because causality, the window, the prefix and
the padding are the hooks' business. Hooks are called from deep inside transformers, so what they need of the forward
pass is here, in `prefix` and `padding_masks`: it is said before the pass begins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import BOOL, FLOAT, opset23
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig

from rewardrt.errors import TraceError
from rewardrt_export.model.backbone import backbone_class
from rewardrt_export.tracing.attention_masks import mask_hook, watched_masks

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
    window: int,  # 0: every earlier token; else the token itself and the `window - 1` before it
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Causal attention over a past and new tokens; gives the output, and the keys and values of all of them."""
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
) -> tuple[FLOAT, FLOAT, FLOAT]:
    """Write one `attention` call as ONNX: a single node, with a mask only where a window needs one."""
    op: Any = opset23
    if window:
        mask = _window_mask(query, past_key, window)
        return op.Attention(query, key, value, mask, past_key, past_value, scale=scale, softcap=softcap)[:3]
    return op.Attention(query, key, value, None, past_key, past_value, is_causal=1, scale=scale, softcap=softcap)[:3]


def _window_mask(query: FLOAT, past_key: FLOAT, window: int) -> BOOL:
    """Make the mask [tokens, past + tokens]: true where a token may look, 0 <= distance < window."""
    op: Any = opset23
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    past = op.Squeeze(op.Shape(past_key, start=2, end=3))
    total = op.Add(past, op.Squeeze(op.Shape(query, start=2, end=3)))
    asking = op.Unsqueeze(op.Range(past, total, one), op.Constant(value_ints=[1]))
    asked = op.Unsqueeze(op.Range(zero, total, one), op.Constant(value_ints=[0]))
    distance = op.Sub(asking, asked)
    return op.And(op.GreaterOrEqual(distance, zero), op.Less(distance, op.Constant(value_int=window)))


@torch.library.custom_op("rewardrt::bidirectional_attention", mutates_args=())
def bidirectional_attention(
    query: torch.Tensor,  # [batch, heads, tokens, head_dim]
    key: torch.Tensor,  # [batch, kv_heads, tokens, head_dim]
    value: torch.Tensor,  # [batch, kv_heads, tokens, value_dim]
    mask: torch.Tensor,  # [batch, 1, tokens, tokens] bool: true where a token may look
    scale: float,
    softcap: float,  # 0: none
) -> torch.Tensor:
    """Attention of each token to those before and after it."""
    raise NotImplementedError("this operator exists to be traced")


@bidirectional_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


def onnx_bidirectional_attention(
    query: FLOAT, key: FLOAT, value: FLOAT, mask: BOOL, scale: float, softcap: float
) -> FLOAT:
    """Write one `bidirectional_attention` call as ONNX: a single node."""
    op: Any = opset23
    return op.Attention(query, key, value, mask, scale=scale, softcap=softcap)[0]


class Prefix:
    """The past of a decoder's forward pass, handed to the attention hook layer by layer, and what comes out of it."""

    def __init__(self) -> None:
        self.past: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.present: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def begin(self, past: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Begin a pass with these keys and values of each layer."""
        self.past, self.present = past, {}


prefix = Prefix()
# What transformers may pass to an attention function without changing its maths.
_HARMLESS = {
    "cache_position", "deterministic", "is_causal", "layer_type", "num_items_in_batch", "output_attentions",
    "output_hidden_states", "past_key_values", "position_embeddings", "position_ids", "return_dict", "use_cache",
}  # fmt: skip


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
    """Stand in for transformers' attention functions; returns [batch, tokens, heads, value_dim] as they do."""
    odd = sorted(name for name, value in others.items() if value is not None and name not in _HARMLESS)
    masked = attention_mask is not None and watched_masks() is None
    if odd or masked or getattr(module, "is_causal", True) is not True:
        raise TraceError(
            f"{type(module).__name__} asks for attention that is not plainly causal ({', '.join(odd) or 'mask'}); "
            "this backbone cannot be exported yet"
        )
    window = int(sliding_window or 0)
    if (watch := watched_masks()) is not None:
        watch.compare(module, attention_mask, window, bidirectional=False)
    layer = len(prefix.present)
    past_key, past_value = prefix.past[layer]
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    output, *present = torch.ops.rewardrt.attention(
        query, key, value, past_key, past_value, scale, float(softcap or 0.0), window
    )
    prefix.present[layer] = (present[0], present[1])
    return output.transpose(1, 2).contiguous(), None


class PaddingMasks:
    """The masks of an encoder's forward pass, one for each window, and how many layers asked for them."""

    def begin(self, tokens: int, lengths: torch.Tensor) -> None:
        """Begin a pass over texts [batch, tokens] of these lengths [batch]."""
        place = torch.arange(tokens)
        self._distance = (place.unsqueeze(1) - place.unsqueeze(0)).abs()  # [tokens, tokens]
        self._inside = place.view(1, 1, 1, -1) < lengths.view(-1, 1, 1, 1)
        self._masks: dict[int, torch.Tensor] = {}
        self.layers = 0

    def mask(self, window: int) -> torch.Tensor:
        """Return [batch, 1, tokens, tokens]; `window` 0: the whole text, else `window - 1` tokens on either side.

        Padding sees itself too: it may be far from every token of the text, and a softmax must not be over nothing.
        """
        self.layers += 1
        if window not in self._masks:
            inside = self._inside & (self._distance < window) if window else self._inside
            self._masks[window] = inside | (self._distance == 0)
        return self._masks[window]


padding_masks = PaddingMasks()


def _bidirectional_hook(
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
    """Stand in for transformers' attention functions in an encoder, as `_attention_hook` does in a decoder."""
    odd = sorted(name for name, value in others.items() if value is not None and name not in _HARMLESS)
    masked = attention_mask is not None and watched_masks() is None
    if odd or masked or getattr(module, "is_causal", False):
        raise TraceError(
            f"{type(module).__name__} asks for attention that is not plainly bidirectional "
            f"({', '.join(odd) or 'mask'}); this backbone cannot be exported yet"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    window = int(sliding_window or 0)
    if (watch := watched_masks()) is not None:
        watch.compare(module, attention_mask, window, bidirectional=True)
    mask = padding_masks.mask(window)
    output = torch.ops.rewardrt.bidirectional_attention(query, key, value, mask, scale, float(softcap or 0.0))
    return output.transpose(1, 2).contiguous(), None


for _name, _hook in ((ATTENTION, _attention_hook), (BIDIRECTIONAL, _bidirectional_hook)):
    AttentionInterface.register(_name, _hook)
    AttentionMaskInterface.register(_name, mask_hook)


def attention_name(config: PretrainedConfig, causal: bool) -> str:
    """Return the attention implementation to trace a backbone with.

    An encoder that does not go through transformers' hook (DeBERTa's attention is its own) is traced as it is: it masks
    the padding by itself.
    """
    if causal:
        return ATTENTION
    return BIDIRECTIONAL if backbone_class(config)._supports_attention_backend else "eager"


# How the exporter writes the custom operators.
TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.rewardrt.attention.default: onnx_attention,
    torch.ops.rewardrt.bidirectional_attention.default: onnx_bidirectional_attention,
}
