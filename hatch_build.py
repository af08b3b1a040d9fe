"""Compile the kernels of int8 graphs, where there is a C compiler for a processor that they are written for.

A distribution without them works as well, by onnxruntime's own kernels, and takes longer: `rewardrt doctor` says which
it is. REWARDRT_KERNELS=required makes an installation without them fail, REWARDRT_KERNELS=none leaves them out.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = Path("runtime/rewardrt/machine/librewardrt_kernels.so")
SOURCES = Path("runtime/kernels")
FLAGS = ["-O3", "-std=c11", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
# operators.c asks the processor before it calls one of the others.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
OWN_FLAGS = {
    "operators": [],
    "products": [*AVX512, "-mavx512vnni"],
    "attention": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
}


class KernelsHook(BuildHookInterface[Any]):
    """Runs before a wheel or an editable installation is put together."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the library into the package; a wheel that has it is for this platform alone."""
        wanted = os.environ.get("REWARDRT_KERNELS", "")
        target, sources = Path(self.root, LIBRARY), Path(self.root, SOURCES)
        if wanted == "none":
            target.unlink(missing_ok=True)
            return
        reason = None if _is_newer(target, [*sources.iterdir(), Path(__file__)]) else compile_library(sources, target)
        if reason is None:
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        elif wanted == "required":
            raise RuntimeError(f"REWARDRT_KERNELS=required, and the kernels cannot be compiled: {reason}")
        else:
            self.app.display_warning(f"without kernels for int8: {reason}")


def compile_library(sources: Path, target: Path) -> str | None:
    """Compile the sources into one library; return None, or why it is not there."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"they are written for x86-64 Linux, and this is {platform.machine()} {sys.platform}"
    compiler = shlex.split(os.environ.get("CC", "cc"))
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = []
        for name, flags in OWN_FLAGS.items():
            objects.append(f"{folder}/{name}.o")
            reason = _run([*compiler, *FLAGS, *flags, "-c", str(sources / f"{name}.c"), "-o", objects[-1]])
            if reason is not None:
                return reason
        library = Path(folder, target.name)
        reason = _run([*compiler, "-shared", "-o", str(library), *objects])
        if reason is None:
            library.replace(target)  # at once: another process may have the old one loaded
        return reason


def _is_newer(target: Path, sources: list[Path]) -> bool:
    return target.is_file() and all(target.stat().st_mtime > source.stat().st_mtime for source in sources)


def _run(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    return None if done.returncode == 0 else f"{command[0]}: {done.stderr.strip()[-500:]}"
