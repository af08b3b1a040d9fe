"""What a backbone's weights are multiplied with: kept while torch scores the calibration texts, layer by layer.

Weights are rounded by it: see `rounding`.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch

from rewardrt_export.rounding import Factor, make_factor

# The most that is kept of one activation. It takes tokens * K * 2 bytes for each: 200 KB a token at 135M parameters,
# 800 KB at 1.5B.
TOKENS = 4_096
LARGEST = 1e15  # tokens with larger values are left out: sums of their squares are no float32


class Calibration:
    """The inputs of each linear layer, one token after the other, as bfloat16 [tokens, K]."""

    def __init__(self) -> None:
        """Start with none."""
        self._parts: dict[str, list[torch.Tensor]] = {}  # by weight, as all that follow
        self._owner: dict[str, str] = {}  # the first of those that are multiplied with the same activation
        self._last: tuple[torch.Tensor, str] | None = None  # what was seen last, and its owner
        self._made: tuple[str, Factor] | None = None  # weights that share an activation are written in a row

    def observe(self, name: str, activation: torch.Tensor) -> None:
        """Take in one activation [..., K] of the layer whose weight is `name`.weight."""
        weight = f"backbone.{name}.weight"
        if self._last is None or self._last[0] is not activation:
            self._last = (activation, self._owner.get(weight, weight))
        owner = self._owner.setdefault(weight, self._last[1])
        parts = self._parts.setdefault(owner, [])
        room = TOKENS - sum(map(len, parts))
        if owner == weight and room > 0:
            parts.append(activation.detach().reshape(-1, activation.shape[-1])[:room].to(torch.bfloat16, copy=True))

    @property
    def weights(self) -> Collection[str]:
        """The weights, by their names in the graph, of the layers that texts went through."""
        return self._owner.keys()

    def factor(self, weight: str) -> Factor:
        """Return what one of `weights` is rounded by."""
        owner = self._owner[weight]
        if self._made is None or self._made[0] != owner:
            seen = torch.cat(self._parts[owner]).float().numpy()
            usable = (np.abs(seen) < LARGEST).all(axis=1)  # False of NaN, too
            self._made = (owner, make_factor(seen[usable]))
        return self._made[1]
