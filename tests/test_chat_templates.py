"""Text rendering: the same strings as transformers, and refusals that say what is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest

from chat_templates import CHATML, CHATML_ONE_LINE, CONVERSATIONS, FAMILIES, GEMMA, LLAMA_2, LLAMA_3_1, QWEN_3
from rewardrt.bundle.spec import TextRule
from rewardrt.errors import BundleError, RowError
from rewardrt.text.chat_template import ChatTemplate
from rewardrt.text.items import Conversation, RawText, check_messages
from rewardrt.text.rendering import RenderedText, Renderer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
CHAT = Conversation("Hi", HI[1])

Reference = Callable[[str, list[dict[str, Any]]], str]


def rule(source: str = "chat_template", strip: str = "", end: str | None = None, prefix: str = "") -> TextRule:
    return TextRule(source, strip_tail=strip, append_if_missing=end or "", append_prefix=prefix)  # type: ignore[arg-type]


def refusal(template: str, messages: list[dict[str, Any]]) -> str:
    with pytest.raises(RowError) as caught:
        ChatTemplate(template, SPECIAL).render(messages)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def reference() -> Reference:
    """transformers' own rendering."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<s>": 0, "</s>": 1, "<pad>": 2, "a": 3}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a")), **SPECIAL
    )

    def render(template: str, messages: list[dict[str, Any]]) -> str:
        text: str = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=False
        )
        return text

    return render


@pytest.mark.parametrize("family", FAMILIES)
def test_renders_what_transformers_renders_and_refuses_what_it_refuses(family: str, reference: Reference) -> None:
    template = ChatTemplate(FAMILIES[family], SPECIAL)
    rendered, refused = 0, dict[str, str]()
    for name, messages in CONVERSATIONS.items():
        try:
            expected = reference(FAMILIES[family], messages)
        except Exception as error:
            refused[name] = " ".join(str(error).split())
        else:
            rendered += 1
            assert template.apply(messages) == expected, name
            if family != "loop_controls":  # whose template leaves out turns, on purpose
                assert template.render(messages) == expected, name
    for name, words in refused.items():
        assert words in refusal(FAMILIES[family], CONVERSATIONS[name]), name
    assert rendered >= 12


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].nothing.at_all }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ 1 // 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% set ns = namespace(_x=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ dict.__subclasses__() }}",
        "{% for i in range(10 ** 6) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'other' %}",
        "{{ raise_exception('two\nlines') }}",
        "{{ messages | tojson(indent=messages) }}",
        "{{ messages[0] | tojson(cls=1) }}",
    ],
)
def test_a_template_that_fails_refuses_the_row_in_both(source: str, reference: Reference) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011
        reference(source, HI)
    assert refusal(source, HI).startswith("the chat template refuses this conversation: ")


@pytest.mark.parametrize(
    "source",
    [
        "{{ namespace(self=1, a=2).self }}{{ namespace({'b': 3}).b }}",
        "{{ dict(a=1) }}{{ dict.fromkeys('ab', 0) }}{{ dict([('k', 'v')]) }}",
        "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ cls_token is defined }}{{ pad_token }}",
        "{{ range(3) | list }}{{ cycler('a', 'b').next() }}{{ joiner(',')() }}{{ lipsum is defined }}",
        "  {% if true %}  \n x {% endif %}\n\n y\n",
        "{{ messages[0].items() | list }}{{ messages[-1]['content'][::-1] }}{{ '%s-%d' % ('a', 3) }}{{ '{}'.format(1) }}",
    ],
)
def test_globals_and_whitespace_are_transformers_own(source: str, reference: Reference) -> None:
    assert ChatTemplate(source, SPECIAL).apply(HI) == reference(source, HI)


def test_chatml_renders_to_this_string() -> None:
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    assert ChatTemplate(CHATML_ONE_LINE, SPECIAL).render(HI) == expected
    assert ChatTemplate(CHATML, SPECIAL).render(HI) == "<|im_start|>system\nBe useful.<|im_end|>\n" + expected


def test_llama_2_renders_to_this_string() -> None:
    messages = [{"role": "system", "content": "Be terse."}, *HI]
    expected = "<s>[INST] <<SYS>>\nBe terse.\n<</SYS>>\n\nHi [/INST] Hello! </s>"
    assert ChatTemplate(LLAMA_2, SPECIAL).render(messages) == expected


def test_qwen_3_drops_earlier_thinking_and_keeps_the_last() -> None:
    assert ChatTemplate(QWEN_3, SPECIAL).render(CONVERSATIONS["thinking"]) == (
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>\nadd again\n</think>\n\n4<|im_end|>\n"
    )


def test_generation_blocks_render_what_is_inside() -> None:
    source = "{% for m in messages %}{% generation %}[{{ m.content }}]{% endgeneration %}{% endfor %}"
    assert ChatTemplate(source, SPECIAL).render(HI) == "[Hi][Hello!]"


