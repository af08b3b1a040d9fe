"""Run `rewardrt serve` as its users do: in a process of its own, on a free port."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import httpx


@dataclass
class Running:
    """A server that answers at `url`; `log` are the lines that it wrote so far."""

    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)
    url: str = ""

    def wait_for(self, text: str, seconds: float = 10.0) -> str:
        """Return the first line of the log that holds this text; lines are written a little after the answer."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for line in list(self.log):
                if text in line:
                    return line
            time.sleep(0.01)
        raise AssertionError(f"no line of the log has {text!r}: {self.log}")

    def stop(self, sig: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(sig)
        return self.process.wait(timeout=30)


@contextmanager
def serving(
    *arguments: object, port: int = 0, limit: Callable[[], None] | None = None, **variables: str
) -> Iterator[Running]:
    """Serve until the block ends; `limit` is called in the new process, `variables` are of its environment."""
    # Under nohup SIGHUP is ignored, and a server that is started so survives it: not what is tested.
    hangup = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)"
    command = [sys.executable, "-c", f"{hangup}; from rewardrt.cli.app import main; main()", "serve"]
    environment = os.environ | {"PYTHONUTF8": "1"}
    environment.pop("REWARDRT_API_KEY", None)
    process = subprocess.Popen(
        [*command, *map(str, arguments), "--port", str(port)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment | variables,
        preexec_fn=limit,  # noqa: PLW1509 - set limits before there are threads
    )
    running = Running(process)
    reader = threading.Thread(target=_read, args=(running,), daemon=True)
    reader.start()
    try:
        _wait(running)
        yield running
    finally:
        if process.poll() is None and "COVERAGE_PROCESS_CONFIG" in os.environ:
            process.terminate()  # coverage writes what it saw at an orderly end
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
        if process.poll() is None:
            process.kill()
        process.wait(30)
        reader.join(30)
        assert process.stderr is not None
        process.stderr.close()


def _read(running: Running) -> None:
    assert running.process.stderr is not None
    for line in running.process.stderr:
        running.log.append(line.rstrip("\n"))
        if line.startswith("serving "):
            running.url = line.split(" at ")[1].split()[0]


def _wait(running: Running) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and running.process.poll() is None:
        if running.url and httpx.get(f"{running.url}/ready").status_code == 200:
            return
        time.sleep(0.02)
    raise AssertionError(f"the server did not start: {running.log}")
