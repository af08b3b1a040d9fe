"""How the float32 graph becomes that of each precision, before it is written. What a precision is, the runtime says."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from rewardrt.bundle.precisions import PRECISIONS, current_name
from rewardrt.errors import ExportError
from rewardrt.steps import Count
from rewardrt_export.precisions.calibrate import Calibration
from rewardrt_export.precisions.half import halve
from rewardrt_export.precisions.quantize import quantize, quantize_weights
from rewardrt_export.precisions.storage import store
from rewardrt_export.precisions.tensorrt import for_tensorrt

# Each turns the float32 graph, whose weights are lazy, into its own; the graph is its own, to be changed.
# What takes long counts its parts.
LOWERINGS: dict[str, Callable[[ir.Model, Calibration | None, Count], ir.Model]] = {
    "fp32": lambda graph, calibration, count: graph,
    "weights-bf16": lambda graph, calibration, count: store(graph, ir.DataType.BFLOAT16),
    "weights-fp16": lambda graph, calibration, count: store(graph, ir.DataType.FLOAT16),
    "half": lambda graph, calibration, count: halve(graph),
    "tensorrt": lambda graph, calibration, count: for_tensorrt(graph),
    "int8": quantize,
    "weights8": lambda graph, calibration, count: quantize_weights(graph, bits=8),
    "weights4": lambda graph, calibration, count: quantize_weights(graph, bits=4),
}


def chosen_precisions(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of today; raises ExportError unless these are names of the table, each once."""
    known = ", ".join(PRECISIONS)
    found = tuple(map(current_name, names))
    for given, name in zip(names, found, strict=True):
        if name not in PRECISIONS:
            raise ExportError(f"precision {given!r}: expected one of {known}")
    if not found or len(set(found)) < len(found):
        raise ExportError(f"precisions {', '.join(names) or 'none'}: expected some of {known}, each once")
    return found
