"""Rows of a language model's own head as a reward head: the logits of a few tokens at the reward's positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rewardrt.bundle.spec import Head, Layer
from rewardrt.errors import CheckpointError
from rewardrt_export.families.encoder import ENCODERS

if TYPE_CHECKING:
    from rewardrt_export.source.folder import Source

NAME = "lm_head.weight"
# Config fields that change logits.
LOGIT_FIELDS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
TIED_EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight", "wte.weight")


def token_head(source: Source, ids: tuple[int, ...], taps: tuple[str, ...] = ("last",)) -> Head:
    """Return a head that gives these tokens' logits, with the scale and softcap of the model's class.

    Raises CheckpointError if there is no such head, or if the class changes its logits in another way.
    """
    from rewardrt_export.model.logits import logit_rule  # brings torch, which the listing does without

    if source.config.model_type in ENCODERS:
        raise CheckpointError(
            f"{source.architecture} is an encoder, and predicts no next token; its logits are no reward"
        )
    tensor = _head_tensor(source)
    rows = source.stored[tensor].shape[0]
    if wrong := [each for each in ids if not 0 <= each < rows]:
        raise CheckpointError(f"token id {wrong[0]}: {tensor} has rows for 0 to {rows - 1}")
    bias = "lm_head.bias" if "lm_head.bias" in source.stored else None
    rule = logit_rule(source.config)
    for name in LOGIT_FIELDS:
        value = getattr(source.config, name, None)
        if value not in (None, 1, 1.0) and rule.is_identity:
            raise CheckpointError(
                f"config.json: {name} is {value}, and transformers' class of model_type {source.config.model_type!r} "
                "does not read it; a row of this LM head may not be what the model was trained with"
            )
    if bias is not None and rule.before != 1.0:
        raise CheckpointError(
            f"{source.architecture} scales the state before a head with a bias; its logits cannot be had of its rows"
        )
    layer = Layer(tensor, bias, rows=ids)
    return Head((layer,), taps, scale=rule.before * rule.scale, softcap=rule.softcap)


def token_id(source: Source, text: str) -> int:
    """Return the id of a text that is exactly one token.

    Raises CheckpointError if the tokenizer makes none or several tokens of it.
    """
    ids = source.tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        pieces = ", ".join(repr(source.tokenizer.decode([each])) for each in ids[:6])
        raise CheckpointError(
            f"the tokenizer makes {len(ids)} tokens of {text!r} ({pieces or 'nothing'}); expected one, whose logit is "
            "the reward"
        )
    return int(ids[0])


def _head_tensor(source: Source) -> str:
    """Return the name of the LM head's tensor; if it is tied to the embeddings, only those are stored."""
    if NAME in source.stored:
        return NAME
    tied = [name for name in source.stored if name.endswith(TIED_EMBEDDINGS)]
    if not source.config.tie_word_embeddings or len(tied) != 1:
        raise CheckpointError(
            f"no LM head: expected {NAME}, or tie_word_embeddings in config.json and one embedding matrix, "
            f"found {', '.join(tied) or 'neither'}"
        )
    return tied[0]
