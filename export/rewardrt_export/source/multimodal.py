"""The text part of a checkpoint that also takes images or audio; a reward reads text only, and the rest is left out."""

from __future__ import annotations

import dataclasses

import torch
from transformers import AutoModel, PretrainedConfig

from rewardrt.errors import CheckpointError
from rewardrt_export.source.weights import StoredTensor

# transformers' name for the text backbone inside a multimodal one, also used in the names of its tensors.
TEXT_BACKBONE = "language_model"
# Fields about heads and losses that are set in the whole config, while the text config only has their defaults.
_OF_THE_WHOLE = ("architectures", "id2label", "label2id", "problem_type")


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the config of the text backbone, which for most models is the config itself.

    Raises CheckpointError if the model's text part is not a backbone of its own.
    """
    if config.is_encoder_decoder:
        raise CheckpointError(
            f"{config.model_type}: an encoder-decoder reads a text twice, in its two halves, and a reward model reads "
            "it once; it cannot be exported"
        )
    found = config.get_text_config()
    if found is config:
        if any(getattr(config, f"{part}_config", None) is not None for part in ("vision", "audio")):
            raise CheckpointError(
                f"{config.model_type}: its layers for text are mixed with those for images or sound, and no class of "
                "transformers is the text's alone; it cannot be exported"
            )
        return config
    if not isinstance(found, PretrainedConfig):
        raise CheckpointError(f"config.json: text_config {str(found)[:80]!r}; expected the config of a text model")
    for name in _OF_THE_WHOLE:
        setattr(found, name, getattr(config, name, None))
    if getattr(found, "pad_token_id", None) is None:
        found.pad_token_id = getattr(config, "pad_token_id", None)
    return found


def text_tensors(
    config: PretrainedConfig, stored: dict[str, StoredTensor]
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return the tensors, with those of the text backbone renamed as in a text model, and those that text does not use.

    `config` is the whole model's.
    """
    if config.get_text_config() is config:
        return stored, {}
    with torch.device("meta"):
        parts = {name for name, _ in AutoModel.from_config(config).named_children()} - {TEXT_BACKBONE}
    renamed: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        before, found, after = name.rpartition(f"{TEXT_BACKBONE}.")
        own = after if found and not before.strip(".").replace("model", "") else name
        renamed[own] = dataclasses.replace(tensor, name=own)
    reason = "of images or sound: a reward over text does not go through it"
    return renamed, {name: reason for name in renamed if parts & set(name.split(".")[:2])}
