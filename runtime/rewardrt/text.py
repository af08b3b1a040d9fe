"""From one item to the string that is tokenized.

An item is raw text, scored exactly as sent, or a conversation that ends with the assistant's answer. Templates render
as transformers' `apply_chat_template` does: same sandbox, extensions and names. Token ids are `tokens`' business.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any

from rewardrt.errors import BundleError, RowError
from rewardrt.spec import TextRule

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = dict[str, Any]

KNOWN_ROLES = frozenset({"system", "user", "assistant", "tool"})


@dataclass(frozen=True)
class RawText:
    """A text that is scored exactly as sent; on request with the special tokens that the tokenizer itself adds."""

    text: str
    special_tokens: bool = False


@dataclass(frozen=True)
class Conversation:
    """What came before, and the assistant's answer to it. A prompt that is a string is one user turn."""

    prompt: str | tuple[Message, ...]
    answer: Message

    @property
    def messages(self) -> tuple[Message, ...]:
        """The whole conversation, the answer last."""
        return (*as_turns(self.prompt), self.answer)


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, in the order in which a model that compares them reads them."""

    first: Conversation
    second: Conversation


@dataclass(frozen=True)
class Steps:
    """What came before, and the steps of the assistant's answer to it, for a reward each.

    `response` is the answer as a whole where the row has it: what models score that reward no steps.
    """

    prompt: str | tuple[Message, ...]
    steps: tuple[str, ...]
    response: str | None = None


Item = RawText | Conversation | Pair | Steps


@dataclass(frozen=True)
class RenderedText:
    """The string to tokenize, and whether it is to be tokenized with nothing added."""

    text: str
    is_raw: bool
    pair: str | None = None  # the second text, for models that read a pair
    prompt: str | None = None  # the first message alone, for models that read at its end
    special_tokens: bool = False  # whether raw text gets the tokenizer's own special tokens
    steps: int | None = None  # how many the row has; None where it does not say
    # Texts that are tokenized each by itself, one after the other; together they are `text`. Of the step layout
    # "apart": what comes before the response, then each step and its step token.
    pieces: tuple[str, ...] = ()


class ChatTemplate:
    """A Jinja chat template and the special tokens that it may name.

    Raises BundleError for a template that is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        from jinja2 import nodes  # importing jinja2 costs as much as the rest of this package

        environment = _environment()
        try:
            tree = environment.parse(source)
            self._uses_date = any(node.name == "strftime_now" for node in tree.find_all(nodes.Name))
            self._template = environment.from_string(tree)
        except Exception as error:  # besides its own errors, Jinja lets Python's compiler and recursion errors out
            message = f"the chat template is not valid Jinja ({_one_line(error)}); mend it and export again"
            raise BundleError(message) from error
        self._special_tokens = dict(special_tokens)

    @property
    def uses_date(self) -> bool:
        """Whether the output may depend on today's date."""
        return self._uses_date

    def render(self, messages: Sequence[Message]) -> str:
        """Return what `apply_chat_template(messages, tokenize=False, add_generation_prompt=False)` returns.

        Raises RowError when the template refuses the messages, or leaves out one with a role that it does not know.
        """
        try:
            text = self._template.render(
                **self._special_tokens,
                messages=[_without_none(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=False,
            )
        except Exception as error:  # the template is a program from the bundle: it can raise anything
            raise RowError(f"the chat template refuses this conversation: {_one_line(error)}") from error
        for index, message in enumerate(messages):
            if message["role"] not in KNOWN_ROLES and message["content"].strip() not in text:
                raise RowError(
                    f"messages[{index}]: the chat template leaves out what role {message['role']!r} says; "
                    "expected system, user, assistant or tool"
                )
        return text


class Renderer:
    """Applies a model's text rule to items, up to the string."""

    def __init__(self, rule: TextRule, template: ChatTemplate | None, *, with_prompt: bool = False) -> None:
        if rule.source == "chat_template" and template is None:
            raise BundleError("the text rule needs a chat template, and there is none; export the checkpoint again")
        self._rule = rule
        self._template = template if rule.source == "chat_template" else None
        self._prompt_template = ChatTemplate(rule.prompt_template, {}) if rule.prompt_template else None
        self._with_prompt = with_prompt

    def render(self, item: Item) -> RenderedText:
        """Return the string that is tokenized for this item, or raise RowError."""
        if isinstance(item, RawText):
            return RenderedText(item.text, is_raw=True, special_tokens=item.special_tokens)
        shown = item if isinstance(item, Pair) else self.conversation(item)
        steps = len(item.steps) if self.rewards_steps and isinstance(item, Steps) else None
        if self._rule.source == "pair" and isinstance(shown, Conversation):
            question, answer = self._strings(shown)
            return RenderedText(question, is_raw=False, pair=answer)
        if self._rule.source == "segments":
            segments = tuple(check_string(self._fill(segment, shown), "a segment") for segment in self._rule.segments)
            return RenderedText("".join(segments), is_raw=False, pieces=segments)
        if self._rule.step_layout == "apart" and isinstance(item, Steps):
            before = self._join(Conversation(item.prompt, {"role": "assistant", "content": ""}))
            pieces = (before, *(piece for step in item.steps for piece in (step, self._rule.step_token)))
            return RenderedText("".join(pieces), is_raw=False, steps=steps, pieces=pieces)
        text = self._join(shown).replace(self._rule.remove, "").rstrip(self._rule.strip_tail)
        end = self._rule.append_if_missing
        if end and not text.endswith(end):
            text += self._rule.append_prefix + end
        if not text:
            raise RowError("the conversation renders to an empty text; expected at least one character")
        prompt = self._first_message(shown) if self._with_prompt else None
        return RenderedText(check_string(text, "the rendered text"), is_raw=False, prompt=prompt, steps=steps)

    @property
    def rewards_steps(self) -> bool:
        """Whether the model gives a reward to every step of an answer."""
        return bool(self._rule.step_token)

    def conversation(self, item: Conversation | Steps) -> Conversation:
        """Return what the model is shown of this item: its steps as the rule lays them out.

        Raises RowError for an answer in one piece where the model rewards steps, and the other way around.
        """
        if isinstance(item, Conversation):
            if self.rewards_steps:
                raise RowError(
                    "this model rewards the steps of an answer: expected steps, found an answer in one piece"
                )
            return item
        if self.rewards_steps:
            return self._lay_out(item)
        if item.response is None:
            raise RowError("this model gives one reward to an answer: expected response, found steps")
        return Conversation(item.prompt, {"role": "assistant", "content": item.response})

    def _lay_out(self, item: Steps) -> Conversation:
        token = self._rule.step_token
        if self._rule.step_layout != "turns":
            for index, step in enumerate(item.steps):
                # Two spaces are one token, and the step token another one than the model knows.
                if token[0].isspace() and step[-1:].isspace():
                    raise RowError(f"steps[{index}]: ends with white space, which runs into the step token {token!r}")
            response = "".join(step + token for step in item.steps)
            return Conversation(item.prompt, {"role": "assistant", "content": response})
        *before, last = as_turns(item.prompt)
        if last["role"] != "user":
            raise RowError(
                f"this model reads steps as turns of the user, after the user's; found {last['role']!r} before"
            )
        first = {**last, "content": f"{last['content']} {item.steps[0]}"}
        users = [first, *({"role": "user", "content": step} for step in item.steps[1:])]
        answer = {"role": "assistant", "content": token}
        turns = [turn for user in users for turn in (user, answer)]
        return Conversation((*before, *turns[:-1]), answer)

    def _join(self, item: Conversation | Pair) -> str:
        if self._template is not None:
            return self._template.render(self._turns(item))
        return self._fill("{prompt}{response}" if self._rule.source == "concatenate" else self._rule.format, item)

    def messages(self, item: Conversation | Pair | Steps) -> tuple[Message, ...]:
        """Return the messages that the chat template is applied to."""
        return self._turns(item if isinstance(item, Pair) else self.conversation(item))

    def _turns(self, shown: Conversation | Pair) -> tuple[Message, ...]:
        if isinstance(shown, Conversation) and not self._rule.format:
            return shown.messages
        return ({"role": "user", "content": self._fill(self._rule.format, shown)},)

    def _fill(self, format: str, item: Conversation | Pair) -> str:
        """Put prompt and answers into the places that a format has for them."""
        conversation = item.first if isinstance(item, Pair) else item
        if self._prompt_template is None:
            prompt, answer = self._strings(conversation)
        else:
            prompt = self._prompt_template.render(as_turns(conversation.prompt))
            answer = str(conversation.answer["content"])
        values = {"{prompt}": prompt, "{response}": answer}
        if isinstance(item, Pair):
            values = {"{prompt}": prompt, "{first}": answer, "{second}": str(item.second.answer["content"])}
        # Split first: what the texts hold is not looked at for placeholders.
        parts = re.split(r"(\{prompt\}|\{response\}|\{first\}|\{second\})", format)
        return "".join(values.get(part, part) for part in parts)

    def _first_message(self, item: Conversation | Pair) -> str:
        first = as_turns((item.first if isinstance(item, Pair) else item).prompt)[0]
        return str(first["content"]) if self._template is None else self._template.render((first,))

    def _strings(self, item: Conversation) -> tuple[str, str]:
        """Return prompt and answer of a conversation of one round, for models that know no other."""
        if isinstance(item.prompt, str):
            return item.prompt, str(item.answer["content"])
        if len(item.prompt) == 1 and item.prompt[0]["role"] == "user":
            return str(item.prompt[0]["content"]), str(item.answer["content"])
        raise RowError(
            "this model has no chat template: expected text, or one prompt and its answer; found a longer conversation"
        )


def as_turns(prompt: str | tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the messages that a prompt stands for."""
    return ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt


def check_string(value: object, where: str) -> str:
    """Return `value` if it is a string that can be encoded, or raise RowError naming the place."""
    if not isinstance(value, str):
        raise RowError(f"{where}: expected a string, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = f"the lone surrogate U+{ord(value[error.start]):04X} at character {error.start + 1}"
        raise RowError(f"{where}: expected text that can be encoded as UTF-8, found {found}") from None
    return str.__str__(value)  # a subclass would bring its own methods into the template's sandbox


def check_messages(value: object, where: str) -> tuple[Message, ...]:
    """Return a copy of a list of messages if it is one, or raise RowError naming the place.

    A message is an object with the strings `role` and `content`; what else it holds is passed on to the template.
    """
    if not isinstance(value, list | tuple):
        raise RowError(f"{where}: expected a list of messages, found {type(value).__name__}")
    if not value:
        raise RowError(f"{where}: expected at least one message, found an empty list")
    return tuple(_check_message(message, f"{where}[{index}]") for index, message in enumerate(value))


def _check_message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise RowError(f"{where}: expected an object with role and content, found {type(value).__name__}")
    if missing := [name for name in ("role", "content") if name not in value]:
        raise RowError(f"{where}: expected role and content, found no {' and no '.join(missing)}")
    role = check_string(value["role"], f"{where}.role")
    content = check_string(value["content"], f"{where}.content")
    if not role:
        raise RowError(f"{where}.role: expected system, user, assistant or tool, found an empty string")
    if len(value) == 2:
        return {name: role if name == "role" else content for name in value}
    try:
        message: Message = json.loads(json.dumps({**value, "role": role, "content": content}))
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(f"{where}: expected JSON values only, found something else ({_one_line(error)})") from None
    return message


def _without_none(message: Message) -> Message:
    """Return the message as transformers shows it to a template: no null, and the reasoning under each of its names."""
    message = {name: value for name, value in message.items() if value is not None}
    for name in ("reasoning_content", "thinking", "reasoning"):
        if name in message:
            return {"thinking": message[name], **message, "reasoning_content": message[name]}
    return message


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    """Return the environment in which transformers 5.23 renders chat templates."""
    import jinja2
    from jinja2 import ext, nodes, parser, utils

    from rewardrt.template_limits import LimitedEnvironment

    class Generation(ext.Extension):
        """`{% generation %}` marks the assistant's tokens for training; here it only renders what is inside."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: parser.Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

        def _render(self, caller: Any) -> Any:
            return caller()

    class Namespace(utils.Namespace):
        """Jinja's `namespace`, closed to names that reach Python's own attributes."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # so that `namespace(self=...)` works
            attributes = dict(*args[1:], **kwargs)
            for name in attributes:
                Namespace.check_name(name)
            utils.Namespace.__init__(args[0], attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            Namespace.check_name(name)
            utils.Namespace.__setitem__(self, name, value)

        @staticmethod
        def check_name(name: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace takes no name with a leading underscore: {name!r}")

    class Dict:
        """Jinja's `dict`, without the type's own attributes."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    environment = LimitedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "dict": Dict(),
        "namespace": Namespace,
    }
    return environment
