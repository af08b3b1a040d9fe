"""An adapter folder: adapter_config.json, checked for what can be merged exactly, and the adapter's base model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewardrt.bundle import hub
from rewardrt.errors import CheckpointError
from rewardrt_export.source.text_files import read_json

ADAPTER_CONFIG = "adapter_config.json"

# Fields of adapter_config.json that the merge follows, or that have no effect after training. Any other field that is
# set means an unknown variant, and stops the export.
KNOWN_FIELDS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "task_type", "use_dora", "use_rslora",
}  # fmt: skip
# Initialisations that leave the base weights unchanged. The others (pissa, olora, loftq, ...) train against a changed
# base; PEFT can convert such an adapter to a plain one, which has `true` here.
KNOWN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")

# The types that these fields must have if they are set.
FIELD_TYPES: tuple[tuple[tuple[str, ...], type, str], ...] = (
    (("rank_pattern", "alpha_pattern"), dict, "an object by module"),
    (("modules_to_save",), list, "a list of modules"),
)


@dataclass(frozen=True)
class Adapter:
    """An adapter folder, and its base model's folder."""

    folder: Path
    base: Path
    config: dict[str, Any]

    @property
    def task(self) -> str | None:
        """PEFT's task type of the trained class (SEQ_CLS, CAUSAL_LM, ...), if the adapter states it."""
        found = self.config.get("task_type")
        return found if isinstance(found, str) else None

    @property
    def saved_modules(self) -> list[str]:
        """Modules that were trained as a whole, and saved with the adapter."""
        return [str(name) for name in self.config.get("modules_to_save") or []]


def find_adapter(folder: Path, base: Path | None = None) -> Adapter | None:
    """Return the adapter in a checkpoint folder, or None if it is a whole model; `base` is the base model's folder.

    Raises CheckpointError if the base is not on this machine (it is only downloaded if it is named), or if the kind of
    adapter is unknown.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    config = read_json(folder / ADAPTER_CONFIG)
    _check_config(folder, config)
    named = config.get("base_model_name_or_path")
    if base is None:
        base = Path(named) if isinstance(named, str) and named else None
        if base is None or not _is_folder(base):
            raise CheckpointError(
                f"{folder}: an adapter of {named!r}, which is not a folder here; give its base with --base FOLDER"
                f"{_on_the_hub(named, config.get('revision'))}"
            )
    if (base / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{base}: the base is an adapter itself; merge it into its own base first")
    return Adapter(folder, base, config)


def _on_the_hub(named: Any, revision: Any) -> str:
    """Say how to download the base, if its name may be a repository on the Hub."""
    repository = hub.named(f"{named}@{revision}" if revision else str(named))
    return "" if repository is None else f", or have it downloaded: --base {repository}"


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that the file system does not allow
        return False


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    where = folder / ADAPTER_CONFIG
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: a {config.get('peft_type')} adapter; only LORA can be merged exactly")
    odd = sorted(name for name, value in config.items() if name not in KNOWN_FIELDS and value)
    if odd:
        raise CheckpointError(f"{where}: {', '.join(odd)} is set, which cannot be merged exactly; merge it with PEFT")
    for names, kind, said in FIELD_TYPES:
        for name in names:
            if config.get(name) and not isinstance(config[name], kind):
                raise CheckpointError(f"{where}: {name} {str(config[name])[:80]!r}; expected {said}")
    start = config.get("init_lora_weights")
    if not any(start is known or start == known for known in KNOWN_STARTS):
        raise CheckpointError(
            f"{where}: init_lora_weights {start!r} trains against a changed base; save the adapter anew with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    if config.get("use_dora") and config.get("lora_bias"):
        raise CheckpointError(f"{where}: use_dora with lora_bias cannot be merged exactly")
