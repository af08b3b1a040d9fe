"""Numbers too small for a normal float32, below 1.2e-38, taken as zero: in a block, and not in the thread that has it.

The softmax of masked scores makes such numbers, and processors compute with them very slowly: attention over 512 tokens
of a 135M model took 220 ms with them and 136 ms without. onnxruntime's own option sets its threads so, and with them
the thread that opens the process's first session, for good. Whatever else that thread computes would then change.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Where C's fenv_t holds the register, and its bits: of x86's MXCSR "flush to zero" and "denormals are zero", of Arm's
# FPCR "flush to zero". The same in glibc (bits/fenv.h) and musl.
_REGISTERS = {"x86_64": (28, 0x8040), "aarch64": (0, 1 << 24)}
_BYTES = 64  # more than any fenv_t


def _library() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux") or platform.machine() not in _REGISTERS:
        return None
    process = ctypes.CDLL(None)
    return process if hasattr(process, "fegetenv") and hasattr(process, "fesetenv") else None


_LIBRARY = _library()
CAN_BE_ZERO = _LIBRARY is not None  # whether a thread can be set so here, and set back


@contextmanager
def unchanged() -> Iterator[None]:
    """Leave the calling thread's floating-point environment as it was before the block, whatever sets it inside."""
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
    """Take denormal numbers as zero in the calling thread, inside the block; nothing happens where that cannot be."""
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
