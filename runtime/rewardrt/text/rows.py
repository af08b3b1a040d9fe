"""The row contract: which objects can be scored, and which fields scoring adds to them.

| row in | fields added to the row out |
| --- | --- |
| `text` · `messages` ending with the assistant · `prompt` or `messages`, with `response` | `reward` |
| `prompt` or `messages`, with `responses` | `rewards`, `best` |
| `prompt` or `messages`, with `chosen` and `rejected` | `chosen_reward`, `rejected_reward`, `margin` |
| `prompt` or `messages`, with `steps`; `text` with step tokens | `step_rewards`; `reward` if they are aggregated |

The last kind of row, and `text`, are the only ones for models that reward steps (process reward models). A row with
`steps` may also contain the whole answer, as `response` or as the last of its `messages`; other models score that.

With messages or a prompt, a row may have `tools` and `documents` (lists of objects) and `chat_template_kwargs` (an
object). They are passed to the chat template, as TRL and transformers do. A field that would change the text in a way
that this contract does not support is refused by name. All other fields belong to the user and stay in the row.

A model that compares answers takes only rows with several answers, and adds `comparisons` to `responses` (see
`pairwise`).

Every scored row also gets `tokens` and `truncated`, and on request `objectives`: an object, or a list with one object
for each text. A row that cannot be scored gets `error` instead. A field that is null counts as missing.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from rewardrt.errors import RowError
from rewardrt.text.chat_template import NO_INPUTS, RESERVED, Message, TemplateInputs, content_string
from rewardrt.text.fields import advice
from rewardrt.text.items import (
    Conversation,
    Input,
    RawText,
    Steps,
    as_turns,
    check_json,
    check_messages,
    check_string,
)

INPUT_FIELDS = ("text", "messages", "prompt", "response", "responses", "chosen", "rejected")
TEMPLATE_FIELDS = ("tools", "documents", "chat_template_kwargs")  # given to the chat template
# Fields of requests and data sets that would change the text elsewhere, and that are not supported here.
REFUSED_FIELDS = {
    "system": "put it first in `messages`, as the role system",
    "system_prompt": "put it first in `messages`, as the role system",
    "system_message": "put it first in `messages`, as the role system",
    "history": "put earlier turns into `messages`",
    "functions": "name them `tools`",
    "function_call": "put it into a message, as `tool_calls`",
    "tool_choice": "leave it out: it is for models that write",
    "chat_template": "a bundle has its own template; export the checkpoint with another one",
    "add_generation_prompt": "a text ends with the answer that is scored",
    "continue_final_message": "a text ends with the answer that is scored",
    "image": "only text is scored",
    "images": "only text is scored",
    "video": "only text is scored",
    "videos": "only text is scored",
    "audio": "only text is scored",
    "audios": "only text is scored",
    "mm_processor_kwargs": "only text is scored",
}
EXPECTED = (
    "expected text, or messages ending with the assistant, or one of prompt and messages "
    "with response, with responses, with steps, or with chosen and rejected"
)


@dataclass(frozen=True)
class Row:
    """A row's texts to score: one text, one for each of `responses`, or chosen and rejected in this order.

    For a model that compares answers, `compare` says what the items are: with "texts" all ordered pairs of the answers,
    with "vectors" the answers.
    """

    kind: Literal["single", "ranking", "pair"]
    items: tuple[Input, ...]
    compare: Literal["", "texts", "vectors"] = ""

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The indices of the two answers in each item, if the items are pairs: (0, 1), (0, 2), ... (1, 0), ..."""
        answers = (1 + math.isqrt(1 + 4 * len(self.items))) // 2
        return list(itertools.permutations(range(answers), 2)) if self.compare == "texts" else []

    def label(self, index: int) -> str:
        """Return the field name of the text at this index, as a message's prefix; "" if there is only one text."""
        if self.kind == "single":
            return ""
        if self.compare == "texts":
            return " before ".join(map(self._name, self.pairs[index])) + ": "
        return f"{self._name(index)}: "

    def _name(self, answer: int) -> str:
        return f"responses[{answer}]" if self.kind == "ranking" else ("chosen", "rejected")[answer]


