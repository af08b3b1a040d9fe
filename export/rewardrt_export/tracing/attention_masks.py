"""Which tokens each attention layer may look at, determined from its mask function.

A class in transformers may put a sliding window into the mask, into the arguments of its attention, or into both.
torch's own attention follows the mask, and so does the graph. Each layer's mask function is evaluated at positions
around the ends of windows and chunks, and compared with the windows and chunks whose lengths the config names. A mask
that is none of these is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map
from transformers import PretrainedConfig

from rewardrt.errors import TraceError

# Parts of the names of config fields that are lengths in tokens.
_LENGTHS = ("window", "chunk", "local", "original_max_position")


@dataclass(frozen=True)
class Reach:
    """Which tokens a token may look at, among itself and earlier ones (in an encoder, on either side).

    `window`: itself and the `window - 1` nearest ones. `chunk`: those in its own chunk, where the first chunk begins
    with the text. 0: no such limit.
    """

    window: int = 0
    chunk: int = 0

    def sees(self, asking: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """Return whether one position may look at another, apart from causality."""
        near = (asking - asked).abs() < self.window if self.window else torch.ones_like(asking - asked) > 0
        return near & (asking // self.chunk == asked // self.chunk) if self.chunk else near

    def __str__(self) -> str:
        if self.window:
            return f"a window of {self.window} tokens"
        return f"chunks of {self.chunk} tokens" if self.chunk else "no window"


class _NoPadding(TorchDispatchMode):
    """Evaluates a mask function that refers to fake tensors: each is replaced by zeros.

    The fake tensors hold the number of padding tokens and the index of each token's text. Zeros mean no padding, and
    one text.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operator with fake tensors replaced by zeros."""

        def real(value: Any) -> Any:
            return torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, FakeTensor) else value

        return func(*tree_map(real, args), **tree_map(real, kwargs or {}))


MaskFunction = Callable[[Any, Any, Any, Any], torch.Tensor]


def named_lengths(config: PretrainedConfig) -> dict[str, int]:
    """Return the windows, chunks and original lengths that a config names, in tokens, by the field's name."""
    found: dict[str, int] = {}

    def collect(values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                collect(value)
            elif type(value) is int and value > 1 and any(part in str(name) for part in _LENGTHS):
                found[str(name)] = max(value, found.get(str(name), 0))

    collect(config.to_dict())
    return {name: value for name, value in found.items() if name != "max_window_layers"}


class WatchedMasks:
    """The masks that a forward pass requested, each represented by a placeholder tensor."""

    def __init__(self, config: PretrainedConfig) -> None:
        self._lengths = set(named_lengths(config).values())
        self._asked: list[tuple[torch.Tensor, MaskFunction]] = []

    def note(self, function: MaskFunction) -> torch.Tensor:
        """Record a requested mask; return its placeholder."""
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        self._asked.append((mask, function))
        return mask

    def reach(self, module: nn.Module, mask: torch.Tensor | None, told: int, *, bidirectional: bool) -> Reach:
        """Return which tokens a layer's mask lets it look at; `told` is the window that its attention was given, or 0.

        Raises TraceError if the mask is none of the windows and chunks that the config names.
        """
        name = type(module).__name__
        function = next((function for asked, function in self._asked if asked is mask), None)
        if mask is not None and function is None:
            raise TraceError(f"{name} changes its attention mask by its own code; this backbone cannot be exported yet")
        if function is None:
            if self._asked or not bidirectional:
                raise TraceError(f"{name} gives its attention no mask; this backbone cannot be exported yet")
            return Reach(told)
        lengths = sorted({*self._lengths, told} - {0})
        ends = {0, 1, 2, 3}
        for length in {*lengths, *(length // 2 for length in lengths)}:
            ends |= {max(0, times * length + beside) for times in (1, 2) for beside in (-1, 0, 1)}
        with _disable_current_modes(), _NoPadding():
            places = torch.tensor(sorted(ends))
            asking, asked = places.unsqueeze(1), places.unsqueeze(0)
            try:
                sees = function(torch.tensor(0), torch.tensor(0), asking, asked).expand(len(places), len(places))
            except Exception as error:  # it depends on more than two positions: on padding, or on groups of tokens
                raise TraceError(
                    f"{name} asks for a mask that is more than a window ({str(error).splitlines()[0][:120]}); "
                    "this backbone cannot be exported yet"
                ) from error
            # The window that the attention was given comes first: it wins where these positions cannot distinguish two.
            windows = [told, 0, *lengths, *(length // 2 + 1 for length in lengths), *(length + 1 for length in lengths)]
            reaches = [*map(Reach, windows), *(Reach(chunk=length) for length in lengths)]
            causal = (asking >= asked) | bidirectional
            for reach in reaches:
                if bool((sees == (reach.sees(asking, asked) & causal)).all()):
                    return reach
            wrong = (sees != (reaches[0].sees(asking, asked) & causal)).nonzero()[-1]
            query, key = (int(places[index]) for index in wrong)
            does = "sees" if bool(sees[tuple(wrong)]) else "does not see"
        raise TraceError(
            f"{name}: by its mask token {query} {does} token {key}, and the attention is told of {reaches[0]}: neither "
            "a window nor chunks of a length that config.json names; this backbone cannot be exported yet"
        )


_watched: list[WatchedMasks] = []  # for the current pass; a global, as hooks are called from deep inside transformers


def watched_masks() -> WatchedMasks | None:
    """Return the masks that are being recorded now, or None."""
    return _watched[-1] if _watched else None


@contextlib.contextmanager
def watch_masks(config: PretrainedConfig) -> Iterator[WatchedMasks]:
    """Record the masks of one forward pass of a backbone with this config."""
    _watched.append(WatchedMasks(config))
    try:
        yield _watched[-1]
    finally:
        _watched.pop()


def mask_hook(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Replace transformers' mask functions: return None, or while masks are recorded a placeholder."""
    watch = watched_masks()
    return None if watch is None else watch.note(kwargs["mask_function"])
