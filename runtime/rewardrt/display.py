"""Make text from outside safe to print: one line, without characters that a terminal would interpret."""

from __future__ import annotations

import re

# Control characters, line separators, marks that change the writing direction, and lone surrogates, which no encoding
# can write.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Return the text on one line, with an escape such as `\x1b` for each control character."""
    return _UNSEEN.sub(_escape, text)


def visible_lines(text: str) -> str:
    """Return a text of several lines with the control characters of each line escaped; the line breaks stay."""
    return "\n".join(map(visible, text.split("\n")))


def _escape(found: re.Match[str]) -> str:
    named = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
    code = ord(found[0])
    return named.get(found[0]) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")
