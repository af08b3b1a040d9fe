"""Describe a bug of RewardRT in one line for a report, without any of the scored texts."""

from __future__ import annotations

import builtins
import importlib.metadata
import platform
import re
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType

PACKAGES = ("rewardrt", "rewardrt_export")
FRAMES = 4  # most stack frames of our own code in a report, the innermost ones


def report(error: BaseException) -> str:
    """Return the one line with which a bug of ours is reported."""
    versions = [f"rewardrt {_version('rewardrt')}", f"Python {platform.python_version()}"]
    versions += [f"{platform.system()} {platform.machine()}"]
    versions += [f"{name} {found}" for name in _onnxruntimes() if (found := _version(name))]
    frames = [_place(frame) for frame in traceback.extract_tb(error.__traceback__)]
    own = [place for place in frames if place.startswith(tuple(f"{package}/" for package in PACKAGES))][-FRAMES:]
    raised = frames[-1:] if frames and frames[-1] not in own else []
    message = _without_content(str(error), _names_in_code(error.__traceback__))
    return f"{', '.join(versions)}; {type(error).__name__}: {message}; at {' > '.join([*own, *raised]) or 'nowhere'}"


def where_to_report() -> str:
    """Say where to report a bug, from the distribution's metadata."""
    with suppress(importlib.metadata.PackageNotFoundError):
        for entry in importlib.metadata.metadata("rewardrt").get_all("Project-URL") or ():
            label, _, address = entry.partition(",")
            if label.strip().lower() in ("issues", "bug tracker", "tracker"):
                return f"please report it at {address.strip()} with the next line"
    return "please report it to RewardRT's developers with the next line"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _onnxruntimes() -> tuple[str, ...]:
    return ("onnxruntime", "onnxruntime-gpu")


def _place(frame: traceback.FrameSummary) -> str:
    """Return file and line, relative to the package: the folders above it are private to the user."""
    parts = Path(frame.filename).parts
    roots = [index for index, part in enumerate(parts) if part in PACKAGES or part == "site-packages"]
    if roots:
        start = roots[-1] + (parts[roots[-1]] == "site-packages")
        return f"{'/'.join(parts[start:])}:{frame.lineno}"
    return f"{parts[-1] if parts else '?'}:{frame.lineno}"


def _names_in_code(trace: TracebackType | None) -> set[str]:
    """Return all names and strings in the code that ran: a message that quotes them quotes no user's text."""
    names = {*dir(builtins), "NoneType"}
    for frame, _ in traceback.walk_tb(trace):
        code = frame.f_code
        names |= {*code.co_names, *code.co_varnames, *(value for value in code.co_consts if isinstance(value, str))}
    return names


def _without_content(message: str, known: set[str]) -> str:
    """Return an error's message without paths, and without quoted texts unless they are names in the code."""
    message = " ".join(message.split())
    quoted = re.findall(r"'([^']*)'|\"([^\"]*)\"", message)
    marks = sum(message.count(mark) for mark in "'\"")
    if marks != 2 * len(quoted) or any((first or second) not in known for first, second in quoted):
        message = re.split(r"['\"]", message, maxsplit=1)[0] + "..."
    message = re.sub(r"\S*[/\\]\S*", "...", message)
    return message if len(message) <= 200 else f"{message[:200]}..."
