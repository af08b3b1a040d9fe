"""Complex numbers as pairs of real ones while a backbone is traced, because ONNX has no complex numbers.

Some classes rotate queries and keys by a product of complex numbers. During a trace, torch's functions that make and
read complex numbers are replaced, so that the graph has the same products in real numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


class Complex:
    """Replaces a complex tensor, with the operations that rotations use."""

    def __init__(self, real: torch.Tensor, imaginary: torch.Tensor) -> None:
        self.real = real
        self.imag = imaginary

    @property
    def device(self) -> torch.device:
        """The device of both parts."""
        return self.real.device

    def __mul__(self, other: Any) -> Complex:
        """Multiply by a Complex, or by a real number or tensor."""
        if isinstance(other, Complex):
            real = self.real * other.real - self.imag * other.imag
            return Complex(real, self.real * other.imag + self.imag * other.real)
        return Complex(self.real * other, self.imag * other)

    __rmul__ = __mul__

    def __getitem__(self, index: Any) -> Complex:
        """Index both parts."""
        return Complex(self.real[index], self.imag[index])

    def __getattr__(self, name: str) -> Callable[..., Complex]:
        """Apply operations that do not change values, such as `unsqueeze`, `to` and `transpose`, to both parts."""
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
    """Make torch's functions for complex numbers use pairs of real tensors inside the block."""
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
