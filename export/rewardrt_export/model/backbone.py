"""The language model under the head: its class, its fake copy for tracing, and the stored tensors that fill it.

transformers decides here: its classes define the parameters' names, and its conversion mapping defines how a
checkpoint's tensors become them. For example, experts may be separate tensors on disk and one parameter in memory.
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from rewardrt.errors import CheckpointError
from rewardrt_export.model.layer_by_layer import hold_only_while_it_runs
from rewardrt_export.model.length_limits import hold, hold_rotary
from rewardrt_export.model.two_way import look_both_ways
from rewardrt_export.source.weights import StoredTensor, first_line, shorten

# Buffers that old transformers versions saved, and that every version computes itself.
RECOMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attention|attn)\.(bias|masked_bias)|position_ids)$")


LARGEST_BUFFER = 2**28  # elements; 1 GiB in float32, far more than the masks and frequencies of any known model
# Types of quantized weights, which only have a meaning together with scales.
PACKED = (torch.uint8, torch.int8, torch.int16, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class ParameterSource:
    """The source of one parameter: stored tensors, and a function that makes the parameter from them."""

    stored: tuple[StoredTensor, ...]
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Binding:
    """`sources` by parameter name; `unused` are the stored tensors that the backbone has no place for."""

    sources: dict[str, ParameterSource]
    unused: dict[str, StoredTensor]


def backbone_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return transformers' bare model class (without a head) for this config."""
    try:
        found = AutoModel._model_mapping[type(config)]
    except KeyError:
        raise CheckpointError(f"model_type {config.model_type!r}: transformers has no backbone class for it") from None
    model_class: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found  # type: ignore[assignment]
    return model_class


def meta_backbone(config: PretrainedConfig, attention: str, experts: str = "eager") -> PreTrainedModel:
    """Build the backbone without memory for its weights; buffers computed from the config are real.

    `attention` and `experts` name registered implementations of attention and mixtures of experts. Raises
    CheckpointError if the class cannot be built from the config.
    """
    pad, vocabulary = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    if isinstance(pad, int) and isinstance(vocabulary, int) and pad >= vocabulary:
        raise CheckpointError(
            f"config.json: pad_token_id {pad}, and vocab_size is {vocabulary}: no token of the model has this id; "
            "correct it to the id that training padded with, or to null"
        )
    config = hold(copy.deepcopy(config))
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = experts
    found = backbone_class(config)
    # A pooler after an encoder's last layer counts as part of the head; not every checkpoint has it.
    pooler = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(found).parameters else {}
    try:
        with torch.device("meta"):
            model: PreTrainedModel = found._from_config(
                config, attn_implementation=attention, dtype=torch.float32, **pooler
            )
        _compute_buffers(model)
    except CheckpointError:
        raise
    except Exception as error:  # the class does not check config.json's fields, and its code may raise anything
        raise CheckpointError(f"{found.__name__} cannot be built of config.json: {_blame(config, error)}") from error
    return look_both_ways(hold_rotary(model).eval(), config)  # type: ignore[arg-type]


def _blame(config: PretrainedConfig, error: Exception) -> str:
    """Say what was wrong with a config; if a name in it is unknown to the class, name the field."""
    if isinstance(error, KeyError) and str(error.args[:1]).startswith("('rewardrt"):
        return "it has attention of its own, and does not take another by name; this backbone cannot be exported yet"
    if isinstance(error, KeyError) and error.args:
        fields = [name for name, value in config.to_dict().items() if value == error.args[0]]
        if fields:
            return f"{' and '.join(fields)} {error.args[0]!r} is not known there"
    return f"{type(error).__name__}, {first_line(error)}"


def _compute_buffers(model: PreTrainedModel) -> None:
    """Compute the non-persistent buffers (rotary frequencies, scales) by the class's own initialisation."""
    for module in model.modules():
        names = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        for name in names:
            buffer = module._buffers[name]
            assert buffer is not None
            if buffer.numel() > LARGEST_BUFFER:
                raise CheckpointError(
                    f"{type(module).__name__}.{name}: {buffer.numel():,} numbers computed from config.json; "
                    "a length or size in it is out of proportion"
                )
            fill = float("nan") if buffer.is_floating_point() else 0
            module._buffers[name] = torch.full_like(buffer, fill, device="cpu")
        if names:
            with torch.no_grad():
                model._init_weights(module)
        for name in names:
            if torch.isnan(module._buffers[name].float()).any():  # type: ignore[union-attr]
                raise CheckpointError(
                    f"{type(module).__name__}.{name}: transformers does not say how to compute this buffer; "
                    "this backbone cannot be exported"
                )


def first_position(model: PreTrainedModel) -> int:
    """Return the position id of a text's first token: 0, or the padding id plus 1 in RoBERTa and similar models."""
    counted = "create_position_ids_from_input_ids"  # defined in the class of the embeddings, or in its module
    for module in model.modules():
        if hasattr(module, "padding_idx") and (
            hasattr(module, counted) or (hasattr(module, "position_embeddings") and hasattr(_home(module), counted))
        ):
            if not isinstance(module.padding_idx, int):
                raise CheckpointError(
                    f"config.json: pad_token_id {module.padding_idx!r}, and {type(model).__name__} counts positions "
                    "from it; set the id that the model was made with"
                )
            return module.padding_idx + 1
    return 0


