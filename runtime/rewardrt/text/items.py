"""What is scored: one text of a row, checked but not yet rendered.

An item is a text that is scored exactly as sent, a conversation that ends with the assistant's answer, two answers to
one prompt, or the steps of an answer. Clients of a server may also send token ids.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from rewardrt.errors import RowError
from rewardrt.text.chat_template import NO_INPUTS, Message, TemplateInputs


@dataclass(frozen=True)
class RawText:
    """A text that is scored exactly as sent; with `special_tokens`, the tokenizer adds its own special tokens."""

    text: str
    special_tokens: bool = False


@dataclass(frozen=True)
class Conversation:
    """A prompt and the assistant's answer to it. A prompt that is a string is one user turn."""

    prompt: str | tuple[Message, ...]
    answer: Message
    inputs: TemplateInputs = NO_INPUTS

    @property
    def messages(self) -> tuple[Message, ...]:
        """The whole conversation; the answer is the last message."""
        return (*as_turns(self.prompt), self.answer)


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, in the order in which a model that compares answers reads them."""

    first: Conversation
    second: Conversation


@dataclass(frozen=True)
class Steps:
    """A prompt and the steps of the assistant's answer, each of which gets a reward.

    `response` is the whole answer, if the row has it; models that do not reward steps score it instead.
    """

    prompt: str | tuple[Message, ...]
    steps: tuple[str, ...]
    response: str | None = None
    inputs: TemplateInputs = NO_INPUTS


@dataclass(frozen=True)
class TokenIds:
    """A text sent as token ids, which are scored unchanged."""

    ids: tuple[int, ...]


Item = RawText | Conversation | Pair | Steps  # inputs that are rendered to text
Input = Item | TokenIds


def as_turns(prompt: str | tuple[Message, ...]) -> tuple[Message, ...]:
    """Return a prompt as messages: a string becomes one user turn."""
    return ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt


def check_string(value: object, where: str) -> str:
    """Return `value` if it is a string that UTF-8 can encode, or raise RowError naming its place in the row."""
    if not isinstance(value, str):
        raise RowError(f"{where}: expected a string, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = f"the lone surrogate U+{ord(value[error.start]):04X} at character {error.start + 1}"
        raise RowError(f"{where}: expected text that can be encoded as UTF-8, found {found}") from None
    return str.__str__(value)  # a subclass could bring methods of its own into the template's sandbox


def check_messages(value: object, where: str) -> tuple[Message, ...]:
    """Return a copy of a valid list of messages, or raise RowError naming the place of the fault.

    A message is an object with a string `role` and a `content`: a string or a list of text parts. With `tool_calls`,
    content may also be null or missing. Other fields are passed on to the template.
    """
    if not isinstance(value, list | tuple):
        raise RowError(f"{where}: expected a list of messages, found {type(value).__name__}")
    if not value:
        raise RowError(f"{where}: expected at least one message, found an empty list")
    return tuple(_check_message(message, f"{where}[{index}]") for index, message in enumerate(value))


def _check_message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise RowError(f"{where}: expected an object with role and content, found {type(value).__name__}")
    if missing := [name for name in ("role", "content") if name not in value and not _says_otherwise(value, name)]:
        raise RowError(f"{where}: expected role and content, found no {' and no '.join(missing)}")
    role = check_string(value["role"], f"{where}.role")
    checked: Message = {"role": role}
    if not _says_otherwise(value, "content") or value.get("content") is not None:
        checked["content"] = _check_content(value["content"], f"{where}.content")
    if not role:
        raise RowError(f"{where}.role: expected system, user, assistant or tool, found an empty string")
    if value.keys() == checked.keys():
        return {name: checked[name] for name in value}
    message: Message = check_json({**value, **checked}, where)
    return message


def _says_otherwise(message: Message, name: str) -> bool:
    """Whether a message may lack this field: `content` may be missing if the message calls tools."""
    return name == "content" and bool(message.get("tool_calls"))


def _check_content(value: object, where: str) -> str | list[dict[str, str]]:
    if not isinstance(value, list | tuple):
        return check_string(value, where)
    if not value:
        raise RowError(f"{where}: expected a string or at least one part of text, found an empty list")
    parts = []
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part, dict):
            found = check_string(kind, f"{where}[{index}].type")[:40]
            expected = '{"type": "text", "text": ...}, since only text is scored'
            raise RowError(f"{where}[{index}]: expected {expected}; found {found!r}")
        text = check_string(part.get("text"), f"{where}[{index}].text")
        parts.append({**check_json(part, f"{where}[{index}]"), "text": text})
    return parts


def check_json(value: object, where: str) -> Any:
    """Return a copy of a value made only of JSON types, or raise RowError naming the place."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise RowError(f"{where}: expected JSON values only, found something else ({reason})") from None


def utf8_bytes(text: str) -> int:
    """Return the length of a text in UTF-8 bytes, counting a lone surrogate as three."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
