"""The lines of JSON that `rewardrt.workers` speaks, for a system that lives where rewardrt is not installed.

A request names texts and the loop over them; a loop makes batches, and only the batches are the peer's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

# Before a peer imports its libraries: a measurement sends nothing, as where rewardrt is installed.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

CHUNK = 8
BUDGET = 16_384  # tokens of a batch, padding included, as rewardrt takes them on an accelerator

Ids = list[int]
Batch = Callable[[np.ndarray, np.ndarray], Any]  # padded ids and mask, int64 [texts, tokens] -> rewards [texts]


def serve(load: Callable[[], tuple[dict[str, Any], Batch]], *, left: bool = False, pad: int) -> None:
    """Load a model and answer requests; `left` is the side of the padding, `pad` the id that fills it."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        loaded, batch = load()
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        return
    say(loaded | {"loaded_bytes": _status_bytes("VmRSS")})
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "memory" in request:
                say({"peak_bytes": _status_bytes("VmHWM")})
                continue
            texts = [text["ids"][: max(text["positions"]) + 1] for text in request["texts"]]
            start = time.perf_counter()
            rewards = [float("nan")] * len(texts)
            for part in chunks([len(ids) for ids in texts], request.get("loop", "single")):
                for index, reward in zip(part, batch(*padded([texts[i] for i in part], left, pad)), strict=True):
                    rewards[index] = float(reward)
            say({"outputs": [[reward] for reward in rewards], "seconds": time.perf_counter() - start})
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})


def chunks(lengths: list[int], loop: str) -> Iterator[list[int]]:
    """Yield the indices of each batch.

    `file` is chunks in file order, `sorted` in order of length, `single` of one; `budget` is as many of similar length
    as BUDGET allows.
    """
    order = list(range(len(lengths)))
    if loop in ("sorted", "budget"):
        order.sort(key=lambda index: lengths[index])
    if loop == "budget":
        start = 0
        for end in range(1, len(order) + 1):
            if end == len(order) or (end + 1 - start) * lengths[order[end]] > BUDGET:
                yield order[start:end]
                start = end
        return
    size = 1 if loop == "single" else CHUNK
    for start in range(0, len(order), size):
        yield order[start : start + size]


def padded(texts: list[Ids], left: bool, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and mask of a batch."""
    width = max(map(len, texts))
    ids = np.full((len(texts), width), pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        where = slice(width - len(text), width) if left else slice(0, len(text))
        ids[row, where] = text
        mask[row, where] = 1
    return ids, mask


def pad_of(checkpoint: str) -> int:
    """Return the padding id of a checkpoint's config."""
    return int(json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8"))["pad_token_id"])


def _status_bytes(field: str) -> int | None:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:")), None)