def _home(module: nn.Module) -> ModuleType:
    return sys.modules[type(module).__module__]


def fill_with_fakes(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replace every meta parameter and buffer by a fake CPU tensor, so that tracing sees ordinary devices.

    A parameter shared by several layers stays shared, and is stored once.
    """
    fakes: dict[int, nn.Parameter] = {}
    kept: list[nn.Parameter] = []
    with mode:
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    if id(parameter) not in fakes:
                        fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                        fakes[id(parameter)] = nn.Parameter(fake, requires_grad=False)
                        kept.append(parameter)  # keep it alive, so that its id() is not reused
                    part._parameters[name] = fakes[id(parameter)]
            for name, buffer in part._buffers.items():
                if buffer is not None and buffer.is_meta:
                    part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def load(
    model: PreTrainedModel, sources: dict[str, ParameterSource], dtype: torch.dtype, *, by_layer: bool = False
) -> None:
    """Give a meta backbone its weights in `dtype`; with `by_layer`, load each layer's weights only while it runs.

    They are then read each time. The layers are the model's largest list of modules. See `layer_by_layer`.
    """
    held = dict(sources)
    for prefix, layer in _layers(model) if by_layer else []:
        layer.requires_grad_(False)
        own = {name: held.pop(f"{prefix}.{name}") for name in layer.state_dict()}
        hold_only_while_it_runs(layer, partial(_read, own, dtype))
    model.load_state_dict(_read(held, dtype), strict=len(held) == len(sources), assign=True)


def _read(sources: Mapping[str, ParameterSource], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: source.read().to(dtype) for name, source in sources.items()}


def _layers(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for _, module in lists]
    if not lists:
        return []
    name, layers = lists[sizes.index(max(sizes))]
    return [(f"{name}.{index}", layer) for index, layer in enumerate(layers)]


def bind(model: PreTrainedModel, stored: dict[str, StoredTensor]) -> Binding:
    """Return for every parameter and persistent buffer of the backbone the stored tensors that make it.

    Nothing is read. Raises CheckpointError naming the tensors if a parameter has none, or if a shape differs.
    """
    packed = sorted(
        f"{name} ({str(tensor.dtype).removeprefix('torch.')})"
        for name, tensor in stored.items()
        if tensor.dtype in PACKED and not RECOMPUTED.search(name)
    )
    if packed:
        raise CheckpointError(
            f"{len(packed)} tensors hold quantized weights ({shorten(packed, 3)}); export the checkpoint that they "
            "were made from"
        )
    wanted = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}

    direct: dict[str, StoredTensor] = {}
    collected: dict[str, list[tuple[str, StoredTensor]]] = {}
    unused: dict[str, StoredTensor] = {}
    ignored = model._keys_to_ignore_on_load_unexpected or []  # saved by older versions of the class, never used
    for name in sorted(stored, key=_natural):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if target not in wanted:
            if not RECOMPUTED.search(name) and not any(re.search(pattern, name) for pattern in ignored):
                unused[name] = stored[name]
        elif pattern is not None:
            collected.setdefault(target, []).append((pattern, stored[name]))
        elif target in direct:
            raise CheckpointError(f"tensors {direct[target].name} and {name} are both the backbone's {target}")
        else:
            direct[target] = stored[name]

    sources = {target: ParameterSource((tensor,), tensor.read) for target, tensor in direct.items()}
    for target, parts in collected.items():
        converter = by_pattern[parts[0][0]]
        for name, read in _converted(model, converter, target, parts).items():
            sources[name] = ParameterSource(tuple(tensor for _, tensor in parts), read)

    # Layers that share weights are saved once.
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    sources |= {name: sources[tied[name]] for name in set(wanted) - set(sources) if tied.get(name) in sources}
    missing = sorted(set(wanted) - set(sources))
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(wanted)} {type(model).__name__} tensors are not in the checkpoint: "
            f"{shorten(missing)}"
        )
    wrong = [
        f"{target} is {list(source.stored[0].shape)}, config.json says {list(wanted[target].shape)}"
        for target, source in sources.items()
        if target in direct and source.stored[0].shape != tuple(wanted[target].shape)
    ]
    if wrong:
        raise CheckpointError(f"{len(wrong)} tensors have another shape than the config says: {shorten(wrong, 3)}")
    return Binding(sources, unused)


def _converted(
    model: PreTrainedModel, converter: WeightConverter, target: str, parts: list[tuple[str, StoredTensor]]
) -> dict[str, Callable[[], torch.Tensor]]:
    """Return a reader for each parameter that transformers' converter makes from these stored tensors."""

    def convert() -> dict[str, torch.Tensor]:
        fresh = copy.deepcopy(converter)
        for pattern, tensor in parts:
            fresh.add_tensor(target, tensor.name, pattern, tensor.read)  # type: ignore[arg-type]
        made = fresh.convert(target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    if len(converter.target_patterns) == 1:
        return {target: lambda: convert()[target]}
    first = converter.target_patterns[0]
    names = [target.replace(first, pattern) for pattern in converter.target_patterns]
    return {name: lambda name=name: convert()[name] for name in names}  # type: ignore[misc]


def _natural(name: str) -> list[Any]:
    """Sort key by which `experts.10` comes after `experts.9`: converters stack tensors in the given order."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
