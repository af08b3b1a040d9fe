"""What commands print: lines for people in the terminal's encoding, or JSON for programs in UTF-8.

In lines for people, control characters and characters that the terminal cannot show are escaped.
"""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from typing import Any, TextIO

from rewardrt.data.outputs import open_output
from rewardrt.display import visible, visible_lines

WIDTH = 98  # width of lines for people if the output is not a terminal
NARROWEST = 40  # least width; narrower terminals wrap the lines


def show(text: str) -> None:
    """Print lines for people to standard output."""
    with open_output(None) as output:
        output.write(for_people(text))


def for_people(text: str) -> bytes:
    """Return lines for people as bytes in the terminal's encoding."""
    return f"{visible_lines(text)}\n".encode(sys.stdout.encoding or "utf-8", "backslashreplace")


def show_json(value: Any) -> None:
    """Print a value as JSON, for programs."""
    with open_output(None) as output:
        output.write(json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Return a value as indented JSON, in UTF-8."""
    try:
        return f"{json.dumps(value, indent=2, ensure_ascii=False)}\n".encode()
    except UnicodeEncodeError:  # a lone surrogate, for example in a folder's name: it must be escaped
        return f"{json.dumps(value, indent=2)}\n".encode()


def one_line(text: str, width: int) -> str:
    """Return a text on one line of at most `width` terminal columns, with an ellipsis if it is cut."""
    flat = visible(" ".join(text.split())[: 4 * width])  # more than enough, unless most characters are of zero width
    if columns(flat) <= width:
        return flat
    kept, room = [], width - 1
    for character in flat:
        room -= columns(character)
        if room < 0:
            break
        kept.append(character)
    return "".join(kept) + "…"


def columns(text: str) -> int:
    """Return the width of a text in terminal columns: two for wide characters, none for combining ones."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(each) or unicodedata.category(each) in ("Mn", "Me", "Cf")
        else 2 if unicodedata.east_asian_width(each) in "WF" else 1
        for each in text
    )  # fmt: skip


def width_of(stream: TextIO) -> int:
    """Return the width of the terminal that a stream is connected to, or WIDTH if it is not a terminal.

    The environment variable COLUMNS takes precedence.
    """
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and int(given):
        found = int(given)
    else:
        try:
            found = os.get_terminal_size(stream.fileno()).columns or WIDTH
        except (OSError, ValueError):  # no terminal
            found = WIDTH
    return max(found, NARROWEST)
