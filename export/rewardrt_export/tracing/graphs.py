"""The modules that are traced: backbone, states at the taps and heads. A decoder's also take and return a prefix."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from rewardrt.bundle.spec import Spec
from rewardrt.errors import TraceError
from rewardrt_export.model.backbone import first_position
from rewardrt_export.model.heads import RewardHead
from rewardrt_export.tracing.attention import BIDIRECTIONAL, prefix
from rewardrt_export.tracing.bidirectional import padding_masks
from rewardrt_export.tracing.state_layers import layer_states


class CausalGraph(nn.Module):
    """The traced module of a decoder: backbone over past and new tokens, states at the taps, heads.

    With `every_token`, the heads are also applied to the state of every token.
    """

    def __init__(self, backbone: PreTrainedModel, head: RewardHead, every_token: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.every_token = every_token

    def forward(
        self,
        input_ids: torch.Tensor,  # [batch, tokens] int64, right-padded
        lengths: torch.Tensor,  # [batch] int64
        past_keys: Sequence[torch.Tensor] = (),  # one for each layer with attention
        past_values: Sequence[torch.Tensor] = (),
        past_states: Sequence[torch.Tensor] = (),  # one for each function with a state
        positions: torch.Tensor | None = None,  # [batch, taps] int64
    ) -> tuple[torch.Tensor, ...]:
        prefix.begin(list(zip(past_keys, past_values, strict=True)))
        layer_states.begin(list(past_states))
        batch, tokens = input_ids.shape
        past = past_keys[0].shape[2] if past_keys else 0  # without attention, positions are not used
        place = (torch.arange(tokens) + past).unsqueeze(0).expand(batch, tokens)
        hidden = self.backbone(input_ids=input_ids, position_ids=place, use_cache=False).last_hidden_state
        rewards = rewards_of(self.head, hidden, lengths, positions, self.every_token)
        kept = [tensor for layer in range(len(past_keys)) for tensor in prefix.present[layer]]
        return (*rewards, *kept, *layer_states.present)


class WholeTextGraph(nn.Module):
    """The traced module of an encoder, or of a decoder without a past: backbone over whole texts, states, heads.

    Padding is determined by `lengths` alone, never by an id. So are positions, unless the class counts them by the ids.
    """

    def __init__(self, backbone: PreTrainedModel, head: RewardHead, every_token: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.every_token = every_token
        takes = inspect.signature(backbone.forward).parameters
        # RoBERTa and similar models count positions over ids other than the padding id, which may occur in a text.
        self.takes_positions = "position_ids" in takes and not first_position(backbone)
        kinds: int | None = getattr(backbone.config, "type_vocab_size", None)
        self.takes_type_ids = "token_type_ids" in takes and bool(kinds) and not head.spec.causal
        self.fixed = {"use_cache": False} if "use_cache" in takes and head.spec.causal else {}

    def forward(
        self,
        input_ids: torch.Tensor,  # [batch, tokens] int64, right-padded
        lengths: torch.Tensor,  # [batch] int64
        token_type_ids: torch.Tensor | None = None,  # [batch, tokens] int64
        positions: torch.Tensor | None = None,  # [batch, taps] int64
    ) -> tuple[torch.Tensor, ...]:
        batch, tokens = input_ids.shape
        padding_masks.begin(tokens, lengths)
        prefix.begin(None)
        layer_states.begin(None)
        place = torch.arange(tokens).unsqueeze(0)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": (place < lengths.unsqueeze(1)).long(),
        }
        if self.takes_positions:
            inputs["position_ids"] = place.expand(batch, tokens)
        if self.takes_type_ids:
            inputs["token_type_ids"] = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        hidden = self.backbone(**inputs, **self.fixed).last_hidden_state
        config = self.backbone.config
        if config._attn_implementation == BIDIRECTIONAL and padding_masks.layers != config.num_hidden_layers:
            raise TraceError(
                f"{type(self.backbone).__name__} ran {padding_masks.layers} attention layers where its config says "
                f"{config.num_hidden_layers}; this backbone cannot be exported yet"
            )
        return rewards_of(self.head, hidden, lengths, positions, self.every_token)


def rewards_of(
    head: RewardHead, hidden: torch.Tensor, lengths: torch.Tensor, positions: torch.Tensor | None, every_token: bool
) -> tuple[torch.Tensor, ...]:
    """Return the rewards for hidden states [batch, tokens, hidden] and, with `every_token`, those of every token."""
    spec = head.spec
    # [batch, tokens, outputs]
    every: tuple[torch.Tensor, ...] = (head({spec.taps[0].name: hidden}),) if every_token else ()
    if spec.input == "steps":
        return (every[0][torch.arange(hidden.shape[0]), lengths - 1], *every)
    # Not taken from `every`, so that a reward has the same bits in a graph without token rewards.
    return (head(tap_states(spec, hidden, lengths, positions)), *every)


def tap_states(
    spec: Spec, hidden: torch.Tensor, lengths: torch.Tensor, positions: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Return the state [batch, hidden] of every tap, from hidden states [batch, tokens, hidden].

    The single tap of a causal model is the text's last token, because the runtime cuts the text there.
    """
    rows = torch.arange(hidden.shape[0])
    states = {}
    for index, tap in enumerate(spec.taps):
        if tap.rule == "mean":
            place = torch.arange(hidden.shape[1]).unsqueeze(0)
            inside = place < lengths.unsqueeze(1)
            if tap.count:
                inside = inside & (place >= lengths.unsqueeze(1) - tap.count)
            weights = inside.to(hidden.dtype)
            # A product, not a sum over tokens, which onnxruntime would add in an order that depends on the batch.
            total = torch.bmm(weights.unsqueeze(1), hidden).squeeze(1)
            states[tap.name] = total / weights.sum(1, keepdim=True)
        elif tap.rule == "first":
            states[tap.name] = hidden[:, 0]
        else:
            states[tap.name] = hidden[rows, lengths - 1 if positions is None else positions[:, index]]
    return states
