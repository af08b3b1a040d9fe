"""Traced graphs that exports of one test process share: most tests export the same few shapes, with other weights.

Tracing takes nine tenths of the export of a tiny model. A traced graph has no weights; it follows from the backbone's
class and config, and from what of the spec is in the graph. Tests that change how tracing works are marked `traces`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rewardrt.bundle.spec import Layer
from rewardrt_export import pipeline
from rewardrt_export.source.directions import is_two_way

# Of a config, what no graph depends on.
_IRRELEVANT = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "id2label",
    "label2id",
    "problem_type",
    "tie_word_embeddings",
    "transformers_version",
    "use_cache",
}
_trace: Callable[..., Any] = pipeline.trace
_kept: dict[str, Any] = {}


def share(shared: bool) -> None:
    """Let exports of this process share traced graphs, or not."""
    pipeline.trace = _shared if shared else _trace


def _whether(name: str | None) -> str | None:
    return None if name is None else ""


def _without_names(layer: Layer) -> Layer:
    return replace(
        layer,
        weight="",
        bias=_whether(layer.bias),
        rows=(),
        batch_norm=_whether(layer.batch_norm),
        norm=_whether(layer.norm),
        norm_bias=_whether(layer.norm_bias),
    )


def _shared(backbone: Any, head: Any, *, every_token: bool = False) -> Any:
    spec = head.spec
    # Where a tap is comes as an input, but for means and first tokens; tensors have the names of the head's parameters.
    taps = [(tap.name, tap.rule if tap.rule in ("first", "mean") else "", tap.count) for tap in spec.taps]
    heads = [
        replace(each, layers=tuple(_without_names(layer) for layer in each.layers), minus=each.minus)
        for each in spec.heads
    ]
    combine = replace(
        spec.combine, matrix=_whether(spec.combine.matrix), scale_tensor=_whether(spec.combine.scale_tensor)
    )
    config = {name: value for name, value in backbone.config.to_dict().items() if name not in _IRRELEVANT}
    output = replace(spec.output, labels=("",) if spec.output.labels else ())
    graph = (spec.causal, spec.input, taps, spec.has_positions, heads, combine, output, spec.text.type_ids)
    sizes = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    implementations = (backbone.config._attn_implementation, getattr(backbone.config, "_experts_implementation", None))
    key = repr(
        (
            type(backbone),
            is_two_way(backbone.config),
            json.dumps(config, sort_keys=True, default=repr),
            graph,
            sizes,
            implementations,
            every_token,
        )
    )
    if key not in _kept:
        _kept[key] = _trace(backbone, head, every_token=every_token)
    return _kept[key].clone()