def parse_row(row: object) -> Row:
    """Return the texts of a row that has exactly one of the shapes above, or raise RowError.

    `chosen` and `rejected` may be lists of messages as TRL writes them: the messages after the prompt, or a whole
    conversation. A list that begins with the prompt's own messages is a whole conversation.
    """
    if not isinstance(row, dict):
        raise RowError(f"expected an object, found {type(row).__name__}")
    given = [name for name in INPUT_FIELDS if row.get(name) is not None]
    if refused := next((name for name in REFUSED_FIELDS if given and row.get(name)), None):
        raise RowError(
            f"{refused}: this field could change the text, and nothing here reads it; {REFUSED_FIELDS[refused]}"
        )
    inputs = _template_inputs(row) if given else NO_INPUTS
    if row.get("steps") is not None and _may_have_steps(row, given):
        return Row("single", (replace(_steps(row, given[0]), inputs=inputs),))
    parsed = _parse_answers(row, given)
    if not inputs.given and inputs.instruction is None:
        return parsed
    if given == ["text"]:
        names = [*inputs.given, *(["instruction"] if inputs.instruction is not None else [])]
        raise RowError(f"{', '.join(names)}: a text is scored as it stands, without a template; send messages")
    conversations = [item for item in parsed.items if isinstance(item, Conversation)]
    return replace(parsed, items=tuple(replace(item, inputs=inputs) for item in conversations))


def _template_inputs(row: dict[str, Any]) -> TemplateInputs:
    """Return what the row gives the chat template.

    `tools` and `documents` may be strings of JSON, as in data set columns.
    """
    if not any(row.get(name) for name in TEMPLATE_FIELDS) and row.get("instruction") is None:
        return NO_INPUTS
    lists: dict[str, list[dict[str, Any]] | None] = {}
    for name in ("tools", "documents"):
        value = row.get(name) or None
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise RowError(f"{name}: expected a list of objects, found a string that is not JSON") from None
        if value is not None and not isinstance(value, list | tuple):
            raise RowError(f"{name}: expected a list of objects, found {type(value).__name__}")
        for index, item in enumerate(value or ()):
            if not isinstance(item, dict):
                raise RowError(f"{name}[{index}]: expected an object, found {type(item).__name__}")
        lists[name] = check_json(list(value), name) if value else None
    options = row.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise RowError(f"chat_template_kwargs: expected an object, found {type(options).__name__}")
    for name in options:
        if name in RESERVED or not isinstance(name, str):
            raise RowError(f"chat_template_kwargs.{name}: expected variables of the chat template; leave this one out")
    checked = check_json(options, "chat_template_kwargs")
    return TemplateInputs(lists["tools"], lists["documents"], checked, _instruction(row))


def _instruction(row: dict[str, Any]) -> str | None:
    value = row.get("instruction")
    return (check_string(value, "instruction") or None) if value is not None else None


def _parse_answers(row: dict[str, Any], given: list[str]) -> Row:
    match given:
        case ["text"]:
            return Row("single", (_raw_text(row["text"]),))
        case ["messages"]:
            return Row("single", (_conversation((), row["messages"], "messages"),))
        case ["prompt" | "messages" as name, "response"]:
            return Row("single", (_answered(_prompt(row, name), row["response"], "response"),))
        case ["prompt" | "messages" as name, "responses"]:
            prompt, responses = _prompt(row, name), row["responses"]
            if not isinstance(responses, list | tuple) or not responses:
                found = "an empty list" if isinstance(responses, list | tuple) else type(responses).__name__
                raise RowError(f"responses: expected a list of at least one string, found {found}")
            answers = enumerate(responses)
            return Row("ranking", tuple(_answered(prompt, answer, f"responses[{index}]") for index, answer in answers))
        case ["prompt" | "messages" as name, "chosen", "rejected"]:
            prompt = _prompt(row, name)
            return Row("pair", tuple(_candidate(prompt, row[side], side) for side in ("chosen", "rejected")))
        case ["chosen", "rejected"] if not (isinstance(row["chosen"], str) or isinstance(row["rejected"], str)):
            return Row("pair", tuple(_conversation((), row[side], side) for side in ("chosen", "rejected")))
        case _:
            found = " and ".join(given) or "none of these fields"
            raise RowError(f"{EXPECTED}; found {found}{advice(row, given)}")


