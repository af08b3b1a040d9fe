"""A LoRA adapter on its base: the tensors of the merged model, each merged only when it is read.

The merge is PEFT's, computed in float32: base + scaling * B @ A, and DoRA's rescaling. An adapter is refused by name if
PEFT cannot merge it exactly, or if its method changes the base before training. Nothing here knows what a tensor is
for.
"""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rewardrt.errors import CheckpointError
from rewardrt_export.source.adapter_config import ADAPTER_CONFIG, Adapter
from rewardrt_export.source.weights import StoredTensor, read_file, shorten

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(\.weight)?"
)
# PEFT's names for a wrapped module.
_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save)\.")


def merge_adapter(adapter: Adapter, base: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the base's tensors with the adapter's changes, and the tensors that the adapter adds, such as a head.

    Raises CheckpointError naming the tensors if one has no place in the base or no counterpart, or if a shape differs.
    """
    lora, whole = _sort(adapter, _read_adapter_tensors(adapter.folder))
    _check_saved(adapter, lora, whole)
    merged = dict(base)
    for plain, tensor in whole.items():
        name = _place(plain, base) or plain
        merged[name] = StoredTensor(name, tensor.shape, tensor.dtype, tensor.read)
    changed = set()
    for module, parts in lora.items():
        target = _place(f"{module}.weight", merged)
        if target is None:
            raise CheckpointError(
                f"{adapter.folder}: the adapter changes {module}, and the base {adapter.base} has no {module}.weight: "
                "it belongs to another base, or that layer's own weight was new and never saved"
            )
        changed.add(target)
        merged |= _merge_module(adapter, module, parts, target, merged)
    _check_layers(adapter, changed, base)
    return merged


def _read_adapter_tensors(folder: Path) -> dict[str, StoredTensor]:
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            return read_file(folder / name)
    raise CheckpointError(
        f"{folder}: {ADAPTER_CONFIG} without {' or '.join(ADAPTER_FILES)}; if the adapter is merged into the weights "
        f"here, remove {ADAPTER_CONFIG}"
    )


def _sort(
    adapter: Adapter, stored: dict[str, StoredTensor]
) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, StoredTensor]]:
    """Separate the adapter's tensors: LoRA's, by module and part, and those that replace tensors of the base."""
    lora: dict[str, dict[str, StoredTensor]] = {}
    whole: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        plain = name.removeprefix("base_model.model.")
        if match := _PART.fullmatch(plain):
            lora.setdefault(match["module"], {})[match["part"]] = tensor
            continue
        plain = _WRAPPERS.sub(".", plain)
        if "lora_" in plain:
            raise CheckpointError(f"{adapter.folder}: {name} is not a tensor of a LoRA adapter as PEFT saves it")
        if plain in whole:
            raise CheckpointError(f"{adapter.folder}: {name} and another tensor are both the model's {plain}")
        whole[plain] = tensor
    return lora, whole


def _check_saved(adapter: Adapter, lora: dict[str, dict[str, StoredTensor]], whole: dict[str, StoredTensor]) -> None:
    """Check that the modules in modules_to_save were saved.

    For a classifier PEFT lists two names, of which one exists.
    """
    listed = adapter.saved_modules
    found = [module for module in listed if any(f".{module}." in f".{name}" for name in whole)]
    if listed and not found:
        raise CheckpointError(
            f"{adapter.folder}: modules_to_save lists {', '.join(listed)}, and the adapter has no tensor of them: the "
            "head was lost in the save"
        )
    if not lora and not whole:
        raise CheckpointError(f"{adapter.folder}: the adapter has no tensors")


def _place(name: str, base: dict[str, StoredTensor]) -> str | None:
    """Return the base's own name for a tensor: the same name, or one with a module more or less at the front.

    A bare backbone is saved without the prefix that it has inside a model with a head, and a wrapper adds a prefix.
    """
    if name in base:
        return name
    shorter = name.partition(".")[2]
    if "." in shorter and shorter in base:
        return shorter
    longer = [other for other in base if other.partition(".")[2] == name]
    return longer[0] if len(longer) == 1 and "." in name else None


def _merge_module(
    adapter: Adapter, module: str, parts: dict[str, StoredTensor], target: str, stored: dict[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """Return the merged tensors of one module: its weight, and its bias if LoRA has one too."""
    config, where = adapter.config, f"{adapter.folder}: the adapter's {module}"
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    expected = {*names}
    if config.get("use_dora"):
        expected.add("lora_magnitude_vector")
    if config.get("lora_bias") and not embedding:
        expected.add("lora_B.bias")
    if parts.keys() != expected or (embedding and config.get("use_dora")):
        raise CheckpointError(f"{where} has {', '.join(sorted(parts))}; expected {', '.join(sorted(expected))}")

    rank, scaling = _rank_and_scaling(adapter, module)
    first, second, base = parts[names[0]], parts[names[1]], stored[target]
    magnitude = parts.get("lora_magnitude_vector")
    if len(first.shape) != 2 or len(second.shape) != 2 or (first.shape[0], second.shape[1]) != (rank, rank):
        raise CheckpointError(
            f"{where} is {list(first.shape)} and {list(second.shape)}; expected [{rank}, in] and [out, {rank}], the "
            "rank in adapter_config.json"
        )
    transposed = embedding or bool(config.get("fan_in_fan_out"))
    shape = (second.shape[0], first.shape[1])
    if base.shape != (shape[::-1] if transposed else shape):
        raise CheckpointError(
            f"{where} changes a weight of {list(shape[::-1] if transposed else shape)}, and {target} in the base "
            f"{adapter.base} is {list(base.shape)}; it belongs to another base"
        )
    if magnitude is not None and magnitude.shape != shape[:1]:
        raise CheckpointError(f"{where} has magnitudes {list(magnitude.shape)}; expected {list(shape[:1])}")

    read = partial(_read_merged, base, first, second, scaling, transposed, magnitude)
    merged = {target: StoredTensor(target, base.shape, torch.float32, read)}
    if "lora_B.bias" in parts:
        name, change = f"{target.removesuffix('weight')}bias", parts["lora_B.bias"]
        if name not in stored or stored[name].shape != change.shape:
            raise CheckpointError(f"{where} has a bias {list(change.shape)}, and the base has no {name} like it")
        read_bias = partial(_read_bias, stored[name], change, scaling)
        merged[name] = StoredTensor(name, change.shape, torch.float32, read_bias)
    return merged


def _read_merged(
    base: StoredTensor,
    first: StoredTensor,  # [rank, in]
    second: StoredTensor,  # [out, rank]
    scaling: float,
    transposed: bool,  # whether the base is [in, out]
    magnitude: StoredTensor | None,  # [out], for DoRA
) -> torch.Tensor:
    change = scaling * (second.read().float() @ first.read().float())
    weight = base.read().float()
    merged = (weight.T if transposed else weight) + change
    if magnitude is not None:
        merged = merged * (magnitude.read().float() / torch.linalg.norm(merged, dim=1)).unsqueeze(1)
    return (merged.T if transposed else merged).contiguous()


def _read_bias(base: StoredTensor, change: StoredTensor, scaling: float) -> torch.Tensor:
    return base.read().float() + scaling * change.read().float()


def _rank_and_scaling(adapter: Adapter, module: str) -> tuple[int, float]:
    config = adapter.config
    rank = _by_pattern(adapter, "rank_pattern", module, config.get("r"))
    alpha = _by_pattern(adapter, "alpha_pattern", module, config.get("lora_alpha"))
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(f"{adapter.folder / ADAPTER_CONFIG}: r {rank!r} and lora_alpha {alpha!r} for {module}")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(adapter: Adapter, field: str, module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of the module's name, as PEFT does."""
    for pattern, value in (adapter.config.get(field) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise CheckpointError(f"{adapter.folder / ADAPTER_CONFIG}: {field} {pattern!r}: {error}") from error
    return default


def _check_layers(adapter: Adapter, changed: set[str], base: dict[str, StoredTensor]) -> None:
    """Check that no layer lost its adapter.

    A module that is changed in one layer must be changed in all, unless the config limits the layers. PEFT only warns
    about a missing one, and such a layer would run without its adapter.
    """
    config = adapter.config
    targets = config.get("target_modules")
    chosen = any(config.get(name) for name in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    if chosen or not isinstance(targets, list) or any(re.search(r"\d", str(target)) for target in targets):
        return
    kinds = {re.sub(r"\d+", "N", name) for name in changed}
    lost = sorted(name for name in base.keys() - changed if re.sub(r"\d+", "N", name) in kinds)
    if lost:
        raise CheckpointError(
            f"{adapter.folder}: the adapter changes {len(changed)} modules, and has nothing for {len(lost)} others of "
            f"the same names in other layers ({shorten(lost, 3)}): a part of it was lost"
        )