def test_loop_controls_skip_and_stop() -> None:
    source = "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert ChatTemplate(source, SPECIAL).apply(HI) == "023"


def test_tojson_escapes_nothing_unless_told_to() -> None:
    source = "{{ {'b': '<é>', 'a': 1} | tojson }} {{ 'é' | tojson(ensure_ascii=true) }} {{ [1] | tojson(indent=1) }}"
    assert ChatTemplate(source, SPECIAL).apply(HI) == '{"b": "<é>", "a": 1} "\\u00e9" [\n 1\n]'


def test_strftime_now_is_today_and_is_noticed() -> None:
    before = datetime.now()
    text = ChatTemplate(LLAMA_3_1, SPECIAL).render(HI)
    assert any(f"Today: {day:%d %b %Y}\n" in text for day in (before, datetime.now()))
    assert ChatTemplate(LLAMA_3_1, SPECIAL).uses_date
    assert not ChatTemplate(CHATML + "{# strftime_now #}strftime_now{{ 'strftime_now' }}", SPECIAL).uses_date


def test_a_refusal_repeats_the_templates_own_words() -> None:
    messages = [{"role": "system", "content": "x"}, *HI]
    assert refusal(GEMMA, messages) == "the chat template refuses this conversation: No system role here"
    assert refusal("{{ x.y }}", HI) == "the chat template refuses this conversation: 'x' is undefined"
    assert refusal("{{ raise_exception('') }}", HI) == "the chat template refuses this conversation: TemplateError"


@pytest.mark.parametrize(
    "source", ["{% for m in messages %}", "{{ x | no_such_filter }}", "{{ }}", "{" * 3, "{% generation %}"]
)
def test_a_template_that_is_not_jinja_is_a_damaged_bundle(source: str) -> None:
    with pytest.raises(BundleError, match=r"^the chat template is not valid Jinja \(.+\); mend it and export again$"):
        ChatTemplate(source, SPECIAL)


def test_a_template_that_python_cannot_compile_is_a_damaged_bundle() -> None:
    for source in ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% if x %}" * 150 + "{% endif %}" * 150):
        with pytest.raises(BundleError):
            ChatTemplate(source, SPECIAL)


def test_a_role_that_the_template_drops_is_an_error_that_names_it() -> None:
    messages = [{"role": "developer", "content": " Be terse. "}, *HI]
    assert refusal(QWEN_3, messages) == (
        "messages[0]: the chat template leaves out what role 'developer' says, so the reward would not depend on it; "
        "expected system, user, assistant or tool"
    )
    assert "Be terse." in ChatTemplate(CHATML_ONE_LINE, SPECIAL).render(messages)
    silent = [{"role": "developer", "content": " "}, *HI]
    assert ChatTemplate(QWEN_3, SPECIAL).render(silent) == ChatTemplate(QWEN_3, SPECIAL).render(HI)


def test_rendering_leaves_the_messages_as_they_were() -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "x", "n": None}, {**HI[1], "thinking": "t"}]
    ChatTemplate(QWEN_3, SPECIAL).render(messages)
    assert messages == [{"role": "user", "content": "x", "n": None}, {**HI[1], "thinking": "t"}]


def test_raw_text_is_not_touched() -> None:
    renderer = Renderer(rule(strip="\n", end="</s>"), ChatTemplate(CHATML, SPECIAL))
    assert renderer.render(RawText("as sent\n\n")) == RenderedText("as sent\n\n", is_raw=True)


@pytest.mark.parametrize(
    ("strip", "end", "prefix", "expected"),
    [
        ("", None, "", "Hi|Hello!\n"),
        ("\n", None, "", "Hi|Hello!"),
        ("\n", "</s>", " ", "Hi|Hello! </s>"),
        ("", "</s>", "", "Hi|Hello!\n</s>"),
        ("\n", "!", " ", "Hi|Hello!"),
        ("!\n", "!", "", "Hi|Hello!"),
    ],
)
def test_the_tail_is_stripped_and_the_end_appended(strip: str, end: str | None, prefix: str, expected: str) -> None:
    template = ChatTemplate("{{ messages | map(attribute='content') | join('|') }}{{ '\\n' }}", SPECIAL)
    renderer = Renderer(rule(strip=strip, end=end, prefix=prefix), template)
    assert renderer.render(CHAT) == RenderedText(expected, is_raw=False)


def test_a_string_prompt_is_one_user_turn() -> None:
    renderer = Renderer(rule(), ChatTemplate(CHATML, SPECIAL))
    assert renderer.render(CHAT) == renderer.render(Conversation((HI[0],), HI[1]))


