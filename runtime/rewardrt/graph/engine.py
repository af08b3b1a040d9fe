"""Run a graph on TensorRT: build it into an engine once per machine, then open it from the cache.

Progress is logged as `rewardrt.engine`, because building the engine of a large model takes minutes.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewardrt.errors import ProviderError
from rewardrt.graph.shapes import Profile
from rewardrt.machine.engine_cache import RUNTIME, CacheError, Entry, Key
from rewardrt.machine.providers import Way, compile_graph, one_line, open_session, way_of, what_runs

LOG = logging.getLogger("rewardrt.engine")
ENGINE = "engine.onnx"  # written by a plug-in: a graph of one node that refers to the engine's file
Model = bytes | str

# For each way to TensorRT, the provider options for the smallest, the optimal and the largest shapes.
_PROFILES: dict[Way, tuple[str, str, str]] = {
    "tensorrt": ("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes"),
    "tensorrt-rtx": ("nv_profile_min_shapes", "nv_profile_opt_shapes", "nv_profile_max_shapes"),
}


@dataclass(frozen=True)
class EngineRequest:
    """What an engine is built for; `identity` is the hash of graph and weights, `profile` the range of shapes."""

    identity: str
    profile: Profile
    taps: int = 0  # columns of the input `positions`; 0: the graph has no such input
    type_ids: bool = False  # whether the graph has the input `token_type_ids`

    def shapes(self, rows: int, tokens: int) -> str:
        """Return the shapes of all inputs in the format of the provider's options."""
        shapes = {"input_ids": f"{rows}x{tokens}", "lengths": f"{rows}"}
        shapes |= {"token_type_ids": f"{rows}x{tokens}"} if self.type_ids else {}
        shapes |= {"positions": f"{rows}x{self.taps}"} if self.taps else {}
        return ",".join(f"{name}:{shape}" for name, shape in shapes.items())

    def settings(self, way: Way, folder: Path | None) -> dict[str, str]:
        """Return the provider's options; `folder` is the engine's folder, None if nothing is to be cached."""
        sizes = (1, 1), self.profile.best, (self.profile.rows, self.profile.tokens)
        found = {name: self.shapes(*size) for name, size in zip(_PROFILES[way], sizes, strict=True)}
        if way == "tensorrt":
            found["trt_fp16_enable"] = "1"
            if folder is not None:
                kept = ("trt_engine_cache", "trt_timing_cache")
                found |= {f"{name}_enable": "1" for name in kept} | {f"{name}_path": str(folder) for name in kept}
        elif folder is not None:
            found["nv_runtime_cache_path"] = str(folder / RUNTIME)
        return found

    def key(self) -> Key:
        """Return everything that the engine depends on, including this machine."""
        made_for = what_runs("tensorrt") | {"identity": self.identity, "shapes": self.shapes(*self._most)}
        return Key(tuple(sorted(made_for.items())))

    @property
    def _most(self) -> tuple[int, int]:
        return self.profile.rows, self.profile.tokens


def open_engine(model: Model, request: EngineRequest, options: Callable[[], Any]) -> tuple[Any, str | None]:
    """Open a graph on TensorRT, from the cache or by building its engine.

    `options` returns new session options for each use. Returns the session, and None or the reason why its engine could
    not be cached. Raises ProviderError, and what onnxruntime raises.
    """
    key, way = request.key(), way_of("tensorrt")
    entry = Entry.of(key)

    def build(folder: Path) -> None:
        LOG.info("building the engine: %s", request.profile.describe())
        start = time.perf_counter()
        if way == "tensorrt":
            open_session(model, "tensorrt", options(), request.settings(way, folder))  # writes into the folder
        else:
            compile_graph(model, "tensorrt", options(), request.settings(way, None), folder / ENGINE)
        LOG.info("built in %.1f s", time.perf_counter() - start)

    try:
        for attempt in (1, 2):
            entry.obtain(key, build, LOG.info)
            settings = request.settings(way, entry.folder)
            kept = model if way == "tensorrt" else str(entry.folder / ENGINE)
            try:
                return open_session(kept, "tensorrt", options(), settings), None
            except Exception as error:
                if attempt == 2:
                    raise
                LOG.info("%s: does not open (%s); the engine is built anew", entry.folder, one_line(error))
                shutil.rmtree(entry.folder, ignore_errors=True)
        raise AssertionError("not reached")
    except CacheError as error:
        LOG.info("%s", error)
        return open_session(model, "tensorrt", options(), request.settings(way, None)), str(error)


def refusal(error: Exception) -> ProviderError:
    """Return the error for a graph that TensorRT cannot run whole, given what onnxruntime raised."""
    return ProviderError(
        f"TensorRT does not take the whole graph ({one_line(error)}); export with `--precision tensorrt`, "
        "or score with provider 'cuda'"
    )
