"""The kernels for int8 graphs that the installation compiled, where it could: see runtime/kernels.

A graph that has use for them runs without them too, by onnxruntime's own, and takes longer.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from rewardrt.errors import ProviderError
from rewardrt.machine.providers import one_line

LIBRARY = Path(__file__).with_name("librewardrt_kernels.so")


def register(options: Any) -> None:
    """Let sessions with these `onnxruntime.SessionOptions` use the kernels; nothing where there are none.

    Raises ProviderError if they are there and do not load.
    """
    if not LIBRARY.is_file():
        return
    try:
        options.register_custom_ops_library(str(LIBRARY))
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ProviderError(
            f"{LIBRARY}: onnxruntime cannot load it ({one_line(error)}); "
            "install rewardrt again on this machine, or delete the file to do without"
        ) from error


def describe() -> str:
    """Say which kernels run on this machine, or why none do."""
    if not LIBRARY.is_file():
        return "none: they were not compiled; install rewardrt from its source where there is a C compiler"
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return f"none: the library does not load ({one_line(error)})"
    library.rewardrt_kernels.restype = ctypes.c_char_p
    found: bytes = library.rewardrt_kernels()
    return found.decode() or "none: they are for processors with AVX-512 VNNI"
