"""The precisions that a bundle's graphs come in: what each does to the float32 graph before it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from rewardrt.errors import ExportError
from rewardrt.machine.providers import Provider
from rewardrt_export.precisions.calibrate import Calibration
from rewardrt_export.precisions.half import halve
from rewardrt_export.precisions.quantize import quantize, quantize_weights
from rewardrt_export.precisions.storage import store
from rewardrt_export.precisions.tensorrt import for_tensorrt

# onnxruntime's products of unsigned with signed integers overflow on an x86 processor that has neither.
INTEGER_DOT = ("avx512_vnni", "avx_vnni", "dotprod")


@dataclass(frozen=True)
class Precision:
    """`lower` turns the float32 graph, whose weights are lazy, into this one; the graph is its own, to be changed.

    `needs` are instruction sets, one of which a machine must have, as `rewardrt doctor` calls them. `made_for` are the
    providers that it is fast on. `held` are the bytes that a loaded graph holds in a CPU's memory for each parameter,
    about: pages of a mapped file are not counted. `of` is another precision, whose graph this one is made of as it was
    written, and whose file of weights it reads. `engine` says that it is for TensorRT, which can be asked whether it
    takes it.
    """

    description: str
    lower: Callable[[ir.Model, Calibration | None], ir.Model]
    calibrated: bool = False  # by texts that torch scores before, where there are any
    rounds: bool = False  # what float32 is: the certificate then says how near it stays, beside torch's bfloat16
    needs: tuple[str, ...] = ()
    made_for: tuple[Provider, ...] = ()
    held: float = 4.0
    of: str | None = None
    engine: bool = False


PRECISIONS: dict[str, Precision] = {
    "fp32": Precision("float32, as torch computes", lambda graph, calibration: graph),
    "bf16": Precision(
        "weights stored as bfloat16, computed in float32: half the disk, and nothing lost of a bfloat16 checkpoint",
        lambda graph, calibration: store(graph, "bf16"),
        rounds=True,
    ),
    "fp16": Precision(
        "weights stored as float16, computed in float32: half the disk, and nothing lost of a float16 checkpoint",
        lambda graph, calibration: store(graph, "fp16"),
        rounds=True,
    ),
    "half": Precision(
        "products and attention in float16, the rest in float32: fast on a GPU",
        lambda graph, calibration: halve(graph),
        rounds=True,
        made_for=("cuda",),
    ),
    "tensorrt": Precision(
        "half as TensorRT takes it, whole and as one engine; its weights are half's file",
        lambda graph, calibration: for_tensorrt(graph),
        rounds=True,
        made_for=("tensorrt",),
        of="half",
        engine=True,
    ),
    "int8": Precision(
        "integer products, each token by itself: fast on a CPU",
        quantize,
        calibrated=True,
        rounds=True,
        needs=INTEGER_DOT,
        held=1.1,
    ),
    "weights8": Precision(
        "8-bit weights in blocks of 32, float32 products: a third of the memory",
        lambda graph, calibration: quantize_weights(graph, bits=8),
        rounds=True,
        held=1.4,
    ),
    "weights4": Precision(
        "4-bit weights in blocks of 32, float32 products: a sixth of the memory",
        lambda graph, calibration: quantize_weights(graph, bits=4),
        rounds=True,
        held=0.7,
    ),
}


def check_precisions(names: Sequence[str]) -> None:
    """Raise ExportError unless these are names of the table, each once."""
    known = ", ".join(PRECISIONS)
    for name in names:
        if name not in PRECISIONS:
            raise ExportError(f"precision {name!r}: expected one of {known}")
    if not names or len(set(names)) < len(names):
        raise ExportError(f"precisions {', '.join(names) or 'none'}: expected some of {known}, each once")
