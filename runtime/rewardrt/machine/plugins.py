"""Execution providers that come in a wheel of their own, and are loaded into the onnxruntime that is there.

Such a provider is a row of PLUGINS. What is the same for all of them is here once: is its wheel installed, does its
library load, which devices does it offer, and how is a session opened on them. onnxruntime itself is handed in.
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

WHOLE_GRAPH = ("session.disable_cpu_ep_fallback", "1")  # a node that the provider does not take is an error


@dataclass(frozen=True)
class Plugin:
    """A provider in a wheel.

    `name` is what is reported, `title` what people call it, `ep` what onnxruntime calls it, `extra` that of RewardRT
    which installs it. `preload` are the files of the wheel that its library needs and does not look for beside itself.
    `driver` are the libraries that come with a driver, not with the wheel. `cuda` is the version that the driver has to
    have; `capabilities` are those of the GPUs that it takes, and every one from `newest` on.
    """

    name: str
    title: str
    distribution: str
    module: str
    ep: str
    extra: str
    library: str  # its file, of which the version is in the name
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
        """Whether it takes a GPU of this compute capability."""
        return capability in self.capabilities or (self.newest is not None and capability >= self.newest)


TENSORRT_RTX = Plugin(
    name="tensorrt-rtx",
    title="TensorRT-RTX",
    distribution="onnxruntime-ep-nv-tensorrt-rtx-cu13",
    module="onnxruntime_ep_nv_tensorrt_rtx",
    ep="NvTensorRTRTXExecutionProvider",
    extra="tensorrt",
    library="libtensorrt_rtx.so.*.*",
    preload=("libcudart.so.*",),  # the wheel's own import leaves it to the system, which may have none
    driver=("libcuda.so.1", "libnvidia-ml.so.1"),
    cuda="13.0",
    # What the wheel's header says, tensorrt_rtx_provider_options.h: 9.0 (H100, H200) and 8.0 (A100) are not among them.
    capabilities=((8, 6), (8, 9)),
    newest=(12, 0),
)
PLUGINS = (TENSORRT_RTX,)

_registered: set[str] = set()
_lock = threading.Lock()


def version(plugin: Plugin) -> str | None:
    """Return the version of what the wheel holds, or of the wheel; None where it is not installed."""
    try:
        wheel = importlib.metadata.version(plugin.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    folder = _folder(plugin)
    files = sorted(folder.glob(plugin.library)) if folder is not None else []
    found = re.search(r"\.so\.([\d.]+)$", files[-1].name) if files else None
    return found[1] if found else wheel


def why_not_here() -> str | None:
    """Return why wheels of plug-ins cannot be had on this system, or None."""
    machine = os.uname().machine if hasattr(os, "uname") else "x86_64"
    if sys.platform in ("linux", "win32") and machine == "x86_64":
        return None
    return f"its wheels are for Linux and Windows on x86-64, not for {sys.platform} on {machine}"


def register(ort: ModuleType, plugin: Plugin) -> None:
    """Load the provider's library into onnxruntime, once a process; raises ProviderError with what is missing."""
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
    """Have sessions of these options run whole on the provider's first device, or not open."""
    options.add_provider_for_devices(devices(ort, plugin)[:1], dict(settings))
    options.add_session_config_entry(*WHOLE_GRAPH)


def _folder(plugin: Plugin) -> Path | None:
    """Return where the wheel's files lie, without importing it."""
    found = importlib.util.find_spec(plugin.module)
    return Path(found.origin).parent if found is not None and found.origin is not None else None


def _import(plugin: Plugin) -> ModuleType:
    """Import the wheel's module, which loads its libraries; it may print, log, and change the loader's path."""
    path = os.environ.get("LD_LIBRARY_PATH")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return importlib.import_module(plugin.module)
    finally:
        if path is None:  # processes that this one starts are not to be given it
            os.environ.pop("LD_LIBRARY_PATH", None)
        else:
            os.environ["LD_LIBRARY_PATH"] = path


def _reason(plugin: Plugin, error: Exception) -> str:
    """Say what is missing, of what an onnxruntime says that could not load a library."""
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