def test_without_a_template_prompt_and_answer_are_joined() -> None:
    renderer = Renderer(rule("concatenate", end="</s>"), None)
    assert renderer.render(CHAT) == RenderedText("HiHello!</s>", is_raw=False)
    assert renderer.render(Conversation((HI[0],), HI[1])) == renderer.render(
        CHAT
    )  # one round is a prompt and its answer
    message = (
        "this model has no chat template: expected text, or one prompt and its answer; found a longer conversation"
    )
    with pytest.raises(RowError, match=f"^{message}$"):
        renderer.render(Conversation((HI[0], HI[1], HI[0]), HI[1]))


def test_a_format_takes_prompt_and_answer_and_looks_into_neither() -> None:
    renderer = Renderer(TextRule(source="format", format="USER: {prompt} ASSISTANT:{response}"), None)
    conversation = Conversation("say {response}", {"role": "assistant", "content": "{prompt}"})
    assert renderer.render(conversation).text == "USER: say {response} ASSISTANT:{prompt}"


def test_a_pair_stays_two_texts() -> None:
    assert Renderer(TextRule(source="pair"), None).render(CHAT) == RenderedText("Hi", is_raw=False, pair="Hello!")


def test_a_rule_that_needs_a_template_does_not_load_without() -> None:
    with pytest.raises(BundleError, match=r"^the text rule needs a chat template, and there is none"):
        Renderer(rule(), None)


def test_nothing_to_tokenize_is_an_error() -> None:
    blank = Conversation("Hi", {"role": "assistant", "content": ""})
    with pytest.raises(RowError, match=r"^the conversation renders to an empty text"):
        Renderer(rule(), ChatTemplate("{{ messages[-1].content }}", SPECIAL)).render(blank)


def test_a_surrogate_that_reaches_the_text_is_an_error() -> None:
    (message,) = check_messages([{**HI[1], "tool_calls": ["\ud800"]}], "messages")
    with pytest.raises(RowError, match=r"^the rendered text: .* found the lone surrogate U\+D800 at character 7$"):
        Renderer(rule(), ChatTemplate("{{ messages[1].content + messages[1].tool_calls[0] }}", SPECIAL)).render(
            Conversation("Hi", message)
        )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hi", "messages: expected a list of messages, found str"),
        ({"role": "user"}, "messages: expected a list of messages, found dict"),
        ([], "messages: expected at least one message, found an empty list"),
        ([HI[0], "Hi"], "messages[1]: expected an object with role and content, found str"),
        ([None], "messages[0]: expected an object with role and content, found NoneType"),
        ([{"role": "user"}], "messages[0]: expected role and content, found no content"),
        ([{}], "messages[0]: expected role and content, found no role and no content"),
        ([HI[0], HI[1], {"role": "user", "content": 3}], "messages[2].content: expected a string, found int"),
        ([{"role": "user", "content": None}], "messages[0].content: expected a string, found NoneType"),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            "messages[0].content[0].text: expected a string, found NoneType",
        ),
        (
            [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}],
            'messages[0].content[0]: expected {"type": "text", "text": ...}, since only text is scored; found \'image\'',
        ),
        (
            [{"role": "user", "content": ["Hi"]}],
            'messages[0].content[0]: expected {"type": "text", "text": ...}, since only text is scored; found \'str\'',
        ),
        ([{"role": "assistant", "content": None}], "messages[0].content: expected a string, found NoneType"),
        ([{"role": 1, "content": "x"}], "messages[0].role: expected a string, found int"),
        (
            [{"role": "", "content": "x"}],
            "messages[0].role: expected system, user, assistant or tool, found an empty string",
        ),
        (
            [{"role": "user", "content": "ab\udfff"}],
            "messages[0].content: expected text that can be encoded as UTF-8, found the lone surrogate U+DFFF at character 3",
        ),
        (
            [{"role": "user", "content": "x", "image": object}],
            "messages[0]: expected JSON values only, found something else (Object of type type is not JSON serializable)",
        ),
    ],
)
def test_a_message_that_is_none_is_named_by_its_place(messages: Any, message: str) -> None:
    with pytest.raises(RowError, match=f"^{re.escape(message)}$"):
        check_messages(messages, "messages")


def test_messages_reach_the_template_as_plain_values_in_their_order() -> None:
    class Loud(str):
        def strip(self, *_: Any) -> str:
            return "LOUD"

    sent = {"name": Loud("a"), "content": Loud("c"), "tool_calls": ({"x": (1, 2.5, None)},), "role": Loud("user")}
    (message,) = check_messages((sent,), "messages")
    assert list(message.items()) == [
        ("name", "a"), ("content", "c"), ("tool_calls", [{"x": [1, 2.5, None]}]), ("role", "user"),
    ]  # fmt: skip
    assert {type(message[name]) for name in ("name", "content", "role")} == {str}
    (message,) = check_messages([{"content": Loud("c"), "role": "user"}], "messages")
    assert (list(message), type(message["content"])) == (["content", "role"], str)


def test_importing_the_module_does_not_import_jinja() -> None:
    code = "import sys, rewardrt.text; sys.exit('jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
