"""The compiled kernels for int8 graphs, if the installation could build them (sources in runtime/kernels).

Without them int8 graphs run on onnxruntime's own kernels and take longer.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rewardrt.errors import ProviderError
from rewardrt.machine.providers import one_line

# Package managers of Linux, and the command with which each installs a C compiler.
COMPILERS = {
    "apt-get": "sudo apt-get install gcc libc6-dev",
    "dnf": "sudo dnf install gcc",
    "yum": "sudo yum install gcc",
    "zypper": "sudo zypper install gcc",
    "pacman": "sudo pacman -S gcc",
    "apk": "sudo apk add gcc musl-dev",
}
LIBRARY = Path(__file__).with_name("librewardrt_kernels.so")


_REGISTERING = threading.Lock()
_NO_PRODUCTS = "share_weights needs the products among RewardRT's own kernels, which"


def register(options: Any, *, share_weights: bool = False) -> None:
    """Let sessions with these `onnxruntime.SessionOptions` use the kernels; do nothing if they were not compiled.

    With `share_weights`, RewardRT's own matrix products run on every processor that supports them, even where
    onnxruntime's would be chosen. They read weights directly from the mapped file, where onnxruntime's kernels copy
    them. Raises ProviderError if the compiled kernels do not load, or if `share_weights` is set and there are no such
    products.
    """
    if not LIBRARY.is_file():
        if share_weights:
            raise ProviderError(f"{_NO_PRODUCTS} were not compiled; install rewardrt where there is a C compiler")
        return
    try:
        with _REGISTERING:
            library = ctypes.CDLL(str(LIBRARY))
            library.rewardrt_products_anyway(int(share_weights))
            try:
                shared = not share_weights or "products" in _names(library)
                options.register_custom_ops_library(str(LIBRARY))
            finally:
                library.rewardrt_products_anyway(0)  # it is global: reset it for all other callers
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ProviderError(
            f"{LIBRARY}: onnxruntime cannot load it ({one_line(error)}); "
            "install rewardrt again on this machine, or delete the file to do without"
        ) from error
    if not shared:
        raise ProviderError(f"{_NO_PRODUCTS} are for processors with AVX-512 VNNI; load without it, or use a server")


def _names(library: ctypes.CDLL) -> str:
    library.rewardrt_kernels.restype = ctypes.c_char_p
    found: bytes = library.rewardrt_kernels()
    return found.decode()


def describe() -> str:
    """Return the names of the kernels that run on this machine, or why none do."""
    if not LIBRARY.is_file():
        return "none: they were not compiled" if _written_for_here() else "none: they are for x86-64 Linux"
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return f"none: the library does not load ({one_line(error)})"
    return _names(library) or "none: they are for processors with AVX-512 VNNI"


def advice(instruction_sets: Sequence[str]) -> str | None:
    """Say what the missing kernels cost on a processor that could run them, and how to compile them; None otherwise."""
    if LIBRARY.is_file() or not _written_for_here() or "avx512_vnni" not in instruction_sets:
        return None
    compiler = ""
    if shutil.which(shlex.split(os.environ.get("CC", "cc"))[0]) is None:  # as hatch_build.py looks for it
        found = next((command for name, command in COMPILERS.items() if shutil.which(name) is not None), None)
        compiler = f"install a C compiler{f', `{found}`' if found is not None else ''}, and "
    return (
        "the int8 kernels were not compiled, and int8 takes about twice the time (256 tokens of a 135M model 151 ms "
        f"instead of 80 ms on two cores): {compiler}install rewardrt from its source again, "
        "`pip install --force-reinstall --no-deps FOLDER`"
    )


def _written_for_here() -> bool:
    return sys.platform == "linux" and platform.machine() == "x86_64"
