"""Traced graphs that the exports of a test run share: most tests export the same few shapes, with other weights.

Tracing takes nine tenths of the export of a tiny model. A traced graph has no weights; it follows from the backbone's
class and config, and from what of the spec is in the graph. Tests that change how tracing works are marked `traces`.

The graphs lie in a folder of the run, which its processes share. A graph is never taken from another version of the
code: what it is known by holds this project's sources and the versions of the libraries that trace.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import rewardrt
import rewardrt_export
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
_LIBRARIES = ("torch", "transformers", "onnxscript", "onnx-ir", "onnx", "numpy")
_NO_DATA = "no data"  # the file that a stored graph names for its weights
_trace: Callable[..., Any] = pipeline.trace
_folder: Path | None = None
_writes = True


def share(shared: bool, place: Path, *, writes: bool = True) -> None:
    """Let exports of this process share traced graphs, or not; those of tests that may have changed code are not kept."""
    global _folder, _writes
    pipeline.trace = _shared if shared else _trace
    _folder, _writes = place, writes


def folder() -> Path:
    """Return the folder of the run's traced graphs."""
    assert _folder is not None
    return _folder


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
            _code(),
            type(backbone),
            is_two_way(backbone.config),
            json.dumps(config, sort_keys=True, default=repr),
            graph,
            sizes,
            implementations,
            every_token,
        )
    )
    file = folder() / f"{hashlib.sha256(key.encode()).hexdigest()}.onnx"
    if not file.exists():
        model = _trace(backbone, head, every_token=every_token)
        # A class that a test made may be another one under the same name elsewhere.
        if not _writes or not type(backbone).__module__.startswith("transformers.models."):
            return model
        _save(model, file)
    return _load(file)  # in the process that traced as well, so that no test depends on which did


@cache
def _code() -> str:
    """Return what a traced graph follows from besides the model: the sources of this project, and its libraries."""
    digest = hashlib.sha256(repr([sys.version, *map(importlib.metadata.version, _LIBRARIES)]).encode())
    for package in (rewardrt, rewardrt_export):
        for path in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _save(model: ir.Model, file: Path) -> None:
    """Write a graph whose weights have no data, whole or not at all."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        if isinstance(tensor.raw, FakeTensor):
            value.const_value = ir.ExternalTensor(
                _NO_DATA, 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name, base_dir=file.parent
            )
    file.parent.mkdir(exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_bytes(ir.to_proto(model).SerializeToString())
    part.rename(file)


def _load(file: Path) -> ir.Model:
    model = ir.load(file)
    with FakeTensorMode():
        for name, value in model.graph.initializers.items():
            if isinstance(value.const_value, ir.ExternalTensor):
                shape = tuple(value.const_value.shape.numpy())
                value.const_value = TorchTensor(torch.empty(shape, dtype=torch.float32), name=name)
    return model
