"""From one item to the string that is tokenized. `tokens` then makes token ids of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from rewardrt.bundle.spec import TextRule
from rewardrt.errors import BundleError, RowError
from rewardrt.text.chat_template import ChatTemplate, Message, TemplateInputs, content_string, sentinel
from rewardrt.text.items import Conversation, Item, Pair, RawText, Steps, as_turns, check_string

READS_NO_INSTRUCTION = "instruction: this model reads none; put it into the prompt, as the model was trained to read it"
# The placeholders of a format.
PLACEHOLDER = re.compile(r"(\{prompt\}|\{response\}|\{instruction\}|\{first\}|\{second\})")


@dataclass(frozen=True)
class RenderedText:
    """The string to tokenize. `is_raw` means that it was sent as `text`, and the text rule adds nothing to it."""

    text: str
    is_raw: bool
    pair: str | None = None  # the second text, for models that read a pair
    prompt: str | None = None  # the first message alone, for models that read at its end
    special_tokens: bool = False  # whether raw text gets the tokenizer's own special tokens
    steps: int | None = None  # number of steps in the row; None if unknown, as for raw text
    # Returns the answer's start and end offset in `text` in characters, or None if it cannot be found. It is only
    # called for texts that are too long, because it renders the text again.
    find_answer: Callable[[], tuple[int, int] | None] | None = None
    # Texts that are tokenized separately; joined, they are `text`. With the step layout "apart" they are the text
    # before the response, then each step and its step token.
    pieces: tuple[str, ...] = ()


class Renderer:
    """Applies a model's text rule to items, up to the string that is tokenized."""

    def __init__(self, rule: TextRule, template: ChatTemplate | None, *, with_prompt: bool = False) -> None:
        if rule.source == "chat_template" and template is None:
            raise BundleError("the text rule needs a chat template, and there is none; export the checkpoint again")
        self._rule = rule
        self._template = template if rule.source == "chat_template" else None
        self._prompt_template = ChatTemplate(rule.prompt_template, {}) if rule.prompt_template else None
        self._with_prompt = with_prompt

    def render(self, item: Item) -> RenderedText:
        """Return the string to tokenize for this item, or raise RowError."""
        if isinstance(item, RawText):
            return RenderedText(item.text, is_raw=True, special_tokens=item.special_tokens)
        self._instruction((item.first if isinstance(item, Pair) else item).inputs)
        shown = item if isinstance(item, Pair) else self.conversation(item)
        steps = len(item.steps) if self.rewards_steps and isinstance(item, Steps) else None
        if self._rule.source == "pair" and isinstance(shown, Conversation):
            question, answer = self._strings(shown)
            return RenderedText(question, is_raw=False, pair=answer)
        if self._rule.source == "segments":
            segments = tuple(check_string(self._fill(segment, shown), "a segment") for segment in self._rule.segments)
            return RenderedText("".join(segments), is_raw=False, pieces=segments)
        if self._rule.step_layout == "apart" and isinstance(item, Steps):
            before = self._join(Conversation(item.prompt, {"role": "assistant", "content": ""}, item.inputs))
            pieces = (before, *(piece for step in item.steps for piece in (step, self._rule.step_token)))
            return RenderedText("".join(pieces), is_raw=False, steps=steps, pieces=pieces)
        text = self._finish(self._join(shown))
        if not text:
            raise RowError("the conversation renders to an empty text; expected at least one character")
        prompt = self._first_message(shown) if self._with_prompt else None
        return RenderedText(
            check_string(text, "the rendered text"),
            is_raw=False,
            prompt=prompt,
            steps=steps,
            find_answer=partial(self._find_answer, shown, text) if self._rule.cut == "answer" else None,
        )

    def _finish(self, text: str) -> str:
        """Remove, strip and append what the text rule says."""
        text = text.replace(self._rule.remove, "").rstrip(self._rule.strip_tail)
        end = self._rule.append_if_missing
        if end and not text.endswith(end):
            text += self._rule.append_prefix + end
        return text + self._rule.close

    def _find_answer(self, shown: Conversation | Pair, text: str) -> tuple[int, int] | None:
        """Return the answer's character offsets in its text: the part that changes if the answer is replaced."""
        if isinstance(shown, Pair):
            return None
        word = sentinel(0)
        parts = isinstance(shown.answer.get("content"), list)
        answer = {**shown.answer, "content": [{"type": "text", "text": word}] if parts else word}
        try:
            before, found, after = self._finish(self._join(replace(shown, answer=answer))).partition(word)
        except RowError:  # the template may check the answer's content
            return None
        same = found and text.startswith(before) and text[len(before) :].endswith(after)
        return (len(before), len(text) - len(after)) if same else None

    def _instruction(self, inputs: TemplateInputs) -> str:
        """Return the instruction for this row, or "" for a model that reads none. Raises RowError."""
        if not self._rule.takes_instruction:
            if inputs.instruction is not None:
                raise RowError(READS_NO_INSTRUCTION)
            return ""
        if (name := self._rule.instruction_variable) in inputs.options and inputs.instruction is not None:
            raise RowError(f"instruction: chat_template_kwargs.{name} is one already; leave one of them out")
        found, optional = inputs.instruction or self._rule.instruction, self._rule.instruction_format
        if not found and not optional and name not in inputs.options:
            raise RowError("no instruction: this model reads one, and its bundle has no default; add `instruction`")
        return optional.replace("{instruction}", found) if found and optional else found

    @property
    def rewards_steps(self) -> bool:
        """Whether the model gives a reward to every step of an answer."""
        return bool(self._rule.step_token)

    def conversation(self, item: Conversation | Steps) -> Conversation:
        """Return the conversation that the model reads for this item, with steps laid out by the text rule.

        Raises RowError if the model rewards steps and the answer is in one piece, or the other way around.
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
        return Conversation(item.prompt, {"role": "assistant", "content": item.response}, item.inputs)

    def _lay_out(self, item: Steps) -> Conversation:
        token = self._rule.step_token
        if self._rule.step_layout != "turns":
            for index, step in enumerate(item.steps):
                # Two spaces in a row would become one token, and the step token would no longer be found.
                if token[0].isspace() and step[-1:].isspace():
                    raise RowError(f"steps[{index}]: ends with white space, which runs into the step token {token!r}")
            response = "".join(step + token for step in item.steps)
            return Conversation(item.prompt, {"role": "assistant", "content": response}, item.inputs)
        *before, last = as_turns(item.prompt)
        if last["role"] != "user":
            raise RowError(
                f"this model reads the steps as the user's turns: expected a prompt that ends with role 'user', found "
                f"{last['role']!r}"
            )
        first = {**last, "content": f"{content_string(last, 'prompt')} {item.steps[0]}"}
        users = [first, *({"role": "user", "content": step} for step in item.steps[1:])]
        answer = {"role": "assistant", "content": token}
        turns = [turn for user in users for turn in (user, answer)]
        return Conversation((*before, *turns[:-1]), answer, item.inputs)

    def _join(self, item: Conversation | Pair) -> str:
        inputs = (item.first if isinstance(item, Pair) else item).inputs
        if self._template is not None:
            return self._template.render(self._turns(item), self.inputs(item))
        if inputs.given:
            raise RowError(
                f"{', '.join(inputs.given)}: this model has no chat template that could read it; leave it out"
            )
        return self._fill("{prompt}{response}" if self._rule.source == "concatenate" else self._rule.format, item)

    def inputs(self, item: Conversation | Pair | Steps) -> TemplateInputs:
        """Return what the chat template is given besides the messages, including the instruction if it reads one."""
        inputs, name = (item.first if isinstance(item, Pair) else item).inputs, self._rule.instruction_variable
        if not name or name in inputs.options:
            return inputs
        return replace(inputs, options={**inputs.options, name: self._instruction(inputs)})

    def messages(self, item: Conversation | Pair | Steps) -> tuple[Message, ...]:
        """Return the messages that the chat template is applied to."""
        return self._turns(item if isinstance(item, Pair) else self.conversation(item))

    def _turns(self, shown: Conversation | Pair) -> tuple[Message, ...]:
        if isinstance(shown, Conversation) and not self._rule.format:
            return shown.messages
        return ({"role": "user", "content": self._fill(self._rule.format, shown)},)

    def _fill(self, format: str, item: Conversation | Pair) -> str:
        """Fill prompt and answers into a format's placeholders."""
        conversation = item.first if isinstance(item, Pair) else item
        if self._prompt_template is None:
            prompt, answer = self._strings(conversation)
        else:
            prompt = self._prompt_template.render(as_turns(conversation.prompt))
            answer = content_string(conversation.answer, "the answer")
        if self._rule.strip_words:
            prompt, answer = prompt.strip(), answer.strip()
        values = {"{prompt}": prompt, "{response}": answer, "{instruction}": self._instruction(conversation.inputs)}
        if isinstance(item, Pair):
            second = content_string(item.second.answer, "the second answer")
            values = {"{prompt}": prompt, "{first}": answer, "{second}": second}
        # Split the format first, so that placeholders inside the texts are not replaced.
        parts = PLACEHOLDER.split(format)
        return "".join(values.get(part, part) for part in parts)

    def _first_message(self, item: Conversation | Pair) -> str:
        first = as_turns((item.first if isinstance(item, Pair) else item).prompt)[0]
        return content_string(first, "messages[0]") if self._template is None else self._template.render((first,))

    def _strings(self, item: Conversation) -> tuple[str, str]:
        """Return prompt and answer of a conversation of one round. Raises RowError for longer conversations."""
        if item.inputs.given:
            raise RowError(f"{', '.join(item.inputs.given)}: this model has no chat template to read it; leave it out")
        answer = content_string(item.answer, "the answer")
        if isinstance(item.prompt, str):
            return item.prompt, answer
        if len(item.prompt) == 1 and item.prompt[0]["role"] == "user":
            return content_string(item.prompt[0], "the prompt"), answer
        raise RowError(
            "this model has no chat template: expected text, or one prompt and its answer; found a longer conversation"
        )
