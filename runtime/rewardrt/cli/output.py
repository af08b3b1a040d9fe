"""What commands print: lines for people in the terminal's encoding, JSON for programs in UTF-8.

In lines for people an escape stands for what the terminal cannot show, and for control characters.
"""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from typing import Any, TextIO

from rewardrt.data.outputs import open_output
from rewardrt.display import visible, visible_lines

WIDTH = 98  # of lines for people that go to no terminal
NARROWEST = 40  # terminals below it wrap lines


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
    """Return a text on one line of at most so many columns of a terminal, with an ellipsis where it is cut."""
    flat = visible(" ".join(text.split())[: 4 * width])  # a longer one is cut, unless most of it takes no column
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
    """Return how many columns a terminal gives a text: two for a wide character, none for one that joins another."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(each) or unicodedata.category(each) in ("Mn", "Me", "Cf")
        else 2 if unicodedata.east_asian_width(each) in "WF" else 1
        for each in text
    )  # fmt: skip


def width_of(stream: TextIO) -> int:
    """Return the columns of the terminal that a stream goes to; WIDTH where it goes elsewhere.

    The variable COLUMNS comes first, as everywhere.
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
