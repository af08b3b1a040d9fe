"""How an activation is made easy to round: scaled channel by channel, mixed in small blocks, or given in two planes.

Each token of an activation x [tokens, K] is rounded in steps of one size, s = max |x| / 127, and each column of a
weight W [K, N] too, w = max |W| / 127. A channel that carries far larger values than the rest makes a token's step
size too coarse for all of them. With x / c and c W in their place, the product is the same. To which c? Rounding adds
noise of s^2 / 12 to each channel of a token, and w^2 / 12 to each number of a column, and noise v in a number p moves
the reward r by about v dr/dp. The damage of a product, the variance that rounding adds to the reward of a text, is so

    A(c) = sum over tokens t   max_k (x_tk / c_k)^2 / 127^2 / 12   sum over k (c_k dr/dx_tk)^2
    B(c) = sum over columns n  max_k (c_k W_kn)^2 / 127^2 / 12     sum over k (dr/dW_kn / c_k)^2

and c is learnt: the one with the least A + B over the texts of a calibration. (SmoothQuant, Xiao et al. 2022,
https://arxiv.org/abs/2211.10438, takes c from the largest values alone. Learnt for A only, A was 1.5 to 3 times
smaller than with the best power of the channels' sizes, on texts of the 135M reference model that c did not see; but
the weights then carry what was large, and cost more than the activations did.)

Where the sum of A over all activations is still too large, those with most of it are mixed too: blocks of MIXED
channels are multiplied with a Hadamard matrix, which spreads what is large over the block (QuaRot, Ashkboos et al.
2024, https://arxiv.org/abs/2404.00456). Where that is not enough, what rounding left over is given in a second plane,
which doubles the integer products and so costs far more than mixing does: no activation has one before all are mixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

import torch

from rewardrt.steps import Count, uncounted
from rewardrt_export.precisions.calibrate import Calibration, Seen
from rewardrt_export.precisions.functions import MIXED, hadamard
from rewardrt_export.precisions.rounding import Factor, Floats, make_factor

_Largest = Callable[[torch.Tensor, int], torch.Tensor]  # over an axis

GOAL = 0.016  # standard deviations of the reward that rounding the activations is to move it by; twice is measured
LEARNT_ON = 1_024  # that c is learnt on
ROUNDS, RATE = 60, 0.15  # of Adam; 150 rounds found nothing better
NORM = 12  # the p of the p-norm that stands for the largest value while c is learnt
SMALLEST = 1e-6  # of a channel's c in relation to the largest one's: channels that were 0 in all texts


@dataclass(frozen=True)
class Smoothing:
    """What is done to an activation [tokens, K]: divided by `scale` [K], mixed in blocks, given in so many planes."""

    scale: Floats | None = None  # None: 1
    mixed: bool = False
    planes: int = 2

    @property
    def mixable(self) -> bool:
        """Whether it is not mixed, and could be."""
        return self.planes == 1 and not self.mixed and self.scale is not None and len(self.scale) % MIXED == 0

    def activation(self, seen: torch.Tensor) -> torch.Tensor:
        """Return activations [tokens, K] as they are rounded; with `weight` of a weight, the product is as it was."""
        scaled = seen if self.scale is None else seen / torch.from_numpy(self.scale)
        return _mix(scaled) if self.mixed else scaled

    def weight(self, weight: Floats) -> Floats:
        """Return a weight [K, N] whose product with the smoothed activation is the product as it was."""
        scaled = weight if self.scale is None else weight * self.scale[:, None]
        return _mix(torch.from_numpy(scaled).T).T.contiguous().numpy() if self.mixed else scaled


UNSMOOTHED = Smoothing()  # where no text was seen


def _mix(values: torch.Tensor) -> torch.Tensor:
    """Mix the last axis, whose length is a multiple of MIXED."""
    return (values.unflatten(-1, (-1, MIXED)) @ torch.from_numpy(hadamard())).flatten(-2)


@dataclass(frozen=True)
class _Rung:
    """One way to round an activation, and the variance that it adds to the reward."""

    smoothing: Smoothing
    damage: float


class Plan:
    """How activations are smoothed and weights rounded, of each weight that texts went through, by its name.

    The damage of all activations together is brought below GOAL: the one with most of it takes its next rung, until it
    is; of those that can be mixed, as long as there are any. Where nothing is known of the gradients, all have two
    planes.
    """

    def __init__(self, calibration: Calibration, count: Count = uncounted) -> None:
        """Learn the scales: seconds to minutes. Counted are the activations."""
        ladders = {owner: _ladder(calibration, owner) for owner in calibration.owners}
        taken: dict[str, _Rung] = {}
        for number, (owner, ladder) in enumerate(ladders.items(), 1):
            count(number, len(ladders))
            taken[owner] = next(ladder)
        goal = (GOAL * calibration.reward_std) ** 2
        while sum(rung.damage for rung in taken.values()) > goal:
            cheap = [owner for owner, rung in taken.items() if rung.smoothing.mixable]
            worst = max(cheap or taken, key=lambda owner: taken[owner].damage)
            taken[worst] = next(ladders[worst])
        self._calibration = calibration
        self._rungs = taken
        self._made: tuple[str, Factor] | None = None  # weights that share an activation are written in a row

    @property
    def weights(self) -> Collection[str]:
        """The weights that texts went through, or might have."""
        return self._calibration.weights

    def smoothing(self, weight: str) -> Smoothing:
        """Return what is done to the activation that this weight is multiplied with."""
        owner = self._calibration.owner(weight)
        return UNSMOOTHED if owner is None else self._rungs[owner].smoothing

    def factor(self, weight: str) -> Factor | None:
        """Return what this weight, smoothed, is rounded by; None where no text went through it."""
        owner = self._calibration.owner(weight)
        if owner is None:
            return None
        if self._made is None or self._made[0] != owner:
            seen = self.smoothing(weight).activation(self._calibration.seen(owner).activations)
            self._made = (owner, make_factor(seen.numpy()))
        return self._made[1]


def _ladder(calibration: Calibration, owner: str) -> Iterator[_Rung]:
    """Yield ways to round an activation, from the cheapest to the one without damage that counts.

    What was seen is asked for at each rung and not kept between them: in float32, it is large.
    """
    if not calibration.texts or not calibration.seen(owner).gradients.any():
        yield _Rung(UNSMOOTHED, 0.0)
        return
    scale, damage = _learn(calibration.seen(owner), mixed=False)
    mixed = len(scale) % MIXED == 0
    yield _Rung(Smoothing(scale, planes=1), damage / calibration.texts)
    if mixed:
        scale, damage = _learn(calibration.seen(owner), mixed=True)
        yield _Rung(Smoothing(scale, mixed, planes=1), damage / calibration.texts)
    yield _Rung(Smoothing(scale, mixed, planes=2), 0.0)


def _learn(seen: Seen, *, mixed: bool) -> tuple[Floats, float]:
    """Return the scale with the least damage of activations and weights, and the activations' damage there.

    Damage is the sum over all texts; of their tokens, some LEARNT_ON are looked at, and stand for all.
    """
    every = -(-len(seen.activations) // LEARNT_ON)
    seen = replace(seen, activations=seen.activations[::every], gradients=seen.gradients[::every])
    sizes = seen.activations.square().mean(0).sqrt()
    smallest = (SMALLEST * sizes.max()).clamp_min(torch.finfo(torch.float32).tiny)
    logarithm = torch.nn.Parameter(0.5 * torch.maximum(sizes, smallest).log())
    squares = seen.gradients.square()
    optimizer = torch.optim.Adam([logarithm], lr=RATE)

    def of_activations(largest: _Largest, scale: torch.Tensor) -> torch.Tensor:
        scaled = seen.activations / scale
        step_sizes = largest(_mix(scaled) if mixed else scaled, -1) / 127
        return every * (step_sizes.square() * (squares @ scale.square())).sum() / 12

    def of_weights(largest: _Largest, scale: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        for weight in seen.weights:
            scaled = weight.columns * scale[:, None]
            step_sizes = largest(_mix(scaled.T).T if mixed else scaled, 0) / 127
            total = total + (step_sizes.square() * (scale**-2 @ weight.squares)).sum() / 12 / weight.share
        return total

    for _ in range(ROUNDS):
        scale = logarithm.exp()
        damage = of_activations(_nearly_largest, scale) + of_weights(_nearly_largest, scale)
        if not (torch.isfinite(damage) and damage > 0):
            break
        optimizer.zero_grad()
        damage.log().backward()
        optimizer.step()
    with torch.no_grad():
        scale = logarithm.exp()
        found = float(of_activations(_largest, scale))
        return scale.numpy(), found if math.isfinite(found) else math.inf


def _largest(values: torch.Tensor, dim: int) -> torch.Tensor:
    return values.abs().amax(dim)


def _nearly_largest(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the NORM-norm over an axis: it changes with every value, where the largest changes with one alone."""
    sizes = values.abs().clamp_min(torch.finfo(torch.float32).tiny)
    peak = sizes.detach().amax(dim, keepdim=True)
    norm: torch.Tensor = (peak * (sizes / peak).pow(NORM).sum(dim, keepdim=True).pow(1 / NORM)).squeeze(dim)
    return norm
