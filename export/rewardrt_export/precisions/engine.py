"""Is a graph one that TensorRT takes whole? Its own parser and builder are asked; neither needs a GPU.

They are those of TensorRT-RTX, from two wheels of the extra `tensorrt`: the library with its parser, which the
execution provider comes with, and Python's bindings. They run in a process of their own, which may crash or take too
long without taking the export with it: `python -m rewardrt_export.precisions.engine GRAPH ROWS TOKENS`.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rewardrt.errors import ExportError
from rewardrt.graph.shapes import Profile

BINDINGS = "tensorrt_rtx_bindings"
LIBRARIES = "onnxruntime_ep_nv_tensorrt_rtx"
COMMAND = "pip install 'rewardrt[export,tensorrt]'"
SECONDS = 3600  # an engine of billions of parameters takes minutes


@dataclass(frozen=True)
class Engine:
    """What parser and builder made of a graph."""

    version: str  # of TensorRT-RTX
    layers: int  # of its network
    bytes: int
    seconds: float  # of parsing and building

    def describe(self, profile: Profile) -> str:
        """Say what was done, for the manifest."""
        return (
            f"parsed and built by TensorRT-RTX {self.version}: one engine, {self.bytes / 1e6:.1f} MB, "
            f"{profile.describe()}"
        )


def missing() -> str | None:
    """Return why no engine can be built here, or None."""
    absent = [name for name in (LIBRARIES, BINDINGS) if importlib.util.find_spec(name) is None]
    if absent:
        return f"TensorRT-RTX is not installed (no {' and '.join(absent)}): `{COMMAND}`"
    return None


def build(graph: Path, profile: Profile, *, timeout: float = SECONDS) -> Engine:
    """Parse a graph and build its engine; raises ExportError with the node and the reason where either refuses."""
    command = [sys.executable, "-m", __name__, str(graph), str(profile.rows), str(profile.tokens)]
    try:
        # The process finds modules where this one does, whatever changed sys.path.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, capture_output=True, timeout=timeout, check=False, env=environment)
    except subprocess.TimeoutExpired:
        raise ExportError(f"{graph.name}: TensorRT-RTX built no engine within {timeout:g} s; {_ADVICE}") from None
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        how = f"was ended by signal {-done.returncode}" if done.returncode < 0 else f"ended with {done.returncode}"
        said = f" ({last[0][:300]})" if last else ""
        raise ExportError(f"{graph.name}: the process of TensorRT-RTX {how}{said}; {_ADVICE}") from None
    if "refused" in answer:
        raise ExportError(f"{graph.name}: TensorRT-RTX {answer['version']} refuses it: {answer['refused']}; {_ADVICE}")
    return Engine(**answer)


_ADVICE = "export without --precision tensorrt, or report it"


def _answer(graph: str, profile: Profile) -> dict[str, Any]:
    """Parse and build in this process; return an Engine's fields, or what was `refused`."""
    version = importlib.metadata.version("tensorrt-rtx-cu13-bindings").rpartition(".")[0]
    trt, errors = _load(), []

    def note(self: Any, severity: Any, message: str) -> None:
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            errors.append(message)

    # Made here, not by a class statement: the base class is there only once the library is.
    start, log = time.perf_counter(), type("Log", (trt.ILogger,), {"log": note})()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(graph):
        found = [parser.get_error(index) for index in range(parser.num_errors)]
        nodes = [f"node {error.node_name()} ({error.node_operator()}): {_line(error.desc())}" for error in found]
        more = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
        return {"version": version, "refused": f"{nodes[0] if nodes else _line(' '.join(errors))}{more}"}
    config, shapes = builder.create_builder_config(), builder.create_optimization_profile()
    for index in range(network.num_inputs):
        value = network.get_input(index)
        ranges = (1, 1), profile.best, (profile.rows, profile.tokens)
        shapes.set_shape(value.name, *(_shape(tuple(value.shape), *sizes) for sizes in ranges))
    config.add_optimization_profile(shapes)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        reason = _line(errors[0]) if errors else "the builder gave no engine and no reason"
        return {"version": version, "refused": reason}
    return asdict(Engine(version, network.num_layers, engine.nbytes, time.perf_counter() - start))


def _load() -> Any:
    """Import the bindings, after the libraries that they would look for where the loader does."""
    found = importlib.util.find_spec(LIBRARIES)
    assert found is not None and found.origin is not None
    folder = Path(found.origin).parent
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"  # where the bindings look on Windows
    for name in ("libtensorrt_rtx", "libtensorrt_onnxparser_rtx"):
        for library in sorted(folder.glob(f"{name}.so.*"), key=lambda path: -len(path.name))[:1]:
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return importlib.import_module(f"{BINDINGS}.tensorrt_rtx")


def _shape(shape: tuple[int, ...], rows: int, tokens: int) -> tuple[int, ...]:
    """Put rows into the first axis, and tokens into another that is not fixed."""
    return tuple(size if size >= 0 else rows if axis == 0 else tokens for axis, size in enumerate(shape))


def _line(text: str) -> str:
    return " ".join(text.split())[:300]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_answer(sys.argv[1], Profile(int(sys.argv[2]), int(sys.argv[3])))) + "\n")
