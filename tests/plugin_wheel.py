"""A driver that is not there, and wheels of plug-ins that lack a file: what stands for machines with a GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

DRIVER = """
int cuInit(unsigned flags) {{ return {status}; }}
int cuDeviceGetCount(int *count) {{ *count = {count}; return 0; }}
int cuDeviceGet(int *device, int ordinal) {{ *device = 0; return 0; }}
int cuDriverGetVersion(int *version) {{ *version = {version}; return 0; }}
int cuDeviceGetName(char *name, int size, int device) {{
    const char *text = "{name}";
    int place = 0;
    for (; text[place] && place < size - 1; place++) name[place] = text[place];
    name[place] = 0;
    return 0;
}}
int cuDeviceGetAttribute(int *value, int attribute, int device) {{
    *value = attribute == 75 ? {major} : attribute == 76 ? {minor} : 0;
    return 0;
}}
"""


def compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc")


def write_driver(
    folder: Path,
    *,
    status: int = 0,
    count: int = 1,
    version: int = 13000,
    capability: tuple[int, int] = (8, 9),
    name: str = "NVIDIA Stub",
    functions: tuple[str, ...] = (),
) -> None:
    """Compile a libcuda.so.1 that knows one GPU; `functions` do nothing but fail, for libraries that look for them."""
    major, minor = capability
    source = DRIVER.format(status=status, count=count, version=version, name=name, major=major, minor=minor)
    own = set(re.findall(r"int (\w+)\(", source))
    source += "".join(f"int {each}(void) {{ return 100; }}\n" for each in functions if each not in own)
    compile_library(folder / "libcuda.so.1", source)


def compile_library(path: Path, source: str) -> None:
    path.parent.mkdir(exist_ok=True)
    command = [str(compiler()), "-shared", "-fPIC", "-x", "c", "-", "-o", str(path), f"-Wl,-soname,{path.name}"]
    subprocess.run(command, input=source, text=True, check=True, capture_output=True, timeout=60)


def wheel_without(folder: Path, module: str, pattern: str) -> Path:
    """Return a folder for sys.path that holds a wheel's package, but for the files of a pattern."""
    found = importlib.util.find_spec(module)
    assert found is not None and found.origin is not None
    package = folder / module
    package.mkdir(parents=True)
    for file in Path(found.origin).parent.iterdir():
        real = file.is_file() and not file.is_symlink()  # links are what the wheel's own import makes
        if real and not file.match(pattern):
            try:
                os.link(file, package / file.name)  # the wheel's own import passes over links by name
            except OSError:  # another file system
                shutil.copy2(file, package / file.name)
    return folder


def run(code: str, libraries: Path | None = None, first: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python in a process whose loader looks into a folder, and which imports from another one first."""
    paths = [str(first)] if first is not None else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, *(path for path in sys.path if path)])}
    if libraries is not None:
        environment["LD_LIBRARY_PATH"] = str(libraries)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
