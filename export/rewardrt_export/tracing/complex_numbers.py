"""Complex numbers as pairs of real ones, while a backbone is traced: ONNX has none.

Some classes turn queries and keys by a product of complex numbers. torch's functions that make and read these are
replaced for the time of a trace, so that the graph has the same products in real numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


class Complex:
    """Stands for a complex tensor: what rotations do with one."""

    def __init__(self, real: torch.Tensor, imaginary: torch.Tensor) -> None:
        self.real = real
        self.imag = imaginary

    @property
    def device(self) -> torch.device:
        """Where both parts are."""
        return self.real.device

    def __mul__(self, other: Any) -> Complex:
        """Multiply with another, or with a real number or tensor."""
        if isinstance(other, Complex):
            real = self.real * other.real - self.imag * other.imag
            return Complex(real, self.real * other.imag + self.imag * other.real)
        return Complex(self.real * other, self.imag * other)

    __rmul__ = __mul__

    def __getitem__(self, index: Any) -> Complex:
        """Take a part of both."""
        return Complex(self.real[index], self.imag[index])

    def __getattr__(self, name: str) -> Callable[..., Complex]:
        """Do to both parts what leaves their numbers as they are: `unsqueeze`, `to`, `transpose` and others."""
        if name not in ("unsqueeze", "squeeze", "to", "transpose", "view", "reshape", "expand", "contiguous"):
            raise AttributeError(f"complex numbers are traced without {name}")
        return lambda *args, **kwargs: Complex(
            getattr(self.real, name)(*args, **kwargs), getattr(self.imag, name)(*args, **kwargs)
        )


def _polar(size: torch.Tensor, angle: torch.Tensor) -> Complex:
    return Complex(size * angle.cos(), size * angle.sin())


def _view_as_complex(pairs: torch.Tensor) -> Complex:
    return Complex(pairs[..., 0], pairs[..., 1])


def _view_as_real(value: Complex) -> torch.Tensor:
    return torch.stack([value.real, value.imag], dim=-1)


@contextlib.contextmanager
def complex_as_real() -> Iterator[None]:
    """Let torch's functions of complex numbers give and take pairs of real tensors."""
    replaced: dict[str, Any] = {
        "polar": _polar,
        "view_as_complex": _view_as_complex,
        "view_as_real": _view_as_real,
    }
    kept = {name: getattr(torch, name) for name in replaced}
    try:
        for name, function in replaced.items():
            setattr(torch, name, function)
        yield
    finally:
        for name, function in kept.items():
            setattr(torch, name, function)
