"""Which test files belong to the fast tier: those that reach neither torch nor transformers, which exports need."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = (ROOT / "tests", ROOT / "export", ROOT / "runtime")  # what is imported from here is followed
HEAVY = {"torch", "transformers"}


def reaches_torch(path: Path) -> bool:
    """Tell whether a file imports torch or transformers, anywhere in it or in a module of this project that it imports."""
    seen: set[Path] = set()
    waiting = [path]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        for name in _imported(current):
            if name.split(".")[0] in HEAVY:
                return True
            waiting += _files(name)
    return False


@cache
def _imported(path: Path) -> frozenset[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module != "conftest":
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


@cache
def _files(name: str) -> tuple[Path, ...]:
    """Return the files that importing a dotted name of this project reads, packages' own included."""
    parts = name.split(".")
    candidates = [
        folder.joinpath(*parts[:count], *end)
        for folder in FOLDERS
        for count in range(1, len(parts) + 1)
        for end in ((), ("__init__.py",))
    ]
    files = [path if path.name == "__init__.py" else path.with_suffix(".py") for path in candidates]
    return tuple(path for path in files if path.is_file())
