"""The precisions that a bundle's graphs come in: what each does to the float32 graph before it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from rewardrt.errors import ExportError
from rewardrt_export.checkpoint import Checkpoint


@dataclass(frozen=True)
class Precision:
    """`lower` turns the float32 graph, whose weights are lazy, into this one; the graph is its own, to be changed.

    `needs` are the CPU features without which it is not worth running, as `rewardrt doctor` calls them.
    """

    lower: Callable[[ir.Model, Checkpoint], ir.Model]
    needs: tuple[str, ...] = ()


def _leave(model: ir.Model, checkpoint: Checkpoint) -> ir.Model:
    return model


PRECISIONS: dict[str, Precision] = {"fp32": Precision(_leave)}


def check_precisions(names: Sequence[str]) -> None:
    """Raise ExportError unless these are names of the table, each once."""
    known = ", ".join(PRECISIONS)
    for name in names:
        if name not in PRECISIONS:
            raise ExportError(f"precision {name!r}: expected one of {known}")
    if not names or len(set(names)) < len(names):
        raise ExportError(f"precisions {', '.join(names) or 'none'}: expected some of {known}, each once")
