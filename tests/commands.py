"""Run the `rewardrt` command as a user does: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys


def run(*arguments: object, stdin: bytes | None = None, columns: int = 100) -> subprocess.CompletedProcess[str]:
    """Return what the command printed, and its exit status."""
    command = [sys.executable, "-c", "from rewardrt.cli.app import main; main()", *map(str, arguments)]
    environment = os.environ | {"PYTHONUTF8": "1", "COLUMNS": str(columns)}
    done = subprocess.run(command, input=stdin or b"", capture_output=True, check=False, env=environment, timeout=150)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())
