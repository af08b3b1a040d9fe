"""Providers in wheels of their own: what is missing is named, and what runs, runs whole.

There is no GPU here. A driver that is compiled for the test says that there is one, and the real wheel of TensorRT-RTX
is loaded beside it. OpenVINO's plug-in, which runs on a CPU, stands for it where a session has to be opened.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plugin_wheel import compile_library, compiler, run, wheel_without, write_driver
from rewardrt.errors import ProviderError
from rewardrt.graph.engine import EngineRequest
from rewardrt.graph.session import GraphSession
from rewardrt.graph.shapes import Profile
from rewardrt.machine import plugins, providers
from rewardrt.machine.engine_cache import VARIABLE
from rewardrt.machine.gpu import Gpu
from rewardrt.machine.plugins import TENSORRT_RTX, Plugin
from test_session import build, save

needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec(TENSORRT_RTX.module) is None, reason="the wheel of the extra tensorrt is not installed"
)
needs_compiler = pytest.mark.skipif(compiler() is None, reason="there is no C compiler for a driver that is not there")
needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_ep_openvino") is None, reason="onnxruntime-ep-openvino is not installed"
)
BUNDLE = Path(__file__).parent / "bundles" / "version-1"  # whose attention OpenVINO leaves to the CPU
REASON = "from rewardrt.machine.providers import why_not_way; print(why_not_way('tensorrt-rtx'))"
DOCTOR = "import json; from rewardrt.checks.doctor import examine, format_report; print(format_report(examine()))"
# Of the driver, what TensorRT-RTX's libraries are linked with.
FUNCTIONS = """cuCtxCreate_v4 cuCtxDestroy_v2 cuCtxGetCurrent cuCtxPopCurrent_v2 cuCtxPushCurrent_v2 cuCtxSetCurrent
cuDestroyExternalMemory cuDestroyExternalSemaphore cuExternalMemoryGetMappedBuffer cuGetErrorString cuImportExternalMemory
cuImportExternalSemaphore cuSignalExternalSemaphoresAsync cuStreamGetCtx cuWaitExternalSemaphoresAsync cuFuncSetAttribute
cuGetErrorName cuLaunchKernel cuModuleGetFunction cuModuleLoadData cuModuleUnload""".split()
NVML = "nvmlErrorString nvmlInit_v2 nvmlShutdown nvmlSystemGetDriverVersion".split()


pytestmark = pytest.mark.slow  # whole libraries are loaded, in processes of their own


def reason(libraries: Path | None = None, first: Path | None = None) -> str:
    done = run(REASON, libraries, first)
    assert done.stderr == "", done.stderr
    assert done.stdout.count("\n") == 1
    return done.stdout.strip()


@needs_wheel
def test_without_a_driver_the_plug_in_says_so() -> None:
    assert reason() == (
        "there is no NVIDIA driver (libcuda.so.1 cannot be loaded); "
        "install it, or start the container with `--gpus all`"
    )


@needs_wheel
@needs_compiler
@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        (
            {"count": 0},
            "the NVIDIA driver shows no GPU (CUDA error 0, 0 devices); see `nvidia-smi` and the variable CUDA_VISIBLE_DEVICES",
        ),
        (
            {"version": 12080},
            "the NVIDIA driver goes up to CUDA 12.8, TensorRT-RTX was built for 13.0; update the driver",
        ),
        (
            {"capability": (9, 0), "name": "NVIDIA H100 80GB HBM3"},
            "TensorRT-RTX does not take NVIDIA H100 80GB HBM3 (compute capability 9.0); "
            "it takes compute capabilities 8.6, 8.9 and from 12.0 on: use provider 'cuda'",
        ),
        (
            {"capability": (7, 5), "name": "Tesla T4"},
            "TensorRT-RTX does not take Tesla T4 (compute capability 7.5); "
            "it takes compute capabilities 8.6, 8.9 and from 12.0 on: use provider 'cuda'",
        ),
        # The driver's other library: the real wheel asks for it.
        (
            {"functions": tuple(FUNCTIONS)},
            "libnvidia-ml.so.1 is missing, which comes with the NVIDIA driver; "
            "install it, or start the container with `--gpus all`",
        ),
    ],
    ids=["no GPU", "an old driver", "an H100", "a GPU too old", "half a driver"],
)
def test_what_stands_against_the_plug_in_is_named(tmp_path: Path, driver: Any, expected: str) -> None:
    write_driver(tmp_path / "driver", **driver)
    assert reason(tmp_path / "driver") == expected


def write_whole_driver(folder: Path) -> None:
    write_driver(folder, functions=tuple(FUNCTIONS))
    compile_library(folder / "libnvidia-ml.so.1", "".join(f"int {name}(void) {{ return 999; }}\n" for name in NVML))


@needs_wheel
@needs_compiler
def test_the_real_library_loads_beside_a_driver_and_its_own_cudart_and_offers_no_device(tmp_path: Path) -> None:
    """The wheel's own import leaves libcudart to the system's CUDA toolkit, which the extra does not ask for."""
    write_whole_driver(tmp_path / "driver")
    maps = "; print({l.split()[-1] for l in open('/proc/self/maps') if 'libcudart' in l})"
    done = run(REASON + maps, tmp_path / "driver")
    first, second = done.stdout.splitlines()
    assert first == "TensorRT-RTX offers no device on this machine; `rewardrt doctor` shows the GPU"
    assert second.count("libcudart") == 1 and f"{TENSORRT_RTX.module}/libcudart.so" in second


@needs_wheel
@needs_compiler
@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("libtensorrt_rtx.so*", "libtensorrt_rtx.so.1 is missing, which TensorRT-RTX needs: "),
        ("libtensorrt_onnxparser_rtx.so*", "libtensorrt_onnxparser_rtx.so.1 is missing, which TensorRT-RTX needs: "),
        ("libonnxruntime_providers_nv*", "TensorRT-RTX does not load (No EP library found next to this package"),
    ],
)
def test_each_library_of_the_wheel_that_is_missing_is_named(tmp_path: Path, pattern: str, expected: str) -> None:
    write_whole_driver(tmp_path / "driver")
    first = wheel_without(tmp_path / "site", TENSORRT_RTX.module, pattern)
    found = run(REASON, tmp_path / "driver", first).stdout.strip()
    assert found.startswith(expected)
    assert found.endswith("`pip install --force-reinstall onnxruntime-ep-nv-tensorrt-rtx-cu13`")
    assert "\n" not in found


@needs_wheel
@needs_compiler
def test_doctor_names_each_way_to_tensorrt_and_the_gpu(tmp_path: Path) -> None:
    write_driver(tmp_path / "driver", capability=(9, 0), name="NVIDIA H200")
    rows = dict(
        line.split(maxsplit=1) for line in run(DOCTOR, tmp_path / "driver").stdout.splitlines() if "gpu " in line
    )
    assert rows["gpu"] == "NVIDIA H200 (compute capability 9.0), CUDA 13.0"
    shown = run(DOCTOR, tmp_path / "driver").stdout
    assert "by the classic provider" in shown and "was not built with it" in shown
    assert "by the plug-in" in shown and "1.7.1, no: TensorRT-RTX does not take NVIDIA H200" in shown


def test_a_wheel_that_is_not_installed_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "version", lambda plugin: None)
    assert providers.why_not_way("tensorrt-rtx") == "it is not installed: `pip install 'rewardrt[tensorrt]'`"
    with pytest.raises(ProviderError, match=r"^TensorRT-RTX is not installed: `pip install 'rewardrt\[tensorrt\]'`$"):
        plugins.register(providers.import_onnxruntime(), TENSORRT_RTX)


@pytest.mark.parametrize(
    ("capability", "taken"),
    [
        ((7, 5), False),
        ((8, 0), False),
        ((8, 6), True),
        ((8, 9), True),
        ((9, 0), False),
        ((10, 0), False),
        ((12, 1), True),
    ],
)
def test_gpus_are_taken_as_the_wheels_header_says(capability: tuple[int, int], taken: bool) -> None:
    assert TENSORRT_RTX.takes(capability) is taken


OPENVINO = Plugin(
    name="openvino",
    title="OpenVINO",
    distribution="onnxruntime-ep-openvino",
    module="onnxruntime_ep_openvino",
    ep="OpenVINOExecutionProvider",
    extra="openvino",
    library="libopenvino.so.*",
    newest=(0, 0),
)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """OpenVINO's plug-in in the place of TensorRT's, and a cache of its own; returns the cache."""
    monkeypatch.setitem(providers._PLUGINS, "tensorrt-rtx", OPENVINO)
    monkeypatch.setattr(providers, "find_gpu", lambda: Gpu("a stand-in", (8, 9), "13.0"))
    monkeypatch.setattr(providers, "why_no_gpu", lambda *_: None)
    monkeypatch.setattr(EngineRequest, "settings", lambda *_: {})
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    yield tmp_path / "cache"
    providers._working.clear()


REQUEST = EngineRequest("abc", Profile(8, 64))
IDS, LENGTHS = np.array([[3, 3], [1, 2]]), np.array([2, 1])


def open_stand_in(folder: Path) -> GraphSession:
    return GraphSession.open(save(folder, build(layers=0)), "tensorrt", engine=REQUEST)


@needs_openvino
def test_a_plug_in_runs_a_graph_whole_from_an_engine_that_is_built_once(
    stand_in: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rewardrt.engine")
    for built in (1, 1):
        session = open_stand_in(tmp_path)
        assert session.run(IDS, LENGTHS).tolist() == [[200.0], [1.0]]
        assert (session.provider, session.note, session.profile) == ("tensorrt", None, Profile(8, 64))
        assert session.runs_on.startswith("tensorrt-rtx ") and session.runs_on.endswith(" on a stand-in")
        assert sum("built in" in line for line in caplog.messages) == built
    (entry,) = (path for path in stand_in.iterdir() if path.is_dir())
    assert json.loads((entry / "contents.json").read_text())["made_for"]["gpu"] == "a stand-in (compute capability 8.9)"


@needs_openvino
@pytest.mark.parametrize("damage", ["a changed file", "another engine under its name"])
def test_an_engine_that_is_damaged_is_built_anew_to_the_same_rewards(
    stand_in: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    open_stand_in(tmp_path)
    (entry,) = (path for path in stand_in.iterdir() if path.is_dir())
    (entry / "engine.onnx").write_bytes(b"no graph")
    if damage == "another engine under its name":  # its hash is as listed: only opening it tells
        contents = json.loads((entry / "contents.json").read_text())
        contents["files"] = {"engine.onnx": "be9b7f3d5f6d6dbc4f8e5b0f7ad0e9b7"}
        from hashlib import sha256

        contents["files"]["engine.onnx"] = sha256(b"no graph").hexdigest()
        (entry / "contents.json").write_text(json.dumps(contents))
    caplog.set_level(logging.INFO, "rewardrt.engine")
    assert open_stand_in(tmp_path).run(IDS, LENGTHS).tolist() == [[200.0], [1.0]]
    assert any("the engine is built anew" in line for line in caplog.messages)


@needs_openvino
def test_where_engines_cannot_be_kept_the_graph_runs_and_says_why(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "/proc/nowhere")
    session = open_stand_in(tmp_path)
    assert session.run(IDS, LENGTHS).tolist() == [[200.0], [1.0]]
    assert session.note is not None and session.note.startswith("/proc/nowhere: engines cannot be kept there (")


@needs_openvino
def test_a_graph_that_a_plug_in_takes_in_part_is_refused(stand_in: Path) -> None:
    with pytest.raises(
        ProviderError, match=r"TensorRT does not take the whole graph .* export with `--precision tensorrt`"
    ):
        GraphSession.open(BUNDLE / "model.onnx", "tensorrt", engine=REQUEST)
    assert not [path for path in stand_in.iterdir() if path.is_dir()]


def test_a_variable_leaves_one_way_to_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "why_not_way", lambda way: f"no {way}")
    assert providers.why_not("tensorrt") is not None
    for way in providers.WAYS_TO_TENSORRT:
        monkeypatch.setenv("REWARDRT_TENSORRT", way)
        assert providers.why_not("tensorrt") == f"no {way}"
    monkeypatch.setenv("REWARDRT_TENSORRT", "fast")
    with pytest.raises(ProviderError, match=r"^REWARDRT_TENSORRT=fast: expected tensorrt or tensorrt-rtx$"):
        providers.why_not("tensorrt")
