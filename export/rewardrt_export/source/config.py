"""config.json, read by transformers' class for its model_type, and how it must agree with the tensors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from rewardrt.errors import CheckpointError
from rewardrt_export.source.layouts import LAYOUTS, Layout
from rewardrt_export.source.weights import StoredTensor, first_line

CONFIG_FILE = "config.json"
# Names of embedding matrices, which have one row for each token of the vocabulary.
VOCABULARY_TENSORS = ("embed_tokens.weight", "embed_in.weight", "wte.weight", "word_embeddings.weight")

MAY_BE_ABSENT = ("quantization_config", "vision_config", "audio_config", "text_config", "auto_map")
# Numbers for which transformers builds lists while it reads config.json, and the largest value accepted for each.
COUNTED = {"num_labels": 1_000_000} | dict.fromkeys(
    ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 100_000
)


def follow_vocabulary(
    config: PretrainedConfig, before: dict[str, StoredTensor], after: dict[str, StoredTensor]
) -> None:
    """Set the config's vocabulary size to the adapter's, which contains the embeddings if tokens were added."""
    for name in before.keys() & after.keys():
        old, new = before[name].shape, after[name].shape
        if old != new and old[0] == config.vocab_size and old[1:] == new[1:]:
            config.vocab_size = new[0]


def fit_vocabulary(config: PretrainedConfig, stored: dict[str, StoredTensor]) -> None:
    """Take the vocabulary size from the tensors: trainers round it up, which the base model's config does not show."""
    sizes = {tensor.shape[0] for name, tensor in stored.items() if name.endswith(VOCABULARY_TENSORS)}
    if len(sizes) == 1:
        config.vocab_size = sizes.pop()


def read_config(folder: Path, raw: dict[str, Any]) -> PretrainedConfig:
    """Return the config of its class for the folder's config.json, whose contents are `raw`. Raises CheckpointError."""
    where, kind = folder / CONFIG_FILE, raw.get("model_type")
    if _is_quantized(raw.get("quantization_config")):
        raise CheckpointError(f"{where}: a quantized checkpoint; export the one it was made from")
    if (layout := layout_of(raw)) is not None:
        return _read_layout(folder, raw, layout)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        remote = " (it comes with code of its own, which is never run)" if "auto_map" in raw else ""
        raise CheckpointError(f"{where}: model_type {kind!r} is not an architecture that transformers knows{remote}")
    for name, most in COUNTED.items():
        if isinstance(count := raw.get(name), int) and count > most:
            raise CheckpointError(
                f"{where}: {name} {count}; no model has so many, and transformers makes a list of them"
            )
    try:
        if repr(mended := _mend(kind, raw)) != repr(raw):  # 0 == 0.0
            config = CONFIG_MAPPING[kind].from_dict(mended)
        else:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises KeyError, ValueError, OSError and its own kinds here
        field = _blamed_field(kind, raw)
        raise CheckpointError(f"{where}: not a config of model_type {kind!r}{field} ({first_line(error)})") from error
    assert isinstance(config, PretrainedConfig)
    return config


def _mend(kind: str, raw: dict[str, Any]) -> dict[str, Any]:
    """Rewrite values about which transformers' classes are too strict, without changing their meaning.

    These are integers where a float is expected (`"initializer_range": 0`), and null where a field may only be absent.
    """
    found = {name: value for name, value in raw.items() if value is not None or name not in MAY_BE_ABSENT}
    types = {field.name: field.type for field in dataclasses.fields(CONFIG_MAPPING[kind])}
    floats = {name for name, kind in types.items() if kind is float or kind in (float | None, "float", "float | None")}
    return found | {name: float(found[name]) for name in floats & found.keys() if type(found[name]) is int}


def _blamed_field(kind: str, raw: dict[str, Any]) -> str:
    """Name the field without which transformers accepts the config, because its own error often does not say."""
    for name in raw:
        try:
            CONFIG_MAPPING[kind].from_dict({key: value for key, value in raw.items() if key != name})
        except Exception:  # this field is not the only cause
            continue
        return f": {name} {str(raw[name])[:80]!r}"
    return ""


def _is_quantized(stated: Any) -> bool:
    """Whether config.json's quantization_config means quantized weights; null, {} and false do not."""
    if not isinstance(stated, dict):
        return bool(stated)
    if stated.get("quant_method") in (None, "none", "bitsandbytes"):  # bitsandbytes has its own switches
        return any(stated.get(name) for name in ("load_in_4bit", "load_in_8bit", "bits"))
    return True


def check_size(config: PretrainedConfig, stored: dict[str, StoredTensor]) -> None:
    """Check before building any layers that the tensors can include all of them; building takes time and memory."""
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > len(stored):
        raise CheckpointError(
            f"config.json: num_hidden_layers {layers}, and the checkpoint has {len(stored)} tensors: not one for each "
            "layer; config.json is of another model"
        )


def layout_of(raw: dict[str, Any]) -> Layout | None:
    """Return the layout of a model that transformers has no class for, or None."""
    return LAYOUTS.get(str(raw.get("model_type")))


def _read_layout(folder: Path, raw: dict[str, Any], layout: Layout) -> PretrainedConfig:
    try:
        return layout.config(raw)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: not a config of model_type {raw['model_type']} ({error})"
        ) from error
