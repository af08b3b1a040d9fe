"""Repair state in a forked process: locks copied in their locked state, and threads that do not exist there."""

from __future__ import annotations

import os
from collections.abc import Callable


def after_fork(call: Callable[[], object]) -> None:
    """Register a function that runs first in every process forked from this one; do nothing on Windows."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=call)
