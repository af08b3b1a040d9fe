"""Choose the execution provider that runs the graph; for each one that does not work here, say why.

Only this module imports onnxruntime. onnxruntime rarely raises when a provider does not work: it logs a line and
returns a session on the CPU. So every provider except the CPU is tried on a graph of one node, and the session is
checked for the provider that it really uses.

TensorRT can be reached in two ways: by the classic provider, which is built into onnxruntime-gpu and needs NVIDIA's
libraries as well, or by a plug-in (see `plugins`).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import io
import os
import re
import sys
import typing
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from rewardrt import telemetry
from rewardrt.errors import ProviderError
from rewardrt.machine import plugins
from rewardrt.machine.gpu import find_gpu
from rewardrt.machine.plugins import TENSORRT_RTX, Plugin

Provider = Literal["cpu", "cuda", "tensorrt"]
ProviderChoice = Literal["auto", "cpu", "cuda", "tensorrt"]
PROVIDERS: tuple[Provider, ...] = typing.get_args(Provider)
PROVIDER_CHOICES: tuple[ProviderChoice, ...] = typing.get_args(ProviderChoice)

# onnxruntime's names of the providers.
ORT_NAMES: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}

# The providers and settings that a session requests, best first. onnxruntime adds the CPU for nodes that the others
# have no kernel for. TF32 is switched off because it keeps only 10 bits of the mantissa, and a float32 graph should
# give float32 rewards. By default the arena doubles its size each time it grows, and never shrinks.
_CUDA = (ORT_NAMES["cuda"], {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"})
_REQUESTS: dict[Provider, list[tuple[str, dict[str, str]]]] = {
    "cpu": [(ORT_NAMES["cpu"], {})],
    "cuda": [_CUDA],
    "tensorrt": [(ORT_NAMES["tensorrt"], {})],  # the whole graph: no fallback to CUDA or the CPU for some nodes
}

Way = Literal["cpu", "cuda", "tensorrt", "tensorrt-rtx"]  # the implementation; tensorrt: the classic one
WAYS: tuple[Way, ...] = typing.get_args(Way)
WAYS_TO_TENSORRT: tuple[Way, ...] = ("tensorrt", "tensorrt-rtx")  # in order of preference
WAY_VARIABLE = "REWARDRT_TENSORRT"  # environment variable that selects one of them
_PLUGINS: dict[Way, Plugin] = {"tensorrt-rtx": TENSORRT_RTX}

# 1.23.0 computes attention wrongly (the 135M model gave a text 0.27 instead of -0.67), and no version before 1.24
# supports block quantization, which int8 graphs use where RewardRT's own kernels are missing.
OLDEST = (1, 24)

# An ONNX model, y = x @ x for x float32 [2, 2]: IR version 8, opset 13.
_PROBE_MODEL = bytes.fromhex(
    "08083a400a110a01780a017812017922064d61744d756c1201675a130a0178120e0a0c08011208"
    "0a0208020a02080262130a0179120e0a0c080112080a0208020a02080242040a00100d"
)
_PROBE_INPUT = np.array([[1, 2], [3, 4]], dtype=np.float32)
_PROBE_OUTPUT = np.array([[7, 10], [15, 22]], dtype=np.float32)


@dataclass(frozen=True)
class Selection:
    """The provider to run on, and why it is not a better one; the note is None if no better one was to be expected."""

    provider: Provider
    note: str | None


def select_provider(choice: ProviderChoice) -> Selection:
    """Return a provider that was just tested on this machine, given the caller's choice.

    "auto" means CUDA if it starts, else the CPU, with a note if this onnxruntime was built for CUDA. "auto" never
    selects TensorRT, which spends minutes on building engines: a caller that knows of a cached engine names it.

    Raises ProviderError, with the reason and the fix, if a named provider does not work.
    """
    if choice not in PROVIDER_CHOICES:
        raise ProviderError(f"provider {choice!r}: expected one of {', '.join(PROVIDER_CHOICES)}")
    ort = import_onnxruntime()
    if choice == "auto":
        if ORT_NAMES["cuda"] not in ort.get_available_providers():
            idle = plugins.version(TENSORRT_RTX) is not None and _why_not_plugin(TENSORRT_RTX) is None
            return Selection("cpu", f"{TENSORRT_RTX.title} is here: name provider 'tensorrt'" if idle else None)
        reason = why_not("cuda")
        return Selection("cuda", None) if reason is None else Selection("cpu", f"not on cuda: {reason}")
    if choice != "cpu" and (reason := why_not(choice)) is not None:
        raise ProviderError(f"provider {choice!r} cannot be had: {reason}")
    return Selection(choice, None)


def why_not(provider: Provider) -> str | None:
    """Try a provider on a graph of one node; return None if it ran there, else the reason and the fix.

    For TensorRT, try every way until one runs.
    """
    if provider != "tensorrt":
        return why_not_way(provider)
    reasons = {}
    for way in _wanted_ways():
        if (reason := why_not_way(way)) is None:
            return None
        reasons[way] = reason
    if len(reasons) == 1:
        return next(iter(reasons.values()))
    import_onnxruntime()
    if plugins.version(TENSORRT_RTX) is None and ORT_NAMES["tensorrt"] not in _available():
        if (nowhere := plugins.why_not_here()) is not None:
            return f"{_installed() or 'this onnxruntime'} was not built with it, and of {TENSORRT_RTX.title} {nowhere}"
        return (
            f"{_installed() or 'this onnxruntime'} was not built with it, and {TENSORRT_RTX.title} is not installed: "
            f"`{TENSORRT_RTX.install_command}` (or `[gpu]` and NVIDIA's TensorRT)"
        )
    if plugins.version(TENSORRT_RTX) is None:
        return reasons["tensorrt"]
    if ORT_NAMES["tensorrt"] not in _available():
        return reasons["tensorrt-rtx"]
    return f"{reasons['tensorrt']}; nor by {TENSORRT_RTX.title}: {reasons['tensorrt-rtx']}"


def _wanted_ways() -> tuple[Way, ...]:
    """Return the ways to TensorRT that may be used: all of them, or the one that the environment variable selects."""
    named = os.environ.get(WAY_VARIABLE)
    if named is None:
        return WAYS_TO_TENSORRT
    found = tuple(way for way in WAYS_TO_TENSORRT if way == named)
    if not found:
        raise ProviderError(f"{WAY_VARIABLE}={named}: expected {' or '.join(WAYS_TO_TENSORRT)}")
    return found


def way_of(provider: Provider) -> Way:
    """Return the implementation that runs a provider which `select_provider` returned."""
    if provider != "tensorrt":
        return provider
    return next((way for way in _wanted_ways() if why_not_way(way) is None), "tensorrt")


def describe(provider: Provider) -> str:
    """Describe for people what runs, for example "tensorrt-rtx 1.7.1 on NVIDIA ..."."""
    if provider != "tensorrt":
        return provider
    way, gpu = way_of(provider), find_gpu()
    return f"{way} {way_version(way) or ''}".strip() + (f" on {gpu.name}" if gpu is not None else "")


def way_version(way: Way) -> str | None:
    """Return the version of the library behind a way, or None if it is not installed."""
    if way in _PLUGINS:
        return plugins.version(_PLUGINS[way])
    if way == "tensorrt":
        return _classic_version()
    cuda: str | None = getattr(import_onnxruntime(), "cuda_version", None) if way == "cuda" else None
    return cuda or None


def what_runs(provider: Provider) -> dict[str, str]:
    """Return what an engine depends on besides its graph: the way, versions, GPU and driver, as text by name."""
    way, gpu = way_of(provider), find_gpu()
    return {
        "way": way,
        "version": way_version(way) or "",
        "onnxruntime": import_onnxruntime().__version__,
        "gpu": str(gpu),
        "driver": gpu.cuda if gpu is not None else "",
    }


_working: set[Way] = set()  # ways to TensorRT that ran once in this process; building the probe's engine takes a while


def why_not_way(way: Way) -> str | None:
    """Try one way on a graph of one node; return None if it ran there, else the reason and the fix."""
    if way in _working:
        return None
    reason = _why_not_plugin(_PLUGINS[way]) if way in _PLUGINS else _why_not_built_in(way)
    reason = reason or _why_not_a_node(way)
    if reason is None and way in WAYS_TO_TENSORRT:
        _working.add(way)
    return reason


def _why_not_built_in(way: Way) -> str | None:
    ort = import_onnxruntime()
    if ORT_NAMES[typing.cast(Provider, way)] not in _available():
        return f"{_installed() or 'this onnxruntime'} was not built with it: `{reinstall_command('gpu')}`"
    return why_no_gpu(getattr(ort, "cuda_version", None)) if way != "cpu" else None


def _why_not_plugin(plugin: Plugin) -> str | None:
    ort = import_onnxruntime()
    if (nowhere := plugins.why_not_here()) is not None:
        return nowhere
    if plugins.version(plugin) is None:
        return f"it is not installed: `{plugin.install_command}`"
    if (reason := why_no_gpu(plugin.cuda, plugin.title)) is not None:
        return reason
    gpu = find_gpu()
    if gpu is not None and not plugin.takes(gpu.capability):
        known = ", ".join(f"{major}.{minor}" for major, minor in plugin.capabilities)
        newest = "" if plugin.newest is None else f" and from {plugin.newest[0]}.{plugin.newest[1]} on"
        return f"{plugin.title} does not take {gpu}; it takes compute capabilities {known}{newest}: use provider 'cuda'"
    try:
        plugins.devices(ort, plugin)
    except ProviderError as error:
        return str(error)
    return None


def _why_not_a_node(way: Way) -> str | None:
    ort, mending = import_onnxruntime(), _PLUGINS[way].install_command if way in _PLUGINS else reinstall_command("gpu")
    try:
        session = _open(_PROBE_MODEL, way, quiet_options(ort), {})
        (result,) = session.run(None, {"x": _PROBE_INPUT})
    except ProviderError as error:
        return str(error)
    except Exception as error:  # onnxruntime's exceptions share no base class
        return f"it failed on a graph of one node ({one_line(error)}): `{mending}`"
    if not np.array_equal(result, _PROBE_OUTPUT):
        return (
            f"it computed {result.tolist()} where {_PROBE_OUTPUT.tolist()} is right; update the driver or leave it out"
        )
    return None


def open_session(
    model: bytes | str, provider: Provider, options: Any, settings: Mapping[str, str] | None = None
) -> Any:
    """Create an `onnxruntime.InferenceSession` and check that it really runs on `provider`.

    `settings` are provider options under the provider's own names. Raises ProviderError if the session runs elsewhere,
    and whatever onnxruntime raises if the model is at fault.
    """
    return _open(model, way_of(provider), options, settings or {})


def compile_graph(model: bytes | str, provider: Provider, options: Any, settings: Mapping[str, str], to: Path) -> None:
    """Have a plug-in compile the graph into an engine and write it to the file `to`. Raises as `open_session` does."""
    ort, way = import_onnxruntime(), way_of(provider)
    plugins.add_provider(ort, options, _PLUGINS[way], settings)
    ort.ModelCompiler(options, model).compile_to_file(str(to))


def _open(model: bytes | str, way: Way, options: Any, settings: Mapping[str, str]) -> Any:
    ort = import_onnxruntime()
    if way in _PLUGINS:
        plugins.add_provider(ort, options, _PLUGINS[way], settings)
        # The provider was added to the options by its devices, so `providers` is not given here.
        session = ort.InferenceSession(model, options, enable_fallback=0)
        return _checked(ort, session, way, _PLUGINS[way].ep)
    if way != "cpu":
        _preload_nvidia_libraries(ort)
        # onnxruntime logs a library that cannot be loaded to stderr, whatever the session's own options say.
        ort.set_default_logger_severity(4)
    if way == "tensorrt":
        options.add_session_config_entry(*plugins.WHOLE_GRAPH)
    provider = typing.cast(Provider, way)
    requests = [(name, own | dict(settings)) for name, own in _REQUESTS[provider]]
    try:
        # Without enable_fallback=0 onnxruntime prints to stdout, and moves to the CPU on a failure here or in run().
        session = ort.InferenceSession(model, options, providers=requests, enable_fallback=0)
    except Exception as error:
        if way != "cpu" and (reason := _missing_library(ort, provider)) is not None:
            raise ProviderError(reason) from error
        raise
    finally:
        if way != "cpu":
            ort.set_default_logger_severity(2)  # onnxruntime's default; it has no call that returns the old value
    return _checked(ort, session, way, ORT_NAMES[provider])


def _checked(ort: ModuleType, session: Any, way: Way, name: str) -> Any:
    """Return the session if it really uses the provider of this name; otherwise raise ProviderError."""
    obtained = session.get_providers()
    if obtained[0] != name:
        reason = _missing_library(ort, typing.cast(Provider, way)) if way not in _PLUGINS else None
        raise ProviderError(reason or f"asked for {name}, onnxruntime gave {', '.join(obtained)}; its log says why")
    return session


def _available() -> list[str]:
    found: list[str] = import_onnxruntime().get_available_providers()
    return found


def _classic_version() -> str | None:
    """Return the version of the TensorRT library that onnxruntime's classic provider loads, or None."""
    try:
        number = int(ctypes.CDLL("libnvinfer.so.10").getInferLibVersion())
    except (OSError, AttributeError):
        return None
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def quiet_options(ort: ModuleType) -> Any:
    """Return new `onnxruntime.SessionOptions` without logging: errors are raised, and stderr belongs to the caller."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return options


def check_onnxruntime(oldest: str, what: str) -> None:
    """Raise ProviderError if the installed onnxruntime is older than `oldest`, such as "1.26", which `what` needs."""
    version = getattr(import_onnxruntime(), "__version__", "")
    numbers = [int(part) for part in re.findall(r"\d+", version)[:2]]
    if numbers < [int(part) for part in oldest.split(".")]:
        raise ProviderError(
            f"{what} needs onnxruntime {oldest} or later for its operators, found {version}: "
            f"`pip install -U 'onnxruntime>={oldest}'`"
        )


@functools.cache  # caches successes only; after a failure the next call tries again
def import_onnxruntime() -> ModuleType:
    """Import onnxruntime, or raise ProviderError with the reason and the command that fixes it.

    1. Two distributions own the same `onnxruntime` folder. The last one installed wins, and pip does not warn.
    2. None is installed.
    3. The folder is missing or empty: two were installed, and removing one deleted the files of both.
    4. The package is there, but importing it fails.
    5. It is older than OLDEST.
    """
    if conflict := onnxruntime_conflict():
        raise ProviderError(f"{conflict}; keep one: `{_mending_command()}`")  # case 1
    try:
        module = importlib.import_module("onnxruntime")
    except Exception as error:  # a broken wheel raises ImportError, but also AttributeError, OSError, ...
        installed = _installed()
        if not (isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime"):
            reason = f"does not import ({type(error).__name__}: {one_line(error)})"
            raise ProviderError(f"{installed or 'onnxruntime'} {reason}: `{_mending_command()}`") from error  # case 4
        if installed:
            raise ProviderError(f"{installed} is installed, but its files are gone: `{_mending_command()}`") from None
        raise ProviderError(f"no onnxruntime is installed: `{_mending_command()}` (or `[gpu]` for CUDA)") from None
    if not hasattr(module, "InferenceSession"):  # case 3
        del sys.modules["onnxruntime"]  # so that a later call sees a repaired installation
        folder = f"{_installed()} is installed, but its folder" if _installed() else "onnxruntime's folder"
        raise ProviderError(f"{folder} is hollow, what an uninstall left behind: `{_mending_command()}`")
    version = re.match(r"(\d+)\.(\d+)", getattr(module, "__version__", ""))
    if version and (int(version[1]), int(version[2])) < OLDEST:  # case 5
        oldest = ".".join(map(str, OLDEST))
        raise ProviderError(
            f"onnxruntime {module.__version__} is too old; expected {oldest} or later (1.23.0 gives other rewards "
            f"without a word): `{_mending_command()}`"
        )
    if telemetry.started_late() and hasattr(module, "disable_telemetry_events"):
        module.disable_telemetry_events()  # it still connects, but sends less
    return module


def onnxruntime_distributions() -> dict[str, str]:
    """Return the name and version of every installed distribution that provides the import package `onnxruntime`."""
    return {item.name: item.version for item in _owners()}


def _installed() -> str:
    return " and ".join(f"{name} {version}" for name, version in onnxruntime_distributions().items())


def onnxruntime_conflict() -> str | None:
    """Say which distributions overwrote each other's `onnxruntime` folder, or return None."""
    folders: dict[str, set[str]] = defaultdict(set)
    for owner in _owners():
        folders[str(owner.locate_file("onnxruntime"))].add(f"{owner.name} {owner.version}")
    for names in folders.values():
        if len({name.split()[0] for name in names}) > 1:
            return f"{' and '.join(sorted(names))} are installed over each other in one folder"
    return None


