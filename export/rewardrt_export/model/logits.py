"""What a language model's class does between hidden state and logits, besides the product with the head's rows.

Some classes scale the state before the head, scale the logits after it, or cap them by a tanh. Config fields with the
same name mean different things in different classes (`logits_scaling` divides in Granite and multiplies in HyperCLOVA
X). So the class itself is tested: its forward pass is run with its backbone and its head replaced by functions with
known results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from rewardrt.errors import CheckpointError
from rewardrt_export.model.length_limits import hold
from rewardrt_export.source.weights import first_line

_PROBES = (-700.0, -31.0, -3.0, -0.25, 1e-3, 0.5, 1.0, 12.0, 90.0, 1e9)


@dataclass(frozen=True)
class LogitRule:
    """logit = cap * tanh(scale * x / cap) with x = row @ (before * state) + bias; softcap 0 means no tanh."""

    before: float
    scale: float
    softcap: float

    @property
    def is_identity(self) -> bool:
        """Whether the logits are not changed."""
        return self == LogitRule(1.0, 1.0, 0.0)


class _Output(BaseModelOutputWithPast):
    """A backbone's output that returns None for every other attribute that a class reads."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def logit_rule(config: PretrainedConfig) -> LogitRule:
    """Return what the language model class of this config does around its head.

    Raises CheckpointError if a LogitRule cannot express it.
    """
    try:
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise CheckpointError(f"model_type {config.model_type!r}: transformers has no language model of it") from None
    width = config.get_text_config().hidden_size
    state = torch.linspace(-2, 2, width)[None, None]  # [1, 1, hidden]
    given = torch.tensor(_PROBES)[None, None]
    seen: list[torch.Tensor] = []

    def head(inputs: torch.Tensor) -> torch.Tensor:
        seen.append(inputs)
        return given

    try:
        with torch.device("meta"):
            model: Any = kind(hold(config))
        model.eval()
        # The class may access its backbone by any of these names.
        for backbone in (model.base_model, model.get_decoder(), getattr(model, "model", None)):
            if backbone is not None and backbone is not model:
                backbone.forward = lambda *args, **fields: _Output(last_hidden_state=state)
        model.get_output_embeddings().forward = head
        with torch.inference_mode():
            logits = model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False).logits.float().flatten()
    except Exception as error:  # whatever the class's code raises
        raise CheckpointError(
            f"{kind.__name__}: cannot tell what it does to its logits ({type(error).__name__}: {first_line(error)})"
        ) from error
    rule = _fit(state, seen[0] if len(seen) == 1 else None, logits)
    if rule is None:
        raise CheckpointError(
            f"{kind.__name__} does more to its logits than scale and cap them; rows of its head are not its logits"
        )
    return rule


def _fit(state: torch.Tensor, head_input: torch.Tensor | None, logits: torch.Tensor) -> LogitRule | None:
    """Return the rule that explains all probes, or None."""
    x = torch.tensor(_PROBES)
    if head_input is None or head_input.shape != state.shape or logits.shape != x.shape:
        return None
    before = float(head_input[0, 0, -1] / state[0, 0, -1])
    if not torch.allclose(head_input, before * state, rtol=1e-6):
        return None
    slope = float(logits[_PROBES.index(1e-3)] / 1e-3)
    capped = bool(logits.abs().max() < 1e6)
    cap = float(logits.abs().max()) if capped else 0.0
    scale = slope if capped else float(logits[_PROBES.index(1.0)])
    expected = cap * torch.tanh(scale * x / cap) if capped else scale * x
    if not torch.allclose(logits, expected, rtol=1e-5, atol=1e-6):
        return None
    return LogitRule(before, scale, cap)
