"""Attention of encoders for tracing: one custom operator per layer, with a mask for padding and window."""

from __future__ import annotations

from typing import Any

import torch
from onnxscript import BOOL, FLOAT, opset23
from torch import nn

from rewardrt.errors import TraceError
from rewardrt_export.tracing.attention_masks import Reach, watched_masks

# Arguments that transformers may pass to an attention function without changing its result.
_HARMLESS = {
    "cache_position", "deterministic", "is_causal", "layer_type", "num_items_in_batch", "output_attentions",
    "output_hidden_states", "past_key_values", "position_embeddings", "position_ids", "return_dict", "use_cache",
}  # fmt: skip


def refuse_unknown(module: nn.Module, mask: torch.Tensor | None, others: dict[str, Any], *, causal: bool) -> None:
    """Raise TraceError if a layer asks for more than a decoder's, or an encoder's, plain attention.

    `mask` is the layer's mask, which exists only in the pass that records masks. `others` are arguments that the hook
    does not name.
    """
    odd = sorted(name for name, value in others.items() if value is not None and name not in _HARMLESS)
    masked = mask is not None and watched_masks() is None
    stated = getattr(module, "is_causal", causal)
    if odd or masked or (stated is not True if causal else stated):
        raise TraceError(
            f"{type(module).__name__} asks for attention that is not plainly {'causal' if causal else 'bidirectional'} "
            f"({', '.join(odd) or 'mask'}); this backbone cannot be exported yet"
        )


@torch.library.custom_op("rewardrt::bidirectional_attention", mutates_args=())
def bidirectional_attention(
    query: torch.Tensor,  # [batch, heads, tokens, head_dim]
    key: torch.Tensor,  # [batch, kv_heads, tokens, head_dim]
    value: torch.Tensor,  # [batch, kv_heads, tokens, value_dim]
    mask: torch.Tensor,  # [batch, 1, tokens, tokens] bool: true where a token may look
    scale: float,
    softcap: float,  # 0: none
) -> torch.Tensor:
    """Attention of each token to those before and after it, within the mask."""
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
    """Translate one `bidirectional_attention` call to ONNX: a single node."""
    op: Any = opset23
    return op.Attention(query, key, value, mask, scale=scale, softcap=softcap)[0]


class PaddingMasks:
    """The masks of an encoder's forward pass, one for each window, and the number of layers that used one."""

    reaches: list[Reach]  # for each layer, found in the pass that records masks

    def begin(self, tokens: int, lengths: torch.Tensor) -> None:
        """Begin a pass over texts [batch, tokens] of these lengths [batch]."""
        place = torch.arange(tokens)
        self._distance = (place.unsqueeze(1) - place.unsqueeze(0)).abs()  # [tokens, tokens]
        self._inside = place.view(1, 1, 1, -1) < lengths.view(-1, 1, 1, 1)
        self._masks: dict[int, torch.Tensor] = {}
        self.layers = 0

    def mask(self) -> torch.Tensor:
        """Return the next layer's mask, [batch, 1, tokens, tokens] bool.

        Padding tokens see themselves too: they may be far from every token of the text, and a softmax needs at least
        one key.
        """
        window = self.reaches[self.layers].window
        self.layers += 1
        if window not in self._masks:
            inside = self._inside & (self._distance < window) if window else self._inside
            self._masks[window] = inside | (self._distance == 0)
        return self._masks[window]


padding_masks = PaddingMasks()


def bidirectional_hook(
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
    """Replace transformers' attention functions in an encoder, as `attention`'s hook does in a decoder."""
    refuse_unknown(module, attention_mask, others, causal=False)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if (watch := watched_masks()) is not None:
        reach = watch.reach(module, attention_mask, int(sliding_window or 0), bidirectional=True)
        if reach.chunk:
            raise TraceError(f"{type(module).__name__} looks at {reach}; this encoder cannot be exported yet")
        padding_masks.reaches.append(reach)
    output = torch.ops.rewardrt.bidirectional_attention(
        query, key, value, padding_masks.mask(), scale, float(softcap or 0.0)
    )
    return output.transpose(1, 2).contiguous(), None
