"""The first NVIDIA GPU of this machine, read from the driver's own library, so that no other package is needed."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name, its compute capability (major, minor), and the highest CUDA version that its driver supports."""

    name: str
    capability: tuple[int, int]
    cuda: str

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


def find_gpu() -> Gpu | None:
    """Return the first CUDA device, or None if there is none or the driver does not answer."""
    try:
        driver = ctypes.CDLL(DRIVER)
        if driver.cuInit(0) != 0:
            return None
        device, version = ctypes.c_int(0), ctypes.c_int(0)
        if driver.cuDeviceGet(ctypes.byref(device), 0) != 0:
            return None
        name, numbers = ctypes.create_string_buffer(256), [ctypes.c_int(0), ctypes.c_int(0)]
        driver.cuDeviceGetName(name, len(name), device)
        for number, attribute in zip(numbers, (_MAJOR, _MINOR), strict=True):
            driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        driver.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    title = name.value.decode(errors="replace").strip() or "a GPU without a name"
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return Gpu(title, (numbers[0].value, numbers[1].value), cuda)
