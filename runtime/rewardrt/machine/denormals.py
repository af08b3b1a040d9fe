"""Treat denormal float32 numbers (below 1.2e-38) as zero inside a block, and restore the thread's setting after it.

The softmax of masked scores produces denormal numbers, and processors are very slow with them: attention over 512
tokens of a 135M model took 220 ms with them and 136 ms without. onnxruntime's own option sets its threads, but also the
thread that opens the process's first session, permanently. Everything else that thread computes would then change.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Offset of the control register in C's fenv_t, and the bits to set: "flush to zero" and "denormals are zero" in x86's
# MXCSR, "flush to zero" in Arm's FPCR. glibc (bits/fenv.h) and musl use the same layout.
_REGISTERS = {"x86_64": (28, 0x8040), "aarch64": (0, 1 << 24)}
_BYTES = 64  # more than any fenv_t


def _library() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux") or platform.machine() not in _REGISTERS:
        return None
    process = ctypes.CDLL(None)
    return process if hasattr(process, "fegetenv") and hasattr(process, "fesetenv") else None


_LIBRARY = _library()
CAN_BE_ZERO = _LIBRARY is not None  # whether a thread's setting can be changed and restored here


@contextmanager
def unchanged() -> Iterator[None]:
    """Restore the calling thread's floating-point environment after the block, whatever changes it inside."""
    if _LIBRARY is None:
        yield
        return
    before = ctypes.create_string_buffer(_BYTES)
    _LIBRARY.fegetenv(before)
    try:
        yield
    finally:
        _LIBRARY.fesetenv(before)


@contextmanager
def as_zero() -> Iterator[None]:
    """Treat denormal numbers as zero in the calling thread inside the block; do nothing where that is not possible."""
    if _LIBRARY is None:
        yield
        return
    with unchanged():
        offset, bits = _REGISTERS[platform.machine()]
        inside = ctypes.create_string_buffer(_BYTES)
        _LIBRARY.fegetenv(inside)
        register = ctypes.c_uint32.from_buffer(inside, offset)
        register.value |= bits
        _LIBRARY.fesetenv(inside)
        yield
