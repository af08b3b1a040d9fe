"""Rows of a language model's own head as a reward head: the logits of a few tokens, at the positions of the reward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rewardrt.bundle.spec import Layer
from rewardrt.errors import CheckpointError

if TYPE_CHECKING:
    from rewardrt_export.source.folder import Source

NAME = "lm_head.weight"
TIED_EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight", "wte.weight")
# What some architectures do to the logits after the head; rows alone would not be the model's logits then.
LOGIT_RULES = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def token_rows(source: Source, ids: tuple[int, ...]) -> Layer:
    """Return the rows of the head which give these tokens' logits.

    Raises CheckpointError when there is no head, or when its rows are not the model's logits.
    """
    for name in LOGIT_RULES:
        value = getattr(source.config, name, None)
        if value not in (None, 1, 1.0):
            raise CheckpointError(
                f"config.json: {name} changes the logits: {name} is {value}; a row of this LM head is not its logit"
            )
    return Layer(_head_tensor(source), "lm_head.bias" if "lm_head.bias" in source.stored else None, rows=ids)


def _head_tensor(source: Source) -> str:
    """Return the LM head's tensor; where it is tied to the embeddings, only they are stored."""
    if NAME in source.stored:
        return NAME
    tied = [name for name in source.stored if name.endswith(TIED_EMBEDDINGS)]
    if not source.config.tie_word_embeddings or len(tied) != 1:
        raise CheckpointError(
            f"no LM head: expected {NAME}, or tie_word_embeddings in config.json and one embedding matrix, "
            f"found {', '.join(tied) or 'neither'}"
        )
    return tied[0]
