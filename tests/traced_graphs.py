"""Traced graphs that exports of one test process share: most tests export the same few shapes, with other weights.

Tracing takes nine tenths of the export of a tiny model. A traced graph has no weights; it follows from the backbone's
class and config, and from what of the spec is in the graph. Tests that change how tracing works are marked `traces`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from rewardrt_export import pipeline

# Of a config, what no graph depends on.
_IRRELEVANT = {
    "_name_or_path",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "problem_type",
    "transformers_version",
}
_trace: Callable[..., Any] = pipeline.trace
_kept: dict[str, Any] = {}


def share(shared: bool) -> None:
    """Let exports of this process share traced graphs, or not."""
    pipeline.trace = _shared if shared else _trace


def _shared(backbone: Any, head: Any, *, every_token: bool = False) -> Any:
    spec = head.spec
    config = {name: value for name, value in backbone.config.to_dict().items() if name not in _IRRELEVANT}
    graph = (spec.causal, spec.input, spec.taps, spec.heads, spec.combine, spec.output, spec.text.type_ids)
    sizes = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    implementations = (backbone.config._attn_implementation, getattr(backbone.config, "_experts_implementation", None))
    key = repr(
        (type(backbone), json.dumps(config, sort_keys=True, default=repr), graph, sizes, implementations, every_token)
    )
    if key not in _kept:
        _kept[key] = _trace(backbone, head, every_token=every_token)
    return _kept[key].clone()
