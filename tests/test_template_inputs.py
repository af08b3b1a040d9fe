"""What a row gives the chat template beside plain messages: transformers' text, or an error; never a text without it.

The right text is that of transformers' own apply_chat_template.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from chat_templates import CHATML_ONE_LINE, LLAMA_3_1, QWEN_3
from rewardrt.errors import RewardRTError, RowError
from rewardrt.text.chat_template import ChatTemplate
from rewardrt.text.rendering import Renderer
from rewardrt.text.rows import parse_row
from test_chat_templates import HI, SPECIAL, rule

TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": {"type": "object"}}}
]
DOCUMENTS = [{"title": "Tea", "text": "Boil water."}, {"title": "Rain", "text": "It is wet."}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
# Reads everything that transformers passes, each in its own place.
EVERYTHING = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}"
    "{% for document in documents or [] %}[{{ document.title }}: {{ document.text }}]\n{% endfor %}"
    "{% for message in messages %}<{{ message.role }}>"
    "{% if message.content is string %}{{ message.content }}"
    "{% elif message.content %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}"
    "{% for call in message.tool_calls or [] %}CALL {{ call.function | tojson }}{% endfor %}\n"
    "{% endfor %}{% if enable_thinking is defined and enable_thinking is false %}no thinking\n{% endif %}"
)
# Idefics 3 writes content so: a string has no parts to go through.
PARTS_ONLY = (
    "{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}{% endif %}{% endfor %}"
    "<end>\n{% endfor %}"
)
THINKING = "{% for message in messages %}{{ message.role }}:{{ message.content.split('</think>')[-1] }}\n{% endfor %}"


def reference(template: str, messages: list[dict[str, Any]], **inputs: Any) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")), **SPECIAL)
    text: str = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=False, **inputs
    )
    return text


def text_of(template: str, row: dict[str, Any]) -> str:
    (item,) = parse_row(row).items
    return Renderer(rule(), ChatTemplate(template, SPECIAL)).render(item).text


def refusal(template: str | None, row: dict[str, Any]) -> str:
    source = ChatTemplate(template, SPECIAL) if template else None
    renderer = Renderer(rule("chat_template" if source else "concatenate"), source)
    with pytest.raises(RowError) as caught:  # noqa: PT012 (either step may refuse)
        for item in parse_row(row).items:
            renderer.render(item)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("template", [EVERYTHING, QWEN_3, LLAMA_3_1], ids=["everything", "qwen3", "llama3.1"])
@pytest.mark.parametrize("written", [TOOLS, json.dumps(TOOLS)], ids=["a list", "JSON in a string"])
def test_tools_are_rendered_as_in_transformers(template: str, written: Any) -> None:
    text = text_of(template, {"messages": HI, "tools": written})
    assert text == reference(template, HI, tools=TOOLS)
    assert text != text_of(template, {"messages": HI})


def test_documents_and_variables_are_rendered_as_in_transformers() -> None:
    row = {
        "prompt": "Hi",
        "response": "Hello!",
        "documents": DOCUMENTS,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    text = text_of(EVERYTHING, row)
    assert text == reference(EVERYTHING, HI, documents=DOCUMENTS, enable_thinking=False)
    assert "[Tea: Boil water.]" in text and text.endswith("no thinking\n")


def test_every_answer_of_a_row_gets_its_inputs() -> None:
    for row in (
        {"prompt": "Hi", "responses": ["a", "b"], "tools": TOOLS},
        {"prompt": "Hi", "chosen": "a", "rejected": "b", "tools": TOOLS},
        {"chosen": HI, "rejected": [HI[0], {"role": "assistant", "content": "No."}], "tools": TOOLS},
    ):
        renderer = Renderer(rule(), ChatTemplate(EVERYTHING, SPECIAL))
        texts = [renderer.render(item).text for item in parse_row(row).items]
        assert len(texts) == 2 and all(text.startswith("TOOLS ") for text in texts) and texts[0] != texts[1]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, HI[1]],
        [HI[0], {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        [HI[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}],
        [HI[0], {"role": "assistant", "tool_calls": [CALL]}],
        [HI[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}],
        [HI[0], {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "4 degrees"}, HI[1]],
        [HI[0], {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]}],
    ],
    ids=["parts", "two parts", "null content", "no content", "empty content", "tool result", "content and a call"],
)
def test_message_shapes_give_the_text_of_transformers(messages: list[dict[str, Any]]) -> None:
    assert text_of(EVERYTHING, {"messages": messages}) == reference(EVERYTHING, messages)


@pytest.mark.parametrize("template", [QWEN_3, LLAMA_3_1], ids=["qwen3", "llama3.1"])
def test_a_tool_call_as_the_answer_has_the_text_of_real_templates(template: str) -> None:
    messages = [HI[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert text_of(template, {"messages": messages, "tools": TOOLS}) == reference(template, messages, tools=TOOLS)


def test_a_template_that_reads_parts_alone_gets_parts() -> None:
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in HI]
    expected = reference(PARTS_ONLY, parts)
    assert expected == "User:Hi<end>\nAssistant:Hello!<end>\n"
    assert text_of(PARTS_ONLY, {"messages": HI}) == expected
    assert text_of(PARTS_ONLY, {"messages": parts}) == expected
    assert text_of(PARTS_ONLY, {"prompt": "Hi", "response": "Hello!"}) == expected


def test_a_template_that_reads_strings_alone_gets_one_part_as_a_string_and_refuses_several() -> None:
    part = {"type": "text", "text": "Hi"}
    for template in (CHATML_ONE_LINE, LLAMA_3_1):
        assert text_of(template, {"messages": [{"role": "user", "content": [part]}, HI[1]]}) == reference(template, HI)
        assert "join them" in refusal(template, {"messages": [{"role": "user", "content": [part, part]}, HI[1]]})


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", HI),
        (
            "{{ messages[0].content }}",
            [HI[1], {"role": "assistant", "content": HI[1]["content"]}],
        ),  # its words are there
        ("{{ messages | length }}", HI),
        (THINKING, [HI[0], {"role": "assistant", "content": "Only thoughts.</think>"}]),
        (CHATML_ONE_LINE, [HI[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]),
        (CHATML_ONE_LINE, [HI[0], {"role": "assistant", "content": "See.", "tool_calls": [CALL]}]),
    ],
    ids=["user alone", "the first alone", "none", "thoughts", "a call", "a call beside content"],
)
def test_an_answer_that_does_not_change_the_text_is_an_error(template: str, messages: list[dict[str, Any]]) -> None:
    row = {"messages": [{"role": "user", "content": "Hello!"}, *messages[1:]]}
    assert "messages[1]: the chat template leaves out" in refusal(template, row)


def test_an_answer_that_the_template_changes_is_none() -> None:
    for content in ("A <thought></think>said", 'with "quotes" and\ttabs', "  spaces  "):
        messages = [HI[0], {"role": "assistant", "content": content}]
        for template in (THINKING, EVERYTHING, "{% for m in messages %}{{ m.content | tojson | upper }}{% endfor %}"):
            if "upper" not in template:
                assert text_of(template, {"messages": messages}) == reference(template, messages)


def test_each_message_of_a_rare_role_is_looked_for_by_a_word_of_its_own() -> None:
    as_json = "{% for m in messages %}{{ m.role }}:{{ m.content | tojson }}\n{% endfor %}"
    tool = [HI[0], {"role": "ipython", "content": 'said "ok"\n'}, HI[1]]
    assert text_of(as_json, {"messages": tool}) == reference(as_json, tool)
    drops = "{% for m in messages %}{% if m.role != 'critic' %}{{ m.role }}:{{ m.content }}\n{% endif %}{% endfor %}"
    critic = [HI[0], {"role": "critic", "content": "user"}, HI[1]]  # a word that the text holds anyway
    assert refusal(drops, {"messages": critic}) == (
        "messages[1]: the chat template leaves out what role 'critic' says, so the reward would not depend on it; "
        "expected system, user, assistant or tool"
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("chat_template", "{{ 1 }}"), ("add_generation_prompt", True), ("continue_final_message", True),
        ("functions", TOOLS), ("function_call", {"name": "weather"}), ("tool_choice", "auto"),
        ("images", ["x.png"]), ("image", "x.png"), ("videos", ["x"]), ("audios", ["x"]),
    ],
)  # fmt: skip
def test_a_field_that_would_change_the_text_is_refused_by_its_name(field: str, value: Any) -> None:
    row = {"prompt": "Hi", "response": "Hello!"}
    assert refusal(EVERYTHING, row | {field: value}).startswith(f"{field}: this field could change the text")
    empty: Any
    for empty in (None, False, "", []):
        assert text_of(EVERYTHING, row | {field: empty}) == reference(EVERYTHING, HI)


@pytest.mark.parametrize(
    ("template", "extra", "message"),
    [
        (CHATML_ONE_LINE, {"tools": TOOLS}, "tools: this model's chat template does not read it"),
        (CHATML_ONE_LINE, {"documents": DOCUMENTS}, "documents: this model's chat template does not read"),
        (EVERYTHING, {"chat_template_kwargs": {"thinking": True}}, "thinking: this model's chat template does not"),
        (None, {"tools": TOOLS}, "tools: this model has no chat template"),
        (EVERYTHING, {"chat_template_kwargs": {"add_generation_prompt": True}}, "chat_template_kwargs.add_generation_"),
        (EVERYTHING, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages: expected variables"),
        (EVERYTHING, {"chat_template_kwargs": [1]}, "chat_template_kwargs: expected an object, found list"),
        (EVERYTHING, {"chat_template_kwargs": "x"}, "chat_template_kwargs: expected an object, found str"),
        (EVERYTHING, {"tools": {"a": 1}}, "tools: expected a list of objects, found dict"),
        (EVERYTHING, {"tools": "weather"}, "tools: expected a list of objects, found a string that is not JSON"),
        (EVERYTHING, {"tools": '"weather"'}, "tools: expected a list of objects, found str"),
        (EVERYTHING, {"tools": "7"}, "tools: expected a list of objects, found int"),
        (EVERYTHING, {"documents": ["text"]}, "documents[0]: expected an object, found str"),
        (EVERYTHING, {"tools": [{"a": float("nan")}]}, "tools: expected JSON values only"),
    ],
)
def test_inputs_that_cannot_be_rendered_are_refused_by_their_name(
    template: str | None, extra: dict[str, Any], message: str
) -> None:
    assert refusal(template, {"prompt": "Hi", "response": "Hello!"} | extra).startswith(message)


def test_a_text_has_no_place_for_inputs() -> None:
    assert refusal(EVERYTHING, {"text": "as it stands", "tools": TOOLS}).startswith(
        "tools: a text is scored as it stands"
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    "text messages prompt response responses chosen rejected steps tools documents chat_template_kwargs system".split()
)
PART = st.fixed_dictionaries({"type": st.sampled_from(["text", "image"]) | JSON, "text": st.text(max_size=8) | JSON})
MESSAGE = st.dictionaries(
    st.sampled_from(["role", "content", "tool_calls", "name"]),
    st.sampled_from(["user", "assistant", "tool"]) | st.lists(PART, max_size=2) | JSON,
)


@settings(max_examples=300, deadline=2000)
@given(st.dictionaries(FIELDS, JSON | st.lists(MESSAGE, max_size=3)) | JSON)
def test_any_row_is_rendered_or_refused(row: Any) -> None:
    renderer = Renderer(rule(), ChatTemplate(EVERYTHING, SPECIAL))
    try:
        for item in parse_row(row).items:
            assert renderer.render(item).text
    except RewardRTError as error:
        assert "\n" not in str(error)  # noqa: PT017
