"""A decoder class whose tokens attend in both directions, for rerankers that have no class in transformers.

The class is not changed. Its attention modules are told that they are not causal, and it gets an encoder's mask in
place of the causal one.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask

from rewardrt.errors import CheckpointError
from rewardrt_export.source.directions import is_two_way


def look_both_ways(model: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """Make a backbone's tokens attend in both directions, in place, if its config says so."""
    if not is_two_way(config):
        return model
    home = vars(sys.modules[type(model).__module__])
    if "create_causal_mask" not in home:
        raise CheckpointError(f"{type(model).__name__} makes its masks by itself; it cannot look both ways")
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False  # type: ignore[assignment]
    forward = model.forward

    @functools.wraps(forward)  # keeps the signature, which is inspected later
    def two_way(*args: Any, **fields: Any) -> Any:
        causal = home["create_causal_mask"]
        home["create_causal_mask"] = create_bidirectional_mask
        try:
            return forward(*args, **fields)
        finally:
            home["create_causal_mask"] = causal

    model.forward = two_way
    return model
