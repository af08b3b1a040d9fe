"""Rewards by transformers' own class for the checkpoint, including its head and pooling, as its users get them.

The torch reference of a certificate is transformers' backbone with this project's heads and taps. If transformers has
the whole class, and the checkpoint fills all of it, a few texts are also scored by that class. This reveals errors in a
family's description or in the pad id, because nothing of this project takes part.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from rewardrt.bundle.spec import Spec
from rewardrt.text.tokens import EncodedText
from rewardrt_export.checkpoint import Checkpoint

MOST_TEXTS, LONGEST_TEXT = 12, 512  # about this many texts, of at most this many tokens each


def rewards_of_class(checkpoint: Checkpoint, texts: Sequence[EncodedText], free: int | None) -> dict[int, float]:
    """Return the rewards of some of the texts by their index; {} if transformers has no such class.

    `free` is the free memory in bytes; a model that would not fit a second time is not loaded.
    """
    source, spec = checkpoint.source, checkpoint.spec
    found = getattr(transformers, source.architecture, None)
    if (
        not source.architecture.endswith("ForSequenceClassification")
        or not (isinstance(found, type) and issubclass(found, PreTrainedModel))
        or source.adapter is not None
        or "family" in source.choices
        or source.padding.given is not None
        or not _reads_as_the_class(spec)
        or (free is not None and 5 * source.parameters > free)
    ):
        return {}
    model = _load(found, checkpoint)
    if model is None:
        return {}
    short = [index for index, text in enumerate(texts) if len(text.ids) <= LONGEST_TEXT]
    chosen = short[:: max(1, len(short) // MOST_TEXTS)]
    rewards = {}
    for index in chosen:
        inputs = {"input_ids": torch.from_numpy(texts[index].ids).unsqueeze(0)}
        type_ids = texts[index].type_ids
        if type_ids is not None:
            inputs["token_type_ids"] = torch.from_numpy(type_ids).unsqueeze(0)
        if not spec.causal:  # tokenizers and the reference give one too
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.inference_mode():
            logits = model(**inputs).logits
        if logits.shape[-1] != 1:
            return {}
        rewards[index] = float(logits[0, 0])
    return rewards


def _reads_as_the_class(spec: Spec) -> bool:
    """Whether the spec describes what such a class computes: one logit, read where current transformers reads it."""
    rule = spec.taps[0].rule
    return (
        spec.input == "single"
        and len(spec.taps) == 1
        and spec.combine.rule == "none"
        and spec.output.function == "identity"
        and (rule in ("last_mask", "last_not_id") if spec.causal else rule in ("first", "mean"))
    )


def _load(found: Any, checkpoint: Checkpoint) -> PreTrainedModel | None:
    """Load the class from the checkpoint's folder; return None if the checkpoint does not fill it."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # hides the progress bar
            model, report = found.from_pretrained(
                checkpoint.source.folder,
                local_files_only=True,
                dtype=torch.float32,
                attn_implementation="eager",
                output_loading_info=True,
            )
    except Exception:  # a layout that transformers cannot load: there is nothing to compare with
        return None
    finally:
        logger.setLevel(level)
    if (
        report["missing_keys"]
        or report["mismatched_keys"]
        or type(model.config.get_text_config()) is not type(checkpoint.source.config)
    ):
        return None
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    if checkpoint.spec.causal and (pad is None) != (checkpoint.spec.taps[0].rule == "last_mask"):
        return None  # --pooling selected another position
    evaluated: PreTrainedModel = model.eval()
    return evaluated
