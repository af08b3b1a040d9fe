"""No test waits without an end: pytest-timeout ends a test, and not the processes and threads that it waits for."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "tests").glob("*.py"), *(ROOT / "framework_tests").glob("*.py")])
# Each needs `timeout`, in this place or by its name.
FUNCTIONS = {
    **{f"subprocess.{name}": None for name in ("run", "call", "check_call", "check_output")},
    "urllib.request.urlopen": 2,
    "socket.create_connection": 1,
}
METHODS = {"wait": 0, "join": 0, "communicate": 1, "result": 0, "exception": 0, "acquire": 1, "get": 1}
POLLS = ("sleep", "httpx", "poll", "exists", "waitpid", "recv")


def unbounded(tree: ast.AST) -> list[int]:
    """Return the lines where a wait has no end that the source shows."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and not any(keyword.arg in ("timeout", None) for keyword in node.keywords):
            name = ast.unparse(node.func)
            if name in FUNCTIONS:
                place = FUNCTIONS[name]
                lines += [node.lineno] if place is None or len(node.args) <= place else []
            elif isinstance(node.func, ast.Attribute) and node.func.attr in METHODS and not node.args:
                lines += [node.lineno] if not isinstance(node.func.value, ast.Constant) else []
            elif name == "os.waitpid" and ast.unparse(node.args[1]) == "0":
                lines.append(node.lineno)
        elif isinstance(node, ast.With):  # it waits at its end for the process
            called = [ast.unparse(item.context_expr) for item in node.items]
            lines += [node.lineno] if any(name.startswith("subprocess.Popen(") for name in called) else []
        elif isinstance(node, ast.While) and any(word in ast.unparse(node) for word in POLLS):
            lines += [] if "monotonic" in ast.unparse(node) else [node.lineno]
    return sorted(lines)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_wait_of_the_tests_has_an_end(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [n for n in unbounded(ast.parse("\n".join(lines))) if "# bounded: " not in lines[n - 1]]
    assert [f"{path.name}:{n}: {lines[n - 1].strip()}" for n in found] == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("subprocess.run(command, check=True)", 1),
        ("subprocess.run(command, check=True, timeout=9)", 0),
        ("process.wait()", 1),
        ("process.wait(9)", 0),
        ("thread.join()", 1),
        ("' '.join(words)", 0),
        ("future.result()", 1),
        ("answers.get()", 1),
        ("row.get('text')", 0),
        ("socket.create_connection(address)", 1),
        ("os.waitpid(child, 0)", 1),
        ("with subprocess.Popen(command) as process:\n    pass", 1),
        ("while True:\n    time.sleep(1)", 1),
        ("while time.monotonic() < end:\n    time.sleep(1)", 0),
        ("while stack:\n    stack.pop()", 0),
    ],
)
def test_the_rule_finds_what_has_no_end(source: str, count: int) -> None:
    assert len(unbounded(ast.parse(source))) == count
