"""Text fields of other formats: their names here, and which of a row's fields are not read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TURNS = "messages, each with role and content"
# Name of a field in other formats -> its name here.
NAMES: dict[str, str] = {
    **dict.fromkeys(("question", "query", "instruction", "problem", "user", "human", "user_input"), "prompt"),
    **dict.fromkeys(
        ("completion", "answer", "output", "generation", "generated_text", "continuation", "solution", "assistant",
         "bot", "reply", "model_output", "prediction"),
        "response",
    ),
    **dict.fromkeys(
        ("completions", "answers", "outputs", "generations", "candidates", "solutions", "predictions", "samples"),
        "responses",
    ),
    **dict.fromkeys(("conversations", "conversation", "dialogue", "dialog", "turns", "history", "chat"), _TURNS),
    "choices": "responses, the content of each choice's message",
    **dict.fromkeys(("chosen_response", "response_chosen", "response_j", "preferred", "winner"), "chosen"),
    **dict.fromkeys(("rejected_response", "response_rejected", "response_k", "dispreferred", "loser"), "rejected"),
    **dict.fromkeys(("input", "context", "passage", "content"), "part of prompt, joined as in the training"),
}  # fmt: skip


def unread(row: Mapping[str, Any]) -> list[str]:
    """Return the names from NAMES under which a row has text; no field of that name is read."""
    return [name for name in NAMES if row.get(name) and isinstance(row[name], str | list)]


def advice(row: Mapping[str, Any], found: list[str]) -> str:
    """For a row that cannot be scored, say what its other text fields are called here; `found` are the fields read."""
    if found == ["chosen", "rejected"]:
        return "; chosen and rejected that are strings need the prompt that they answer"
    if names := unread(row):
        called = ", ".join(f"{name!r} ({NAMES[name]} here)" for name in names[:4])
        return f"; unused: {called}; rename them"
    others = [name for name, value in row.items() if value and isinstance(value, str | list) and name not in found]
    if not others:
        return ""
    shown = ", ".join(repr(str(name)[:40]) for name in others[:4])
    return f"; unused: {shown}{' and more' if len(others) > 4 else ''}; name what is to be scored as above"
