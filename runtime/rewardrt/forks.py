"""What has to be put right in a process that was just forked: locks that nobody holds, threads that are not there."""

from __future__ import annotations

import os
from collections.abc import Callable


def after_fork(call: Callable[[], object]) -> None:
    """Have something called first thing in every process that is forked from this one; on Windows none is."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=call)
