"""What a backbone's masks hide, against what its attention is told to leave out.

A class of transformers may put a window into the mask, into the arguments of its attention, or into both. The graph
goes by the arguments, and a class that puts its window into the mask alone would become plainly causal. So both are
compared: the mask as the function of two positions that transformers makes it from, where windows begin and end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PretrainedConfig

from rewardrt.errors import TraceError

# Of a config's fields, those that say over how many tokens something holds.
_LENGTHS = ("window", "chunk", "local", "original_max_position")

MaskFunction = Callable[[Any, Any, Any, Any], torch.Tensor]


def named_lengths(config: PretrainedConfig) -> dict[str, int]:
    """Return the windows, chunks and original lengths that a config names, in tokens, by the name of the field."""
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
    """The masks that a forward pass asked for. Each is a tensor that stands for its function."""

    def __init__(self, config: PretrainedConfig) -> None:
        self._lengths = set(named_lengths(config).values())
        self._asked: list[tuple[torch.Tensor, MaskFunction]] = []

    def note(self, function: MaskFunction) -> torch.Tensor:
        """Keep a mask that was asked for, and return what stands for it."""
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        self._asked.append((mask, function))
        return mask

    def compare(self, module: nn.Module, mask: torch.Tensor | None, window: int, *, bidirectional: bool) -> None:
        """Raise TraceError unless the mask that a layer was given hides what a window of `window` tokens hides.

        0 is no window. A causal layer sees the token itself and the `window - 1` before it, a bidirectional one as many
        on either side.
        """
        name = type(module).__name__
        function = next((function for asked, function in self._asked if asked is mask), None)
        if mask is not None and function is None:
            raise TraceError(f"{name} changes its attention mask by its own code; this backbone cannot be exported yet")
        if function is None:
            if self._asked or not bidirectional:
                raise TraceError(f"{name} gives its attention no mask; this backbone cannot be exported yet")
            return
        ends = {0, 1, 2, 3}
        for length in {*self._lengths, window, window // 2}:
            ends |= {max(0, times * length + beside) for times in (1, 2) for beside in (-1, 0, 1)}
        with _disable_current_modes():
            places = torch.tensor(sorted(ends))
            asking, asked = places.unsqueeze(1), places.unsqueeze(0)
            try:
                sees = function(torch.tensor(0), torch.tensor(0), asking, asked).expand(len(places), len(places))
            except Exception as error:  # it looks at more than two positions: at the padding, at groups of tokens
                raise TraceError(
                    f"{name} asks for a mask that is more than a window ({str(error).splitlines()[0][:120]}); "
                    "this backbone cannot be exported yet"
                ) from error
            distance = asking - asked
            computed = distance.abs() >= 0 if bidirectional else distance >= 0
            if window:
                computed = computed & (distance.abs() < window)
            if not (wrong := (sees != computed).nonzero()).numel():
                return
            query, key = (int(places[index]) for index in wrong[-1])
            does = "sees" if bool(sees[tuple(wrong[-1])]) else "does not see"
        told = f"a window of {window} tokens" if window else "no window"
        raise TraceError(
            f"{name}: its mask and its attention disagree: by the mask token {query} {does} token {key}, and the "
            f"attention is told of {told}; this backbone cannot be exported yet"
        )


_watched: list[WatchedMasks] = []  # of the pass that runs: the hooks are called from deep inside transformers


def watched_masks() -> WatchedMasks | None:
    """Return the masks that are watched now, if any."""
    return _watched[-1] if _watched else None


@contextlib.contextmanager
def watch_masks(config: PretrainedConfig) -> Iterator[WatchedMasks]:
    """Watch the masks of one forward pass of a backbone with this config."""
    _watched.append(WatchedMasks(config))
    try:
        yield _watched[-1]
    finally:
        _watched.pop()


def mask_hook(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Stand in for transformers' mask functions: nothing, or where masks are watched what stands for the mask."""
    watch = watched_masks()
    return None if watch is None else watch.note(kwargs["mask_function"])
