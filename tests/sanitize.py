"""Run the tests of the kernels on a library that reports each access outside of memory and each undefined operation.

The library is compiled into a copy of the package, which is what the tests then import. gcc's address and undefined
behaviour sanitizers are loaded before Python, because Python is not compiled with them. Further arguments are pytest's.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLAGS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-g",
    "-DASK_FOR_AMX=0",
]
TESTS = ["tests/test_kernels.py", "tests/test_bundles_of_earlier_versions.py"]


def main() -> int:
    """Return the exit status: 0 when every test passed, some of them by the kernels, and nothing was reported."""
    sys.path.insert(0, str(ROOT))
    import hatch_build

    compiler = shlex.split(os.environ.get("CC", "cc"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT / "runtime" / "rewardrt", folder / "rewardrt", ignore=shutil.ignore_patterns("*.so"))
        library = folder / hatch_build.LIBRARY.relative_to("runtime")
        os.environ["CC"] = shlex.join([*compiler, *FLAGS])
        reason = hatch_build.compile_library(ROOT / hatch_build.SOURCES, library)
        if reason is not None:
            print(f"the kernels cannot be compiled with sanitizers: {reason}", file=sys.stderr)
            return 1
        reports = folder / "reports"
        reports.mkdir()
        own = os.pathsep.join(map(str, (folder, ROOT / "export")))
        options = f"log_path={reports}/report:abort_on_error=1"
        environment = os.environ | {
            "PYTHONPATH": own,
            "LD_PRELOAD": " ".join(_runtime(compiler, each) for each in ("libasan.so", "libubsan.so")),
            "ASAN_OPTIONS": f"{options}:detect_leaks=0",  # Python leaves much to the end of the process
            "UBSAN_OPTIONS": f"{options}:print_stacktrace=1",
            "PYTHONMALLOC": "malloc",  # each object in memory of its own
        }
        kinds = [
            sys.executable,
            "-c",
            "from rewardrt.machine import kernels; print(kernels.LIBRARY, kernels.describe())",
        ]
        found = subprocess.run(kinds, env=environment, capture_output=True, text=True, check=False, timeout=60)
        print(found.stdout.strip() or found.stderr.strip())
        command = [sys.executable, "-m", "pytest", "--fast", "-p", "no:cacheprovider", "--timeout", "600"]
        tests = subprocess.run(
            [*command, *(sys.argv[1:] or TESTS)], env=environment, cwd=ROOT, check=False, timeout=3000
        )
        written = sorted(reports.iterdir())
        for report in written:
            print(report.read_text(errors="replace"), file=sys.stderr)
        if str(library) not in found.stdout or written:
            return 1
        print(f"nothing reported by the sanitizers; kernels: {found.stdout.split(maxsplit=1)[1].strip()}")
        return tests.returncode


def _runtime(compiler: list[str], name: str) -> str:
    asked = [*compiler, f"-print-file-name={name}"]
    return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
