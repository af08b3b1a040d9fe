"""How much memory is free, and whether the certification fits into it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rewardrt.bundle.precisions import PRECISIONS
from rewardrt.errors import CertificateError
from rewardrt_export.checkpoint import Checkpoint

CGROUP = Path("/sys/fs/cgroup")  # where a container sees its own limit


def check_memory(checkpoint: Checkpoint, precisions: Sequence[str]) -> bool:
    """Return whether the torch model in float32 fits in the memory that this machine has left.

    Raises CertificateError where a graph that is to be compared with it does not.
    """
    parameters, free = checkpoint.source.parameters, available_memory()
    if free is None:
        return True
    for name in precisions:
        needed = PRECISIONS[name].held * parameters
        if needed > free:
            raise CertificateError(
                f"onnxruntime needs {needed / 1e9:.1f} GB of memory for the {name} graph, and {free / 1e9:.1f} GB are "
                "free; export where there is more, in a smaller precision, or with --no-certify, which does not load it"
            )
    return 4 * parameters <= free


def available_memory() -> int | None:
    """Return the free memory of the machine, or within this container's limit, in bytes; None if unknown."""
    left = []
    if found := re.search(r"^MemAvailable:\s+(\d+) kB", _read_text(Path("/proc/meminfo")), re.MULTILINE):
        left.append(1024 * int(found[1]))
    limit, used = (_read_text(CGROUP / name).strip() for name in ("memory.max", "memory.current"))
    if limit.isdigit() and used.isdigit():
        # Cached pages of files count as used, but are released when memory is needed.
        cached = re.search(r"^inactive_file (\d+)", _read_text(CGROUP / "memory.stat"), re.MULTILINE)
        left.append(int(limit) - int(used) + (int(cached[1]) if cached else 0))
    return min(left, default=None)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
