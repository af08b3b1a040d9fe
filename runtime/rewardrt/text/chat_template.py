"""The chat template: from messages to the text that transformers' `apply_chat_template` gives.

A chat template is a Jinja program from the checkpoint. It runs in the same sandbox as in transformers, with the same
extensions and names. If the template ignores something in a row, that is an error; nothing is left out silently.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Literal

from rewardrt.errors import BundleError, RowError

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = dict[
    str, Any
]  # `content`: a string, a list of parts {"type": "text", "text": ...}, or null beside tool calls
ContentKind = Literal["string", "parts"]

KNOWN_ROLES = frozenset({"system", "user", "assistant", "tool"})
# Arguments of apply_chat_template itself: a template's variable cannot have one of these names.
RESERVED = frozenset(
    {
        "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize",
        "continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict",
        "return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens",
    }
)  # fmt: skip
_KINDS: tuple[ContentKind, ...] = ("string", "parts")
_PRINTED_PART = re.compile(r"""type['"]: ?['"]text""")  # a list of parts as Python or JSON writes it
_SHAPES = 1024  # shapes of conversations that are remembered as shown completely; above this the memory is cleared


@dataclass(frozen=True)
class TemplateInputs:
    """What a row gives the chat template besides its messages.

    `tools` and `documents` are lists of JSON objects. `options` are the row's `chat_template_kwargs`: variables that
    the template reads by name, such as `enable_thinking`. `instruction` says what is to be judged (a policy, or what
    makes a document relevant); the text rule decides where it is put.
    """

    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    instruction: str | None = None

    @property
    def given(self) -> list[str]:
        """The names of the variables that are set."""
        return [*(["tools"] if self.tools else []), *(["documents"] if self.documents else []), *self.options]


NO_INPUTS = TemplateInputs()


class ChatTemplate:
    """A Jinja chat template and the special tokens that it may use.

    With `generation_prompt` a text ends with the beginning of the model's own turn (`add_generation_prompt`). Raises
    BundleError for a template that is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: dict[str, str], *, generation_prompt: bool = False) -> None:
        from jinja2 import meta, nodes  # importing jinja2 costs as much as the rest of this package

        environment = _environment()
        try:
            tree = environment.parse(source)
            self.variables = frozenset(meta.find_undeclared_variables(tree))  # names that a caller can set
            self.uses_date = any(node.name == "strftime_now" for node in tree.find_all(nodes.Name))
            self._template = environment.from_string(tree)
        except Exception as error:  # Jinja raises its own errors, but also Python's SyntaxError and RecursionError
            message = f"the chat template is not valid Jinja ({_one_line(error)}); mend it and export again"
            raise BundleError(message) from error
        self._special_tokens = dict(special_tokens)
        self._generation_prompt = generation_prompt
        self._shown: set[Any] = set()

    @cached_property
    def content_kinds(self) -> dict[str, frozenset[ContentKind]]:
        """Which kinds of content the template can show, for a user's and for an assistant's message.

        A template that reads content only as parts shows nothing of a string. A template that reads content only as a
        string fails on a list of parts, or prints it as Python or JSON. Which kinds a template reads cannot be seen
        from its source, so both are tried.
        """
        found: dict[str, set[ContentKind]] = {"user": set(), "assistant": set()}
        words = {"user": sentinel(0), "assistant": sentinel(1)}
        for kinds in itertools.product(_KINDS, repeat=2):
            tried = dict(zip(words, kinds, strict=True))
            try:
                text = self.apply([_said(role, kind, words[role]) for role, kind in tried.items()], NO_INPUTS)
            except RowError as error:
                if isinstance(error.__cause__, _security_error()):  # the sandbox stops it for any input
                    raise
                continue
            for role, kind in tried.items():
                if words[role] in text and (kind == "string" or not _PRINTED_PART.search(text)):
                    found[role].add(kind)
        return {role: frozenset(kinds or _KINDS[:1]) for role, kinds in found.items()}

    def render(self, messages: Sequence[Message], inputs: TemplateInputs = NO_INPUTS) -> str:
        """Return what transformers' `apply_chat_template(messages, tokenize=False)` returns.

        `inputs` are passed to the template as transformers passes `tools`, `documents` and further arguments. Content
        is converted to a form that the template shows: a string becomes one text part if the template only reads parts,
        and one text part becomes a string if it only reads strings.

        Raises RowError if the template refuses the messages, does not read one of the inputs, leaves out a message
        whose role it does not know, or gives the same text without the last message's content.
        """
        if unread := [name for name in inputs.given if name not in self.variables]:
            raise RowError(
                f"{', '.join(unread)}: this model's chat template does not read it, so the reward would not depend on "
                "it; leave it out of the row"
            )
        messages = self.as_read(messages)
        text = self.apply(messages, inputs)
        self._check_shape(messages, inputs)
        self._check_answer(messages, inputs, text)
        return text

    def apply(self, messages: Sequence[Message], inputs: TemplateInputs = NO_INPUTS) -> str:
        """Return the rendered text without checking that nothing is left out; raise RowError if the template fails."""
        variables = {
            **self._special_tokens,
            **inputs.options,
            "messages": [_without_none(message) for message in messages],
            "tools": inputs.tools or None,
            "documents": inputs.documents or None,
            "add_generation_prompt": self._generation_prompt,
        }
        try:
            return self._template.render(variables)
        except Exception as error:  # the template is a program from the bundle: it can raise anything
            raise RowError(f"the chat template refuses this conversation: {_one_line(error)}") from error

    def as_read(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages with their content in a form that the template shows. Raises RowError."""
        return [self._as_read(message, f"messages[{index}]") for index, message in enumerate(messages)]

    def _as_read(self, message: Message, where: str) -> Message:
        content = message.get("content")
        kinds = self.content_kinds["assistant" if message["role"] == "assistant" else "user"]
        if isinstance(content, str) and "string" not in kinds:
            return {**message, "content": [_part(content)]}
        if isinstance(content, list) and "parts" not in kinds:
            return {**message, "content": content_string(message, where)}
        return message

    def _check_shape(self, messages: Sequence[Message], inputs: TemplateInputs) -> None:
        """Raise RowError if the template leaves out the last message, or one with an uncommon role.

        The content of these messages is replaced by a unique word, and the rendered text is searched for it. What a
        template shows depends on the shape of a conversation (roles, kinds of content, fields), so each shape is tried
        once.
        """
        last = len(messages) - 1
        shape = (
            tuple((message["role"], type(message.get("content")), tuple(sorted(message))) for message in messages),
            bool(inputs.tools),
            bool(inputs.documents),
            json.dumps(dict(inputs.options), sort_keys=True),
        )
        if shape in self._shown:
            return
        words = {
            index: sentinel(index)
            for index, message in enumerate(messages)
            if _says_something(message) and (index == last or message["role"] not in KNOWN_ROLES)
        }
        tried = list(messages)
        for index, word in words.items():
            kind: ContentKind = "string" if isinstance(messages[index]["content"], str) else "parts"
            tried[index] = {**messages[index], **_said(messages[index]["role"], kind, word)}
        try:
            text = self.apply(tried, inputs)
        except RowError:  # the template may check the content: then look for the content itself
            text = self.apply(messages, inputs)
            words = {index: content_string(messages[index], "").strip() for index in words}
        for index, word in words.items():
            if word not in text:
                raise RowError(_left_out(messages[index], index))
        if len(self._shown) >= _SHAPES:
            self._shown.clear()
        self._shown.add(shape)

    def _check_answer(self, messages: Sequence[Message], inputs: TemplateInputs, text: str) -> None:
        """Raise RowError if the text is the same without the last message's content, or without its tool calls."""
        answer, index = messages[-1], len(messages) - 1
        content, calls = answer.get("content"), answer.get("tool_calls")
        if not calls and isinstance(content, str) and content.strip() in text:  # also true of empty content
            return
        without: list[tuple[str, Message]] = []
        if _says_something(answer):
            without.append(("", {**answer, "content": ""}))
        if calls:
            bare = {name: value for name, value in answer.items() if name != "tool_calls"}
            without.append(("the tool calls of ", {"content": "", **bare} if not content else bare))
        for part, message in without:
            try:
                same = self.apply([*messages[:-1], message], inputs) == text
            except RowError:  # the template requires it, and so reads it
                continue
            if same:
                raise RowError(_left_out(answer, index, part))


