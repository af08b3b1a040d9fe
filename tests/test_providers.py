"""What a broken or lesser onnxruntime installation is called, and what mends it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rewardrt.errors import ProviderError
from rewardrt.machine import plugins, providers
from rewardrt.machine.providers import (
    Selection,
    one_line,
    onnxruntime_distributions,
    select_provider,
    why_no_gpu,
    why_not,
)

RUNTIME = Path(providers.__file__).parent.parent
cpu_wheel = pytest.mark.skipif("onnxruntime" not in onnxruntime_distributions(), reason="asks what the CPU wheel does")
WORKING = """
class SessionOptions: pass
class InferenceSession:
    def __init__(self, model, options, **keywords): pass
    def get_providers(self): return ["CPUExecutionProvider"]
def get_available_providers(): return ["CPUExecutionProvider"]
"""
# `import rewardrt` would import all of the runtime; here only numpy and what is under test are to be had.
SELECT = """
import sys, types
package = types.ModuleType("rewardrt")
package.__path__ = [sys.argv[1]]
sys.modules["rewardrt"] = package
from rewardrt.errors import ProviderError
from rewardrt.machine.providers import select_provider
try:
    print(select_provider("auto"))
except ProviderError as error:
    print(error)
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site-packages folder with numpy only."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    numpy = Path(np.__file__).parent
    for name in ("numpy", "numpy.libs"):
        if (numpy.parent / name).exists():
            (folder / name).symlink_to(numpy.parent / name)
    return folder


def install(site: Path, name: str, *, folder: str = "onnxruntime", source: str | None = WORKING) -> None:
    """Write what pip would: the metadata with its list of files, and the package unless `source` is None."""
    info = site / f"{name.replace('-', '_')}-1.31.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.31.1\n")
    (info / "RECORD").write_text(f"{folder}/__init__.py,,\n{folder}/capi/_pybind_state.py,,\n")
    if source is not None:
        (site / folder).mkdir(exist_ok=True)
        (site / folder / "__init__.py").write_text(source)


