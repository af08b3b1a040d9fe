"""What a backbone's weights are multiplied with: seen while torch scores the calibration texts, layer by layer.

A few channels of an activation carry values many times larger than the rest, in every text and at the same places:
those are the ones that `quantize` keeps exact.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from rewardrt.errors import ExportError
from rewardrt_export.quantize import Site, weight_name

# Channels kept in float32. On held-out pairs of the 135M reference model, 16 gave rms 0.035 std and 32 gave 0.028.
EXACT = 32
# The product of a gate and what it lets through has the widest range of all: 8 bits are not enough for it.
TWO_PLANES = re.compile(r"\.(down_proj|w2|dense_4h_to_h|fc2|c_proj|fc_out|output\.dense)\.weight$")


@dataclass
class Calibration:
    """The largest absolute value of each channel, float32 [K], of what each weight is multiplied with."""

    largest: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)

    def observe(self, name: str, activation: torch.Tensor) -> None:
        """Take in one activation [..., K] of the layer whose weight is `name`.weight."""
        found = activation.detach().abs().reshape(-1, activation.shape[-1]).amax(0).float().numpy()
        known = self.largest.get(f"backbone.{name}.weight")
        self.largest[f"backbone.{name}.weight"] = found if known is None else np.maximum(known, found)

    def sites(self) -> dict[str, Site]:
        """Return how to quantize the products with each weight. Raises ExportError where no text was seen."""
        if not self.largest:
            raise ExportError("int8: the backbone has no linear layers that calibration texts went through")
        return {name: _site(name, largest) for name, largest in self.largest.items()}


def sites_without_texts(graph: ir.Model) -> dict[str, Site]:
    """Return how to quantize all products of a graph when no text was seen: two planes, and no channel is exact.

    Which channels are large is then not known; two planes hold them beside the rest, at twice the integer products.
    """
    names = (weight_name(node) for node in graph.graph)
    return {name: Site(planes=2) for name in names if name is not None}


def _site(name: str, largest: npt.NDArray[np.float32]) -> Site:
    count = min(EXACT, len(largest) // 8)
    exact = np.argsort(largest, kind="stable")[len(largest) - count :]
    return Site(tuple(sorted(exact.tolist())), 2 if TWO_PLANES.search(name) else 1)
