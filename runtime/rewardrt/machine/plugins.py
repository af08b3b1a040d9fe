"""Execution providers that come as a wheel of their own and are loaded into an installed onnxruntime (plug-ins).

Each provider is an entry of PLUGINS. The functions here work for all of them: is the wheel installed, does its library
load, which devices does it offer, and how does a session use them. The onnxruntime module is passed in as `ort`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import io
import os
import re
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rewardrt.errors import ProviderError

WHOLE_GRAPH = ("session.disable_cpu_ep_fallback", "1")  # a node that the provider cannot run is an error


@dataclass(frozen=True)
class Plugin:
    """An execution provider in a wheel of its own.

    `name` is the name that RewardRT reports, `title` the product's name, `ep` onnxruntime's name for it, and `extra`
    the extra of RewardRT that installs it. `preload` lists files of the wheel that the library needs but does not find
    by itself. `driver` lists libraries that come with the GPU driver, not with the wheel. `cuda` is the CUDA version
    that the driver must support. `capabilities` are the supported compute capabilities of GPUs; every capability from
    `newest` on is supported too.
    """

    name: str
    title: str
    distribution: str
    module: str
    ep: str
    extra: str
    library: str  # glob of its library's file name, which contains the version
    preload: tuple[str, ...] = ()
    driver: tuple[str, ...] = ()
    cuda: str | None = None
    capabilities: tuple[tuple[int, int], ...] = ()
    newest: tuple[int, int] | None = None

    @property
    def install_command(self) -> str:
        """The command that installs its wheel."""
        return f"pip install 'rewardrt[{self.extra}]'"

    def takes(self, capability: tuple[int, int]) -> bool:
        """Whether the provider supports a GPU of this compute capability."""
        return capability in self.capabilities or (self.newest is not None and capability >= self.newest)


TENSORRT_RTX = Plugin(
    name="tensorrt-rtx",
    title="TensorRT-RTX",
    distribution="onnxruntime-ep-nv-tensorrt-rtx-cu13",
    module="onnxruntime_ep_nv_tensorrt_rtx",
    ep="NvTensorRTRTXExecutionProvider",
    extra="tensorrt",
    library="libtensorrt_rtx.so.*.*",
    preload=("libcudart.so.*",),  # the wheel's own import relies on the system's copy, which may not exist
    driver=("libcuda.so.1", "libnvidia-ml.so.1"),
    cuda="13.0",
    # From tensorrt_rtx_provider_options.h in the wheel; 9.0 (H100, H200) and 8.0 (A100) are not supported.
    capabilities=((8, 6), (8, 9)),
    newest=(12, 0),
)
PLUGINS = (TENSORRT_RTX,)

_registered: set[str] = set()
_lock = threading.Lock()


def version(plugin: Plugin) -> str | None:
    """Return the version of the library in the wheel, or else the wheel's own; None if it is not installed."""
    try:
        wheel = importlib.metadata.version(plugin.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    folder = _folder(plugin)
    files = sorted(folder.glob(plugin.library)) if folder is not None else []
    found = re.search(r"\.so\.([\d.]+)$", files[-1].name) if files else None
    return found[1] if found else wheel


def why_not_here() -> str | None:
    """Return why the plug-ins' wheels do not exist for this system, or None if they do."""
    machine = os.uname().machine if hasattr(os, "uname") else "x86_64"
    if sys.platform in ("linux", "win32") and machine == "x86_64":
        return None
    return f"its wheels are for Linux and Windows on x86-64, not for {sys.platform} on {machine}"


def register(ort: ModuleType, plugin: Plugin) -> None:
    """Load the provider's library into onnxruntime, once per process; raise ProviderError saying what is missing."""
    with _lock:
        if plugin.ep in _registered:
            return
        if version(plugin) is None or (folder := _folder(plugin)) is None:
            raise ProviderError(f"{plugin.title} is not installed: `{plugin.install_command}`")
        if not hasattr(ort, "register_execution_provider_library"):
            raise ProviderError(f"this onnxruntime takes no plug-ins, as 1.24 does: `{plugin.install_command}`")
        try:
            for pattern in plugin.preload:
                for library in sorted(folder.glob(pattern))[:1]:
                    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            ort.register_execution_provider_library(plugin.ep, _import(plugin).get_library_path())
        except Exception as error:  # onnxruntime's exceptions share no base class, and a damaged wheel raises anything
            raise ProviderError(_reason(plugin, error)) from error
        _registered.add(plugin.ep)


def devices(ort: ModuleType, plugin: Plugin) -> list[Any]:
    """Return the devices that the provider offers, each an onnxruntime.OrtEpDevice; raises ProviderError."""
    register(ort, plugin)
    found = [device for device in ort.get_ep_devices() if device.ep_name == plugin.ep]
    if not found:
        raise ProviderError(f"{plugin.title} offers no device on this machine; `rewardrt doctor` shows the GPU")
    return found


def add_provider(ort: ModuleType, options: Any, plugin: Plugin, settings: Mapping[str, str]) -> None:
    """Make sessions with these options run the whole graph on the provider's first device, or fail to open."""
    options.add_provider_for_devices(devices(ort, plugin)[:1], dict(settings))
    options.add_session_config_entry(*WHOLE_GRAPH)


def _folder(plugin: Plugin) -> Path | None:
    """Return the folder of the wheel's files, without importing the wheel."""
    found = importlib.util.find_spec(plugin.module)
    return Path(found.origin).parent if found is not None and found.origin is not None else None


def _import(plugin: Plugin) -> ModuleType:
    """Import the wheel's module, which loads its libraries.

    What it prints is discarded, and its change of LD_LIBRARY_PATH is undone.
    """
    path = os.environ.get("LD_LIBRARY_PATH")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return importlib.import_module(plugin.module)
    finally:
        if path is None:  # child processes must not inherit the changed path
            os.environ.pop("LD_LIBRARY_PATH", None)
        else:
            os.environ["LD_LIBRARY_PATH"] = path


def _reason(plugin: Plugin, error: Exception) -> str:
    """Turn onnxruntime's error on loading a library into a message that names the missing file and the fix."""
    text = " ".join(str(error).split())
    found = re.search(r"(\S+\.so\S*): cannot open shared object file", text)
    if found is None:
        line = text if len(text) <= 300 else text[:297] + "..."
        return f"{plugin.title} does not load ({line}): `pip install --force-reinstall {plugin.distribution}`"
    if found[1] in plugin.driver:
        return (
            f"{found[1]} is missing, which comes with the NVIDIA driver; "
            "install it, or start the container with `--gpus all`"
        )
    return f"{found[1]} is missing, which {plugin.title} needs: `pip install --force-reinstall {plugin.distribution}`"
