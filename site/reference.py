"""Write docs/reference/command.md from what `--help` prints, and docs/reference/python.md from the docstrings.

python site/reference.py [FOLDER]    # docs/reference, unless another folder is named
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

import rewardrt
from rewardrt.cli.app import GROUPS, app

PAGES = Path(__file__).parent.parent / "docs" / "reference"
WIDTH = 100  # columns that help is wrapped at


def command_page() -> str:
    """Return the page of all commands, in the order of their use."""
    parts = [
        "# Command reference\n\n"
        "What `rewardrt COMMAND --help` prints, for every command. `make docs` writes this page.\n"
    ]
    context = click.Context(app, info_name="rewardrt", terminal_width=WIDTH, max_content_width=WIDTH)
    names = [name for group in GROUPS.values() for name in group]
    assert sorted(names) == sorted(app.list_commands(context)), "a command is in no group of the help"
    for name in names:
        command = app.get_command(context, name)
        assert command is not None
        own = click.Context(command, info_name=name, parent=context, terminal_width=WIDTH, max_content_width=WIDTH)
        mark = "<!-- not run: this page is written from it -->"
        parts.append(f"## rewardrt {name}\n\n{mark}\n```text\n{command.get_help(own)}\n```\n")
    return "\n".join(parts)


def python_page() -> str:
    """Return the page of all names that `import rewardrt` offers."""
    parts = [
        "# Python reference\n\n"
        "Every name that `rewardrt` exports, with its signature and docstring. [Python](../python.md) has the calls\n"
        "in one table. `make docs` writes this page.\n"
    ]
    for name in sorted(rewardrt.__all__, key=lambda name: (issubclass(getattr(rewardrt, name), Exception), name)):
        parts.append(f"## {name}\n")
        parts += _class(name, getattr(rewardrt, name))
    return "\n".join(parts)


def _class(name: str, found: type) -> Iterator[str]:
    if issubclass(found, Exception):
        yield f"Base class: `{found.__bases__[0].__name__}`.\n"
        yield f"{inspect.getdoc(found)}\n"
        return
    if dataclasses.is_dataclass(found):
        yield _signature(name, found)
    yield f"{inspect.getdoc(found)}\n"
    for member, value in inspect.getmembers(found):
        if member.startswith("_") or member not in {each for base in found.__mro__[:-1] for each in vars(base)}:
            continue
        if inspect.isroutine(value):
            yield f"### {name}.{member}\n\n{_signature(f'{name}.{member}', value)}\n{inspect.getdoc(value)}\n"
        elif isinstance(inspect.getattr_static(found, member), property):
            yield f"### {name}.{member}\n\nA property. {inspect.getdoc(value)}\n"


def _signature(name: str, value: Any) -> str:
    """Return a signature as a block of Python, a parameter a line where it is long."""
    found = inspect.signature(value)
    parameters, starred = [], False
    for each in found.parameters.values():
        if each.kind is each.KEYWORD_ONLY and not starred:
            parameters.append("*")
            starred = True
        annotation = "" if each.annotation is each.empty else f": {each.annotation}"
        default = "" if each.default is each.empty else f" = {each.default!r}"
        parameters.append(f"{each.name}{annotation}{default}")
    returns = (
        "" if found.return_annotation is found.empty or isinstance(value, type) else f" -> {found.return_annotation}"
    )
    line = f"{name}({', '.join(parameters)}){returns}"
    if len(line) > WIDTH:
        line = "\n".join([f"{name}(", *(f"    {each}," for each in parameters), f"){returns}"])
    return f"<!-- not run: a signature -->\n```python\n{line}\n```\n"


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if sys.argv[1:] else PAGES
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "command.md").write_text(command_page(), encoding="utf-8")
    (folder / "python.md").write_text(python_page(), encoding="utf-8")
