"""The graphs of a bundle, written one at a time with their weights, and offered to TensorRT where that is what for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

import rewardrt
from rewardrt.bundle.manifest import Variant
from rewardrt.bundle.precisions import PRECISIONS
from rewardrt.graph.shapes import Profile
from rewardrt.steps import Progress, Step, begin, uncounted
from rewardrt_export.precisions import engine
from rewardrt_export.precisions.calibrate import Calibration
from rewardrt_export.precisions.table import LOWERINGS
from rewardrt_export.tracing.state_layers import oldest_onnxruntime


def write_graphs(
    graph: ir.Model, precisions: Sequence[str], calibration: Calibration | None, folder: Path, progress: Progress
) -> list[Variant]:
    """Write a graph for each precision, those that are made of another one last."""
    written = {}
    for precision in sorted(precisions, key=lambda name: PRECISIONS[name].of is not None):
        written[precision] = _write_graph(graph, precision, calibration, folder, progress)
    return [written[precision] for precision in precisions]


def _write_graph(
    graph: ir.Model, precision: str, calibration: Calibration | None, folder: Path, progress: Progress
) -> Variant:
    """Write the graph in this precision, and its weights, one tensor in memory at a time.

    The weights are aligned to pages, so that onnxruntime can map the file.
    """
    made = PRECISIONS[precision]
    if made.of is not None:
        return _write_sharing(graph, precision, made.of, calibration, folder, progress)
    name = _graph_name(precision)
    variant = Variant(precision, name, (f"{name}.data",), made.needs, made.made_for)
    if calibration is not None and made.calibrated:
        learning = begin(progress, f"calibrating the {precision} graph", "activation")
        written = LOWERINGS[precision](graph.clone(), calibration, learning)
        writing = begin(progress, f"writing the {precision} graph", "weight")
    else:
        writing = begin(progress, f"writing the {precision} graph", "weight")
        written = LOWERINGS[precision](graph.clone(), calibration, uncounted)
    written.producer_name, written.producer_version = "rewardrt", rewardrt.__version__
    ir.save(
        written,
        folder / variant.graph,
        external_data=variant.data[0],
        alignment=4096,
        align_threshold=65_536,
        callback=lambda tensor, info: writing(info.index + 1, info.total),  # before the weight is made and written
    )
    return dataclasses.replace(variant, onnxruntime=oldest_onnxruntime(written.graph))


def _write_sharing(
    graph: ir.Model, precision: str, other: str, calibration: Calibration | None, folder: Path, progress: Progress
) -> Variant:
    """Write a graph that is made of another as it was written, and reads its file of weights."""
    made, base = PRECISIONS[precision], folder / _graph_name(other)
    asked_for = base.exists()
    data = f"{base.name}.data"
    if not asked_for:
        _write_graph(graph, other, calibration, folder, progress)
    progress(Step(f"writing the {precision} graph"))
    ir.save(LOWERINGS[precision](ir.load(base), calibration, uncounted), folder / _graph_name(precision))
    if not asked_for:
        base.unlink()  # its weights stay
    return Variant(precision, _graph_name(precision), (data,), made.needs, made.made_for)


def _graph_name(precision: str) -> str:
    return "model.onnx" if precision == "fp32" else f"model.{precision}.onnx"


def build_engine(variant: Variant, folder: Path, profile: Profile, progress: Progress) -> Variant:
    """Have TensorRT build the engine of a graph for it, where it is installed; raises ExportError where it refuses."""
    if not PRECISIONS[variant.precision].engine:
        return variant
    if (reason := engine.missing()) is not None:
        progress(Step(f"the {variant.precision} graph was not built: {reason}", note=True))
        return variant
    progress(Step(f"building a TensorRT engine of the {variant.precision} graph"))
    built = engine.build(folder / variant.graph, profile).describe(profile)
    progress(Step(built, note=True))
    return dataclasses.replace(variant, built=built)
