"""What a backbone's weights are multiplied with, and how the reward depends on it: kept while torch scores texts.

How activations and weights are rounded is decided by it: see `smoothing` and `rounding`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from rewardrt.text.tokens import EncodedText

# The most that is kept of one activation. It takes tokens * K * 4 bytes for each: 400 KB a token at 135M parameters,
# 1.6 MB at 1.5B.
KEPT_TOKENS = 4_096
LONGEST = 512  # tokens of a text whose reward is derived: the way back keeps the attention of all layers in memory
COLUMNS = 256  # of a weight whose gradients are kept
LARGEST = 1e15  # tokens with larger values are left out: sums of their squares are no float32


@dataclass(frozen=True)
class SeenWeight:
    """Columns of a weight, and the sum of the squares of each text's gradients by them, both [K, columns] float32.

    `share` is what part of the weight's columns they are.
    """

    columns: torch.Tensor
    squares: torch.Tensor
    share: float


@dataclass(frozen=True)
class Seen:
    """Inputs of a product and the gradients of each text's reward by them, both [tokens, K] float32."""

    activations: torch.Tensor
    gradients: torch.Tensor  # 0 where none was derived
    weights: tuple[SeenWeight, ...] = ()  # that are multiplied with it, of a model whose weights were watched


def cut(text: EncodedText) -> EncodedText:
    """Return the first LONGEST tokens of a text, read there where its own tokens go on."""
    return replace(
        text,
        ids=text.ids[:LONGEST],
        positions=text.positions.clip(max=LONGEST - 1),
        type_ids=None if text.type_ids is None else text.type_ids[:LONGEST],
    )


class Calibration:
    """The inputs of each linear layer and their gradients, one token after the other, as bfloat16 [tokens, K]."""

    def __init__(self, folder: Path | None = None) -> None:
        """Start with none. Inputs and gradients are kept in files in `folder`, or in memory if there is none."""
        self._folder = folder
        self._stored: dict[str, int] = {}  # how many tokens of an activation are in its files
        self.texts = 0  # whose rewards were derived
        self.reward_std = 1.0  # the spread of rewards, which damage is measured by
        self._parts: dict[str, list[torch.Tensor]] = {}  # by weight, as all that follow
        self._gradients: dict[str, list[torch.Tensor]] = {}
        self._weights: dict[str, SeenWeight] = {}
        self._owner: dict[str, str] = {}  # the first of those that are multiplied with the same activation
        self._unseen: set[str] = set()
        self._last: tuple[torch.Tensor, torch.Tensor, str] | None = None  # what was seen last, given on, and its owner

    def observe(self, name: str, activation: torch.Tensor) -> torch.Tensor:
        """Take in one activation [..., K] of the backbone's weight `name`; returns what is to be multiplied.

        Gradients come in when the text's reward is derived by what was returned.
        """
        weight = f"backbone.{name}"
        if self._last is None or self._last[0] is not activation:
            # A view of its own: the gradient is then that of the products alone, whatever else reads the activation.
            self._last = (activation, activation.view_as(activation), self._owner.get(weight, weight))
        _, given, last_owner = self._last
        owner = self._owner.setdefault(weight, last_owner)
        parts = self._parts.setdefault(owner, [])
        room = KEPT_TOKENS - sum(map(len, parts)) - self._stored.get(owner, 0)
        if owner == weight and room > 0:
            parts.append(_rows(activation, room))
            gradients = self._gradients.setdefault(owner, [])
            gradients.append(torch.zeros_like(parts[-1]))  # of what the reward does not depend on
            if given.requires_grad:
                given.register_hook(partial(_put, gradients, len(gradients) - 1))
        return given

    def watch(self, name: str, weight: torch.Tensor, *, transposed: bool) -> None:
        """Take in the gradients of a weight [N, K] whenever there are any; [K, N] where it is `transposed`."""
        weight.requires_grad_(True)
        size = weight.shape[1 if transposed else 0]
        chosen = torch.linspace(0, size - 1, min(size, COLUMNS)).long()

        def columns(whole: torch.Tensor) -> torch.Tensor:
            return whole.detach()[:, chosen] if transposed else whole.detach()[chosen].T

        seen = self._weights.get(f"backbone.{name}")
        if seen is None:
            seen = SeenWeight(columns(weight).clone(), torch.zeros_like(columns(weight)), len(chosen) / size)
            self._weights[f"backbone.{name}"] = seen
        squares = seen.squares

        def add(parameter: torch.Tensor) -> None:
            if parameter.grad is not None:
                squares.add_(columns(parameter.grad).square())
            parameter.grad = None  # at once: those of all weights take as much memory as they do

        weight.register_post_accumulate_grad_hook(add)

    def store(self) -> None:
        """Move what was taken in since the last call to the files, if there is a folder: called after each text."""
        for owner, parts in self._parts.items() if self._folder is not None else ():
            if parts:
                self._stored[owner] = self._stored.get(owner, 0) + sum(map(len, parts))
                for file, values in zip(self._files(owner), (parts, self._gradients[owner]), strict=True):
                    with file.open("ab") as opened:
                        torch.cat(values).view(torch.int16).numpy().tofile(opened)
                    values.clear()

    def _files(self, owner: str) -> tuple[Path, Path]:
        assert self._folder is not None
        return self._folder / f"{owner}.inputs", self._folder / f"{owner}.gradients"

    def expect(self, name: str) -> None:
        """Know of a weight that texts may go through or not: that of an expert."""
        self._unseen.add(f"backbone.{name}")

    @property
    def weights(self) -> Collection[str]:
        """The weights, by their names in the graph, that texts went through or might have."""
        return self._owner.keys() | self._unseen

    @property
    def owners(self) -> Collection[str]:
        """One weight for each activation that was seen."""
        return self._parts.keys()

    def owner(self, weight: str) -> str | None:
        """Return which of `owners` is multiplied with the same activation as this one of `weights`; None: unseen."""
        return self._owner.get(weight)

    def seen(self, owner: str) -> Seen:
        """Return what one of `owners` is multiplied with."""
        if self._stored.get(owner):
            activations, gradients = (
                torch.from_numpy(np.fromfile(file, dtype=np.int16))
                .view(torch.bfloat16)
                .unflatten(0, (tokens, -1))
                .float()
                for file, tokens in zip(self._files(owner), 2 * (self._stored[owner],), strict=True)
            )
        else:
            activations = torch.cat(self._parts[owner]).float()
            gradients = torch.cat(self._gradients[owner]).float()
        # False of NaN, too
        usable = (activations.abs() < LARGEST).all(dim=1) & torch.isfinite(gradients).all(dim=1)
        weights = [
            self._weights[name] for name, other in self._owner.items() if other == owner and name in self._weights
        ]
        return Seen(activations[usable], gradients[usable], tuple(weights))


def _put(gradients: list[torch.Tensor], place: int, gradient: torch.Tensor) -> None:
    gradients[place] = _rows(gradient, len(gradients[place]))


def _rows(values: torch.Tensor, room: int) -> torch.Tensor:
    return values.detach().reshape(-1, values.shape[-1])[:room].to(torch.bfloat16, copy=True)
