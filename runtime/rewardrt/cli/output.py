"""What commands print: lines for people in the terminal's encoding, JSON for programs in UTF-8.

In lines for people an escape stands for what the terminal cannot show, and for control characters.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from rewardrt.data.outputs import open_output
from rewardrt.display import visible, visible_lines


def show(text: str) -> None:
    """Print lines for people to standard output."""
    with open_output(None) as output:
        output.write(for_people(text))


def for_people(text: str) -> bytes:
    """Return lines for people as the terminal takes them."""
    return f"{visible_lines(text)}\n".encode(sys.stdout.encoding or "utf-8", "backslashreplace")


def show_json(value: Any) -> None:
    """Print a value as JSON, for programs."""
    with open_output(None) as output:
        output.write(json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Return a value as indented JSON, in UTF-8."""
    try:
        return f"{json.dumps(value, indent=2, ensure_ascii=False)}\n".encode()
    except UnicodeEncodeError:  # a lone surrogate, of a folder's name for one: only an escape can carry it
        return f"{json.dumps(value, indent=2)}\n".encode()


def one_line(text: str, width: int) -> str:
    """Return a text on one line of at most so many characters."""
    flat = " ".join(text.split())
    return visible(flat if len(flat) <= width else flat[: width - 1] + "…")
