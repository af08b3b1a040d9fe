"""Worker processes that each hold one model and answer requests as lines of JSON.

What is measured in a worker, such as its peak memory, then belongs to one model only. The protocol says nothing about
the model, so the repository's benchmarks use it for other systems too.

    {"texts": [{"ids": [...], "positions": [...]}, ...]}   -> {"outputs": [[...], ...], "seconds": ...}
    ... with "callers": n                                  -> the same, scored by n threads at once
    {"memory": true}                                       -> {"peak_bytes": ...}
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from rewardrt.errors import WorkerError
from rewardrt.text.tokens import EncodedText

Outputs = list[list[float]]  # the graph's raw outputs for each text; the first one is the reward


@dataclass(frozen=True)
class Timed:
    """One answer of a worker: the raw outputs of each text, and the seconds from token ids to rewards."""

    outputs: Outputs
    seconds: float


class Worker:
    """A process that holds one model. It starts at once; the first request waits until the model is loaded."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        # In a session of its own, so that Ctrl+C only reaches the parent, which ends the worker.
        self._process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=environment,
            start_new_session=True,
        )  # fmt: skip
        self.loaded: dict[str, Any] | None = None

    def wait(self) -> dict[str, Any]:
        """Wait until the model is loaded; return the worker's description of it. Raises WorkerError."""
        if self.loaded is None:
            self.loaded = self._read()
        return self.loaded

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request and return its answer. Raises WorkerError."""
        self.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the worker died; _read reports why
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._read()

    def score(self, texts: Sequence[EncodedText], **options: str | int) -> Timed:
        """Score texts once. `options` are added to the request, for the worker to interpret. Raises WorkerError."""
        answer = self.ask({"texts": [text_to_json(text) for text in texts], **options})
        return Timed([[float(value) for value in values] for values in answer["outputs"]], float(answer["seconds"]))

    def peak_bytes(self) -> int | None:
        """Return the peak resident memory in bytes since the model was loaded; None if the system does not tell."""
        peak = self.ask({"memory": True})["peak_bytes"]
        return None if peak is None else int(peak)

    def kill(self) -> None:
        """Kill the process at once; call `close` afterwards."""
        self._process.kill()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries may print other lines to standard output
                answer: dict[str, Any] = json.loads(line)
                if "error" in answer:
                    raise WorkerError(f"{self.name}: {answer['error']}")
                return answer
        raise WorkerError(f"{self.name}: its process ended with exit status {self._process.wait()}")


def serve(
    load: Callable[[], tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]],
    requests: TextIO = sys.stdin,
    answers: TextIO = sys.stdout,
) -> None:
    """Run a worker: load a model, report it, and answer requests until the input ends.

    `load` returns a description of the model and the function that answers a request. Exceptions are sent as answers.
    """

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        loaded, answer = load()
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        return
    say(loaded | {"loaded_bytes": _status_bytes("VmRSS")})
    _forget_peak()
    for line in requests:
        request = json.loads(line)
        try:
            say({"peak_bytes": _status_bytes("VmHWM")} if "memory" in request else answer(request))
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})


def text_to_json(text: EncodedText) -> dict[str, Any]:
    """Return a text as a request contains it."""
    ids, positions = text.ids.tolist(), text.positions.tolist()
    return {"ids": ids, "positions": positions} | (
        {} if text.type_ids is None else {"type_ids": text.type_ids.tolist()}
    )


def text_from_json(data: dict[str, Any]) -> EncodedText:
    """Return the text in a request."""

    def array(values: list[int]) -> npt.NDArray[np.int64]:
        return np.array(values, dtype=np.int64)

    type_ids = array(data["type_ids"]) if "type_ids" in data else None
    return EncodedText(array(data["ids"]), 0, array(data["positions"]), type_ids)


def _status_bytes(field: str) -> int | None:
    """Return a size in bytes from /proc/self/status: VmRSS is the resident memory now, VmHWM its peak."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:")), None)


def _forget_peak() -> None:
    """Reset VmHWM to what is resident now, so that it does not include the temporary memory of loading."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