def reinstall_command(extra: Literal["cpu", "gpu"]) -> str:
    """Return the shell command that leaves exactly one onnxruntime installed, the one of RewardRT's extra."""
    install = f"pip install 'rewardrt[{extra}]'"
    installed = sorted(onnxruntime_distributions())
    return f"pip uninstall -y {' '.join(installed)} && {install}" if installed else install


def _mending_command() -> str:
    """Return the command that reinstalls onnxruntime: for CUDA if any of the installed wheels is, else for the CPU."""
    return reinstall_command("gpu" if any("gpu" in name for name in onnxruntime_distributions()) else "cpu")


def why_no_gpu(cuda_version: str | None = None, built: str = "onnxruntime") -> str | None:
    """Ask the NVIDIA driver for a GPU that CUDA `cuda_version` can use; return None if there is one, else the reason.

    `built` names the library that was built for this CUDA version.
    """
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return (
            f"there is no NVIDIA driver ({name} cannot be loaded); install it, or start the container with `--gpus all`"
        )
    status, count, version = driver.cuInit(0), ctypes.c_int(0), ctypes.c_int(0)
    if status == 0:
        status = driver.cuDeviceGetCount(ctypes.byref(count))
    if status == 3:  # CUDA_ERROR_NOT_INITIALIZED
        return (
            "this process was forked from one that had used the GPU, and CUDA does not survive a fork; "
            "start processes by spawn, or before a model is loaded"
        )
    if status != 0 or count.value == 0:
        return (
            f"the NVIDIA driver shows no GPU (CUDA error {status}, {count.value} devices); "
            "see `nvidia-smi` and the variable CUDA_VISIBLE_DEVICES"
        )
    driver.cuDriverGetVersion(ctypes.byref(version))  # 12040 is 12.4
    needed = int(cuda_version.split(".")[0]) if cuda_version else 0
    if version.value // 1000 < needed:
        found = f"{version.value // 1000}.{version.value % 1000 // 10}"
        return f"the NVIDIA driver goes up to CUDA {found}, {built} was built for {cuda_version}; update the driver"
    return None


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, cut to 300 characters."""
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return line if len(line) <= 300 else line[:297] + "..."


def _owners() -> list[importlib.metadata.Distribution]:
    """Find onnxruntime, onnxruntime-gpu, -directml and so on.

    -extensions and -genai are left out: they own other folders.
    """
    found = []
    for item in importlib.metadata.distributions():
        name = item.metadata["Name"] or ""  # None if the distribution's metadata is damaged
        if name.lower().startswith(("onnxruntime", "ort-")):
            files = item.files
            if files is None or any(file.as_posix() == "onnxruntime/__init__.py" for file in files):
                found.append(item)
    return sorted(found, key=lambda item: item.name)


def _preload_nvidia_libraries(ort: ModuleType) -> None:
    """Load the CUDA, cuDNN and TensorRT libraries that pip installed where the system's loader does not look.

    Failures are ignored here: opening the session then fails with its own reason. `preload_dlls` prints failures to
    stdout, which is reserved for results.
    """
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
            ort.preload_dlls()
    with contextlib.suppress(Exception):
        importlib.import_module("tensorrt_libs")  # from tensorrt-cu*-libs; importing it only loads the libraries


def _missing_library(ort: ModuleType, provider: Provider) -> str | None:
    """After onnxruntime failed to load a provider, find out which library is missing; return the reason and the fix.

    This must not be called earlier: when the provider's library is first loaded, onnxruntime's own tables must be in
    place.
    """
    library = Path(ort.__file__ or "").parent / "capi" / f"libonnxruntime_providers_{provider}.so"
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        found = re.match(r"(\S+\.so\S*): cannot open shared object file", str(error))
        if found is None:  # Provider_GetHost is onnxruntime's own symbol, undefined outside it: no library is missing
            return None if "Provider_" in str(error) else f"its library does not load ({one_line(error)})"
        if tensorrt := re.match(r"lib(?:nvinfer|nvonnxparser)\w*\.so\.(\d+)", found[1]):
            cuda = (getattr(ort, "cuda_version", None) or "12").split(".")[0]
            command = f"pip install 'tensorrt-cu{cuda}-libs=={tensorrt[1]}.*'"
        else:
            command = "pip install 'rewardrt[gpu]'"
        return f"{found[1]} is missing, which onnxruntime needs for it: `{command}`"
    return None