def _may_have_steps(row: dict[str, Any], found: list[str]) -> bool:
    """Whether `steps` means the steps of an answer; in rows of other shapes it is a field of the user's own."""
    one_answer = found in (["prompt"], ["messages"], ["prompt", "response"], ["messages", "response"])
    return found == ["prompt"] or (one_answer and isinstance(row["steps"], list | tuple))


def _steps(row: dict[str, Any], name: str) -> Steps:
    steps = row["steps"]
    if not isinstance(steps, list | tuple) or not steps:
        found = "an empty list" if isinstance(steps, list | tuple) else type(steps).__name__
        raise RowError(f"steps: expected a list of at least one string, found {found}")
    checked = tuple(check_string(step, f"steps[{index}]") for index, step in enumerate(steps))
    if "" in checked:
        raise RowError(f"steps[{checked.index('')}]: expected at least one character, found an empty string")
    response = row.get("response")
    if response is not None:
        return Steps(_prompt(row, name), checked, check_string(response, "response"))
    turns = check_messages(row[name], name) if name == "messages" else ()
    if turns and turns[-1]["role"] == "assistant":
        whole = _conversation((), turns, name)
        return Steps(whole.prompt, checked, content_string(whole.answer, name))
    return Steps(_prompt(row, name), checked)


def _raw_text(value: object) -> RawText:
    text = check_string(value, "text")
    if not text:
        raise RowError("text: expected at least one character, found an empty string")
    return RawText(text)


def _prompt(row: dict[str, Any], name: str) -> str | tuple[Message, ...]:
    """Return the prompt: a string (one user turn, only as `prompt`) or messages that do not end with the assistant."""
    value = row[name]
    if name == "prompt" and isinstance(value, str):
        if not value:
            raise RowError("prompt: expected at least one character, found an empty string")
        return check_string(value, name)
    if not isinstance(value, list | tuple):
        expected = "a list of messages" if name == "messages" else "a string or a list of messages"
        raise RowError(f"{name}: expected {expected}, found {type(value).__name__}")
    turns = check_messages(value, name)
    if turns[-1]["role"] == "assistant":
        where = f"{name}[{len(turns) - 1}].role"
        raise RowError(f"{where}: expected the messages to end before the answer that is scored, found 'assistant'")
    return turns


def _answered(prompt: str | tuple[Message, ...], answer: object, where: str) -> Conversation:
    return Conversation(prompt, {"role": "assistant", "content": check_string(answer, where)})


def _candidate(prompt: str | tuple[Message, ...], value: object, where: str) -> Conversation:
    """Return the conversation that `chosen` or `rejected` stands for."""
    if isinstance(value, list | tuple):
        return _conversation(prompt, value, where)
    if isinstance(value, str):
        return _answered(prompt, value, where)
    raise RowError(f"{where}: expected a string or a list of messages, found {type(value).__name__}")


def _conversation(prompt: str | tuple[Message, ...], value: object, where: str) -> Conversation:
    """Return the conversation of a prompt and the messages after it, which may repeat the prompt."""
    turns, before = check_messages(value, where), as_turns(prompt)
    if turns[-1]["role"] != "assistant":
        where, found = f"{where}[{len(turns) - 1}].role", turns[-1]["role"]
        raise RowError(f"{where}: expected the conversation to end with 'assistant', found {found!r}")
    if len(turns) > len(before) and turns[: len(before)] == before:
        turns = turns[len(before) :]
    if before and turns[0]["role"] != "assistant":
        expected = "the assistant's turn, or a conversation that begins with the prompt's own messages"
        raise RowError(f"{where}[0].role: expected {expected}, found {turns[0]['role']!r}")
    if not before and len(turns) == 1:
        raise RowError(f"{where}: expected a conversation and its answer, found an answer alone")
    return Conversation(prompt if len(turns) == 1 else (*before, *turns[:-1]), turns[-1])