def _says_something(message: Message) -> bool:
    content = message.get("content") or ""
    return any(part.strip() for part in ([content] if isinstance(content, str) else [part["text"] for part in content]))


def content_string(message: Message, where: str) -> str:
    """Return a message's content as one string, or raise RowError if it is not one.

    This is for templates and formats that do not read parts: nothing says how several parts would be joined.
    """
    content = message.get("content")
    if content is None:
        raise RowError(f"{where}.content: expected text, found none; this model reads no tool calls")
    if isinstance(content, str):
        return content
    if len(content) == 1:
        return str(content[0]["text"])
    raise RowError(
        f"{where}.content: this model reads content as one string; expected one part of text, found {len(content)} "
        "parts: join them"
    )


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _said(role: str, kind: ContentKind, text: str) -> Message:
    return {"role": role, "content": text if kind == "string" else [_part(text)]}


def sentinel(index: int) -> str:
    """Return a word that occurs in no conversation, and that no filter of a template changes."""
    return f"Rewardrtword{index}q7x"


def _left_out(message: Message, index: int, part: str = "") -> str:
    expected = "" if message["role"] in KNOWN_ROLES else "; expected system, user, assistant or tool"
    return (
        f"messages[{index}]: the chat template leaves out {part}what role {message['role']!r} says, "
        f"so the reward would not depend on it{expected}"
    )


def _without_none(message: Message) -> Message:
    """Return the message as transformers gives it to a template: no nulls, and the reasoning under all its names."""
    message = {name: value for name, value in message.items() if value is not None}
    for name in ("reasoning_content", "thinking", "reasoning"):
        if name in message:
            return {"thinking": message[name], **message, "reasoning_content": message[name]}
    return message


def _security_error() -> type[Exception]:
    from jinja2.exceptions import SecurityError

    return SecurityError


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    """Return the Jinja environment in which transformers 5.23 renders chat templates, with limits added."""
    import jinja2
    from jinja2 import ext, nodes, parser, utils

    from rewardrt.text.template_limits import LimitedEnvironment

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

        def __init__(*args: Any, **kwargs: Any) -> None:  # no named `self`, so that `namespace(self=...)` works
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
