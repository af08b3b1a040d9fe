"""Processes that hold a model each and answer lines of JSON.

What is measured of one model then holds for it alone: its peak of memory is its own. The lines say nothing of what the
model is, so the repository's benchmarks put other systems behind the same ones.

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

Outputs = list[list[float]]  # of each text the graph's outputs, raw: the reward first


@dataclass(frozen=True)
class Timed:
    """One answer of a worker: the raw outputs of each text, and the seconds from token ids to rewards."""

    outputs: Outputs
    seconds: float


class Worker:
    """A process that holds one model. It is started at once, and waited for where it is first asked something."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        # A session of its own: Ctrl+C is for whoever started it, who ends it.
        self._process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=environment,
            start_new_session=True,
        )  # fmt: skip
        self.loaded: dict[str, Any] | None = None

    def wait(self) -> dict[str, Any]:
        """Wait until the model is loaded; returns what the worker says of it. Raises WorkerError."""
        if self.loaded is None:
            self.loaded = self._read()
        return self.loaded

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request and return its answer. Raises WorkerError."""
        self.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what it died of is in what follows
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._read()

    def score(self, texts: Sequence[EncodedText], **options: str | int) -> Timed:
        """Score texts once; what the options of a request are is the worker's business. Raises WorkerError."""
        answer = self.ask({"texts": [text_to_json(text) for text in texts], **options})
        return Timed([[float(value) for value in values] for values in answer["outputs"]], float(answer["seconds"]))

    def peak_bytes(self) -> int | None:
        """Return the most memory that was resident since the model was loaded; None where the system does not tell."""
        peak = self.ask({"memory": True})["peak_bytes"]
        return None if peak is None else int(peak)

    def kill(self) -> None:
        """Let the process not finish what it is at; `close` follows."""
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
            if line.startswith("{"):  # libraries print to the standard output too
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
    """Be a worker: load a model, say so, and answer requests until there are no more.

    `load` returns what to say of the model, and the function that answers a request; an exception of it is an answer.
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
    """Return what a request says of a text."""
    ids, positions = text.ids.tolist(), text.positions.tolist()
    return {"ids": ids, "positions": positions} | (
        {} if text.type_ids is None else {"type_ids": text.type_ids.tolist()}
    )


def text_from_json(data: dict[str, Any]) -> EncodedText:
    """Return the text that a request holds."""

    def array(values: list[int]) -> npt.NDArray[np.int64]:
        return np.array(values, dtype=np.int64)

    type_ids = array(data["type_ids"]) if "type_ids" in data else None
    return EncodedText(array(data["ids"]), 0, array(data["positions"]), type_ids)


def _status_bytes(field: str) -> int | None:
    """Return a size out of Linux's account of this process: VmRSS is resident now, VmHWM the most that was."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:")), None)


def _forget_peak() -> None:
    """Start VmHWM anew from what is resident now, so that what loading took for a moment is not in it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
