"""What the libraries underneath would send of themselves is switched off, before any of them is imported.

Importing this module does it, and importing `rewardrt` or `rewardrt_export` imports it first. Programs that are started
from here inherit it. A variable that the user set stays as it is.

onnxruntime 1.29 and later reads its variable once, when it is imported. From then on its threads resolve and post to a
host of its maker, an identifier of this machine lies below ~/.cache, and a process forked from this one never exits.
"""

from __future__ import annotations

import os
import sys

ORT_VARIABLE = "ORT_DISABLE_TELEMETRY"
# huggingface_hub says in each request which libraries it is used by, and transformers asks the container's host for
# more. RewardRT asks the Hub for what is named by `hf://`, and for nothing else.
_VARIABLES = (ORT_VARIABLE, "HF_HUB_DISABLE_TELEMETRY")


def _switch_off() -> bool:
    """Set the variables that the user did not; return whether that was too late for onnxruntime."""
    late = "onnxruntime" in sys.modules and not _means_off(os.environ.get(ORT_VARIABLE, ""))
    for name in _VARIABLES:
        if not os.environ.get(name, "").strip():  # an empty variable is one that nobody set
            os.environ[name] = "1"
    return late


def _means_off(value: str) -> bool:
    """Read the variable as onnxruntime does."""
    return value.strip().lower() in ("1", "true", "yes", "y", "on")


_LATE = _switch_off()


def describe() -> str:
    """Say whether anything is sent by this process, and why."""
    value = os.environ.get(ORT_VARIABLE, "")
    if not _means_off(value):
        return f"on: onnxruntime's is left on by {ORT_VARIABLE}={value}; unset it, or set it to 1, to send nothing"
    if _LATE:
        return (
            "on: onnxruntime was imported before rewardrt, and cannot be stopped; import rewardrt first, or set "
            f"{ORT_VARIABLE}=1 for the process"
        )
    return "off: nothing leaves this machine"


def started_late() -> bool:
    """Whether onnxruntime was imported with its telemetry on before it could be switched off."""
    return _LATE