def select_in(site: Path) -> str:
    """What `select_provider("auto")` says in a process that sees this folder and the standard library."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-S", "-c", SELECT, str(RUNTIME)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=site, timeout=60)
    assert done.stderr == ""
    return done.stdout.strip()


def test_one_onnxruntime_is_taken(site: Path) -> None:
    install(site, "onnxruntime")
    install(site, "onnxruntime-extensions", folder="onnxruntime_extensions")
    assert select_in(site) == "Selection(provider='cpu', note=None)"


def test_an_onnxruntime_without_metadata_is_taken(site: Path) -> None:
    (site / "onnxruntime").mkdir()
    (site / "onnxruntime" / "__init__.py").write_text(WORKING)
    assert select_in(site) == "Selection(provider='cpu', note=None)"


@pytest.mark.parametrize(
    ("version", "taken"), [("1.23.0", False), ("1.23.2", False), ("1.24.1", True), ("2.0.0", True)]
)
def test_an_onnxruntime_that_is_too_old_is_refused(site: Path, version: str, taken: bool) -> None:
    install(site, "onnxruntime", source=f"{WORKING}\n__version__ = {version!r}\n")
    refused = (
        f"onnxruntime {version} is too old; expected 1.24 or later (1.23.0 gives other rewards without a word): "
        "`pip uninstall -y onnxruntime && pip install 'rewardrt[cpu]'`"
    )
    assert select_in(site) == ("Selection(provider='cpu', note=None)" if taken else refused)


def test_no_onnxruntime_gives_the_command(site: Path) -> None:
    assert select_in(site) == "no onnxruntime is installed: `pip install 'rewardrt[cpu]'` (or `[gpu]` for CUDA)"


@pytest.mark.parametrize(
    ("other", "extra"), [("onnxruntime-gpu", "gpu"), ("onnxruntime-directml", "cpu"), ("onnxruntime-openvino", "cpu")]
)
def test_two_wheels_in_one_folder_are_refused(site: Path, other: str, extra: str) -> None:
    install(site, "onnxruntime")
    install(site, other)
    assert select_in(site) == (
        f"onnxruntime 1.31.1 and {other} 1.31.1 are installed over each other in one folder; "
        f"keep one: `pip uninstall -y onnxruntime {other} && pip install 'rewardrt[{extra}]'`"
    )


def test_the_hollow_folder_after_an_uninstall_is_named(site: Path) -> None:
    install(site, "onnxruntime-gpu", source=None)
    (site / "onnxruntime" / "capi").mkdir(parents=True)  # a namespace package: the import succeeds
    assert select_in(site) == (
        "onnxruntime-gpu 1.31.1 is installed, but its folder is hollow, what an uninstall left behind: "
        "`pip uninstall -y onnxruntime-gpu && pip install 'rewardrt[gpu]'`"
    )


def test_a_hollow_folder_that_nobody_owns_is_named(site: Path) -> None:
    (site / "onnxruntime" / "capi").mkdir(parents=True)
    expected = "onnxruntime's folder is hollow, what an uninstall left behind: `pip install 'rewardrt[cpu]'`"
    assert select_in(site) == expected


def test_files_that_went_with_the_other_wheel_are_named(site: Path) -> None:
    install(site, "onnxruntime", source=None)
    assert select_in(site) == (
        "onnxruntime 1.31.1 is installed, but its files are gone: "
        "`pip uninstall -y onnxruntime && pip install 'rewardrt[cpu]'`"
    )


def test_an_import_that_fails_is_quoted(site: Path) -> None:
    install(site, "onnxruntime", source="raise ImportError('numpy.core.multiarray failed to import\\nsecond line')")
    assert select_in(site) == (
        "onnxruntime 1.31.1 does not import (ImportError: numpy.core.multiarray failed to import): "
        "`pip uninstall -y onnxruntime && pip install 'rewardrt[cpu]'`"
    )


@cpu_wheel
def test_cpu_and_auto_run_on_the_cpu_wheel() -> None:
    assert select_provider("cpu") == Selection("cpu", None)
    assert select_provider("auto") == Selection("cpu", None)
    assert why_not("cpu") is None


@cpu_wheel
@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("cuda", ": `pip uninstall -y onnxruntime && pip install 'rewardrt[gpu]'`"),
        (
            "tensorrt",
            ", and TensorRT-RTX is not installed: `pip install 'rewardrt[tensorrt]'` (or `[gpu]` and NVIDIA's TensorRT)",
        ),
    ],
)
def test_a_named_provider_that_the_wheel_lacks_is_an_error(
    monkeypatch: pytest.MonkeyPatch, name: Any, remedy: str
) -> None:
    monkeypatch.setattr(plugins, "version", lambda plugin: None)
    version = onnxruntime_distributions()["onnxruntime"]
    with pytest.raises(ProviderError) as caught:
        select_provider(name)
    assert str(caught.value) == (
        f"provider '{name}' cannot be had: onnxruntime {version} was not built with it{remedy}"
    )


def test_an_unknown_provider_is_an_error() -> None:
    with pytest.raises(ProviderError, match=r"^provider 'gpu': expected one of auto, cpu, cuda, tensorrt$"):
        select_provider("gpu")  # type: ignore[arg-type]


class Driver:
    """Stands for libcuda: `status` of cuInit, number of devices, highest CUDA version."""

    def __init__(self, status: int = 0, count: int = 1, version: int = 13000) -> None:
        self.status, self.count, self.version = status, count, version

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.count
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self.version
        return 0


def loader(driver: Driver | None, message: str | None = None) -> Callable[[str], Any]:
    """Stands for ctypes.CDLL: the driver is there or not; every other library loads, or fails with `message`."""

    def load(name: str) -> Any:
        if name == "libcuda.so.1" and driver is not None:
            return driver
        if name == "libcuda.so.1" or message is not None:
            raise OSError(message)
        return None

    return load


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (Driver(), None),
        (
            None,
            "there is no NVIDIA driver (libcuda.so.1 cannot be loaded); "
            "install it, or start the container with `--gpus all`",
        ),
        (
            Driver(status=100),
            "the NVIDIA driver shows no GPU (CUDA error 100, 0 devices); "
            "see `nvidia-smi` and the variable CUDA_VISIBLE_DEVICES",
        ),
        (
            Driver(count=0),
            "the NVIDIA driver shows no GPU (CUDA error 0, 0 devices); "
            "see `nvidia-smi` and the variable CUDA_VISIBLE_DEVICES",
        ),
        (
            Driver(version=12040),
            "the NVIDIA driver goes up to CUDA 12.4, onnxruntime was built for 13.0; update the driver",
        ),
    ],
)
def test_the_driver_is_asked_for_a_gpu(monkeypatch: pytest.MonkeyPatch, driver: Driver | None, reason: str) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", loader(driver))
    assert why_no_gpu("13.0") == reason


def fake_gpu_wheel(monkeypatch: pytest.MonkeyPatch, obtained: list[str], result: Any = None) -> list[dict[str, Any]]:
    """Let onnxruntime claim CUDA and TensorRT and give sessions on `obtained`; returns the requests it gets."""
    requests = []
    severities: list[int] = []

    class Session:
        def __init__(self, model: bytes, options: Any, **keywords: Any) -> None:
            assert severities[-1] == 4  # onnxruntime would write to stderr
            requests.append(keywords)

        def get_providers(self) -> list[str]:
            return obtained

        def run(self, names: None, feeds: dict[str, Any]) -> list[Any]:
            return [feeds["x"] @ feeds["x"] if result is None else result]

    def preload_dlls() -> None:
        print("Failed to load libcublasLt.so.13")  # noqa: T201 (onnxruntime's does)

    class Options(SimpleNamespace):
        def add_session_config_entry(self, name: str, value: str) -> None:
            assert (name, value) == plugins.WHOLE_GRAPH  # a node that TensorRT does not take is an error

    monkeypatch.setattr(plugins, "version", lambda plugin: None)
    wheel = SimpleNamespace(
        InferenceSession=Session,
        SessionOptions=Options,
        get_available_providers=lambda: list(providers.ORT_NAMES.values()),
        preload_dlls=preload_dlls,
        set_default_logger_severity=severities.append,
        cuda_version="13.0",
        __file__="/site/onnxruntime/__init__.py",
    )
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(providers, "import_onnxruntime", lambda: wheel)
    return requests


@pytest.mark.parametrize(
    ("name", "message", "reason"),
    [
        (
            "cuda",
            "libcublasLt.so.13: cannot open shared object file: No such file or directory",
            "libcublasLt.so.13 is missing, which onnxruntime needs for it: `pip install 'rewardrt[gpu]'`",
        ),
        (
            "tensorrt",
            "libnvinfer.so.10: cannot open shared object file: No such file or directory",
            "libnvinfer.so.10 is missing, which onnxruntime needs for it: `pip install 'tensorrt-cu13-libs==10.*'`",
        ),
        ("cuda", "/a.so: undefined symbol: cuInit", "its library does not load (/a.so: undefined symbol: cuInit)"),
        (
            "cuda",
            "/a.so: undefined symbol: Provider_GetHost",
            "asked for CUDAExecutionProvider, onnxruntime gave CPUExecutionProvider; its log says why",
        ),
    ],
)
def test_a_session_that_is_quietly_on_the_cpu_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: Any, message: str, reason: str
) -> None:
    fake_gpu_wheel(monkeypatch, ["CPUExecutionProvider"])
    monkeypatch.setattr(ctypes, "CDLL", loader(Driver(), message))
    with pytest.raises(ProviderError) as caught:
        select_provider(name)
    assert str(caught.value) == f"provider '{name}' cannot be had: {reason}"
    assert capfd.readouterr() == ("", "")


def test_auto_says_why_it_is_not_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu_wheel(monkeypatch, ["CPUExecutionProvider"])
    monkeypatch.setattr(ctypes, "CDLL", loader(Driver(count=0)))
    assert select_provider("auto") == Selection(
        "cpu",
        "not on cuda: the NVIDIA driver shows no GPU (CUDA error 0, 0 devices); "
        "see `nvidia-smi` and the variable CUDA_VISIBLE_DEVICES",
    )


def test_auto_takes_cuda_and_never_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = fake_gpu_wheel(monkeypatch, ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ctypes, "CDLL", loader(Driver()))
    assert select_provider("auto") == Selection("cuda", None)
    options = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
    assert requests == [{"providers": [("CUDAExecutionProvider", options)], "enable_fallback": 0}]


def test_a_provider_that_computes_wrongly_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu_wheel(monkeypatch, ["CUDAExecutionProvider", "CPUExecutionProvider"], result=np.zeros((2, 2)))
    monkeypatch.setattr(ctypes, "CDLL", loader(Driver()))
    expected = "it computed [[0.0, 0.0], [0.0, 0.0]] where [[7.0, 10.0], [15.0, 22.0]] is right"
    with pytest.raises(ProviderError, match=expected.replace("[", r"\[")):
        select_provider("cuda")


def test_messages_are_one_line_of_bounded_length() -> None:
    assert one_line(ValueError("first\nsecond")) == "first"
    assert one_line(ValueError("")) == "ValueError"
    assert one_line(ValueError("x" * 400)) == "x" * 297 + "..."
