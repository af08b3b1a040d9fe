"""Switch off the telemetry of the libraries underneath, before any of them is imported.

Importing this module does it, and importing `rewardrt` or `rewardrt_export` imports this module first. Child processes
inherit the environment variables. A variable that the user has set is not changed.

onnxruntime 1.29 and later reads its variable once, when it is imported. If telemetry is on at that moment,
onnxruntime's threads connect to a host of its maker, it writes an identifier of this machine below ~/.cache, and a
process forked from this one never exits.
"""

from __future__ import annotations

import os
import sys

ORT_VARIABLE = "ORT_DISABLE_TELEMETRY"
# By default huggingface_hub tells the Hub in each request which libraries use it, and transformers asks the container's
# host for more details. RewardRT only requests from the Hub what the user names by `hf://`.
_VARIABLES = (ORT_VARIABLE, "HF_HUB_DISABLE_TELEMETRY")


def _switch_off() -> bool:
    """Set the variables that the user has not set; return whether it was too late to do so for onnxruntime."""
    late = "onnxruntime" in sys.modules and not _means_off(os.environ.get(ORT_VARIABLE, ""))
    for name in _VARIABLES:
        if not os.environ.get(name, "").strip():  # an empty variable counts as not set
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
