"""The CPU of this machine: instruction sets, cores, and the share of them that a container may use."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Instruction sets that fast CPU kernels may need: the operating system's name -> the name shown to users.
_INSTRUCTION_SETS = {
    # x86: Linux
    "avx2": "avx2",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx_vnni": "avx_vnni",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    # arm: Linux
    "asimd": "asimd",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    # macOS: sysctl hw.optional
    "hw.optional.avx2_0": "avx2",
    "hw.optional.avx512f": "avx512f",
    "hw.optional.advsimd": "asimd",
    "hw.optional.arm.feat_dotprod": "dotprod",
    "hw.optional.arm.feat_i8mm": "i8mm",
    "hw.optional.arm.feat_bf16": "bf16",
}


@dataclass(frozen=True)
class Processor:
    """The CPU as this process sees it. `cpu_limit` is the container's CPU quota in cores; None if there is no limit."""

    model: str
    instruction_sets: tuple[str, ...] | None  # None: unknown on this system
    logical_cores: int
    usable_cores: int  # the cores that this process may be scheduled on
    cpu_limit: float | None


def read_processor() -> Processor:
    """Read the processor of this machine, and the share of it that a container may use."""
    logical = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    model, sets = platform.processor() or platform.machine(), None
    if sys.platform == "linux":
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        model, sets = _model_name(text) or model, _linux_instruction_sets(text)
    elif sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "machdep.cpu.brand_string", "hw.optional"]
        text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        model, sets = _model_name(text) or model, _macos_instruction_sets(text)
    return Processor(model, sets, logical, usable, _cpu_limit(Path("/sys/fs/cgroup")))


def _model_name(text: str) -> str | None:
    found = re.search(r"^(?:model name\s*|machdep\.cpu\.brand_string): (.+)$", text, re.MULTILINE)
    return found[1].strip() if found else None


def _linux_instruction_sets(cpuinfo: str) -> tuple[str, ...]:
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)  # x86, Arm; the first core's
    return _known(found[1].split() if found else [])


def _macos_instruction_sets(sysctl: str) -> tuple[str, ...]:
    return _known(re.findall(r"^(\S+): 1$", sysctl.lower(), re.MULTILINE))


def _known(names: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(shown for name, shown in _INSTRUCTION_SETS.items() if name in names))


def _cpu_limit(cgroup: Path) -> float | None:
    """Read the container's CPU quota in cores, from the one file of cgroup v2 or the two files of cgroup v1."""
    try:
        quota, period = (cgroup / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return None
    try:
        cores = float(quota) / float(period)
    except (ValueError, ZeroDivisionError):  # "max": no limit
        return None
    return cores if cores > 0 else None  # -1: no limit
