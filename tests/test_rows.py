"""The row contract: the shapes that are scored, the fields that are added, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from rewardrt.errors import RowError
from rewardrt.scoring.scored import Scored, ScoredAnswers, ScoredPair, error_row, fill_row
from rewardrt.text.items import Conversation, RawText
from rewardrt.text.rows import Row, parse_row

USER, YES, NO = (
    {"role": "user", "content": "Q"},
    {"role": "assistant", "content": "yes"},
    {"role": "assistant", "content": "no"},
)
CHAT = [{"role": "system", "content": "S"}, USER]
NEED_PROMPT = "; chosen and rejected that are strings need the prompt that they answer"
EXPECTED = (
    "expected text, or messages ending with the assistant, or one of prompt and messages "
    "with response, with responses, with steps, or with chosen and rejected; found "
)


def test_text_is_scored_as_sent() -> None:
    assert parse_row({"text": " as sent\n"}) == Row("single", (RawText(" as sent\n"),))


def test_messages_end_with_the_answer() -> None:
    assert parse_row({"messages": [*CHAT, YES]}) == Row("single", (Conversation(tuple(CHAT), YES),))
    assert Conversation(tuple(CHAT), YES).messages == (*CHAT, YES)


@pytest.mark.parametrize("fields", [{"prompt": "Q"}, {"prompt": [USER]}, {"messages": [USER]}])
def test_a_prompt_is_one_user_turn_or_messages(fields: dict[str, Any]) -> None:
    row = parse_row({**fields, "response": "yes"})
    assert row.kind == "single"
    assert [item.messages for item in row.items if isinstance(item, Conversation)] == [(USER, YES)]


def test_responses_are_one_text_each() -> None:
    row = parse_row({"messages": CHAT, "responses": ["yes", "no", ""]})
    empty = {"role": "assistant", "content": ""}
    assert row == Row("ranking", tuple(Conversation(tuple(CHAT), answer) for answer in (YES, NO, empty)))
    assert [row.label(index) for index in range(3)] == ["responses[0]: ", "responses[1]: ", "responses[2]: "]


def test_chosen_and_rejected_are_strings() -> None:
    row = parse_row({"rejected": "no", "chosen": "yes", "prompt": "Q"})
    assert row == Row("pair", (Conversation("Q", YES), Conversation("Q", NO)))
    assert [row.label(index) for index in range(2)] == ["chosen: ", "rejected: "]


@pytest.mark.parametrize(
    ("row", "chosen", "rejected"),
    [
        ({"prompt": "Q", "chosen": [YES], "rejected": [NO]}, Conversation("Q", YES), Conversation("Q", NO)),
        ({"prompt": "Q", "chosen": [USER, YES], "rejected": [USER, NO]}, Conversation("Q", YES), Conversation("Q", NO)),
        ({"prompt": "Q", "chosen": [YES], "rejected": "no"}, Conversation("Q", YES), Conversation("Q", NO)),
        (
            {"messages": CHAT, "chosen": [YES], "rejected": "no"},
            Conversation((*CHAT,), YES),
            Conversation((*CHAT,), NO),
        ),
        (
            {"prompt": CHAT, "chosen": [*CHAT, YES], "rejected": [NO]},
            Conversation((*CHAT,), YES),
            Conversation((*CHAT,), NO),
        ),
        ({"chosen": [*CHAT, YES], "rejected": [USER, NO]}, Conversation((*CHAT,), YES), Conversation((USER,), NO)),
        (
            {"prompt": "Q", "chosen": [YES, USER, NO], "rejected": [NO, USER, YES]},
            Conversation((USER, YES, USER), NO),
            Conversation((USER, NO, USER), YES),
        ),
    ],
)
def test_chosen_and_rejected_may_be_messages_as_trl_writes_them(
    row: dict[str, Any], chosen: Conversation, rejected: Conversation
) -> None:
    assert parse_row(row) == Row("pair", (chosen, rejected))


def test_other_fields_and_nulls_do_not_matter() -> None:
    row = {"id": 3, "text": None, "prompt": "Q", "messages": None, "response": "yes", "chosen": None, "score": [1]}
    assert parse_row(row) == Row("single", (Conversation("Q", YES),))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, EXPECTED + "none of these fields"),
        ({"Text": "x", "text": None}, EXPECTED + "none of these fields; unused: 'Text'; name what is to be scored as above"),
        ({"prompt": "Q"}, EXPECTED + "prompt"),
        ({"response": "yes"}, EXPECTED + "response"),
        ({"text": "x", "prompt": "Q"}, EXPECTED + "text and prompt"),
        ({"text": "x", "messages": [USER, YES]}, EXPECTED + "text and messages"),
        ({"prompt": "Q", "messages": [USER], "response": "yes"}, EXPECTED + "messages and prompt and response"),
        ({"prompt": "Q", "response": "yes", "responses": ["no"]}, EXPECTED + "prompt and response and responses"),
        ({"prompt": "Q", "chosen": "yes"}, EXPECTED + "prompt and chosen"),
        ({"prompt": "Q", "rejected": "no"}, EXPECTED + "prompt and rejected"),
        ({"prompt": "Q", "response": "r", "chosen": "yes", "rejected": "no"}, EXPECTED + "prompt and response and chosen and rejected"),
        ({"chosen": "yes", "rejected": "no"}, EXPECTED + "chosen and rejected" + NEED_PROMPT),
        ({"chosen": [USER, YES], "rejected": "no"}, EXPECTED + "chosen and rejected" + NEED_PROMPT),
        (["text"], "expected an object, found list"),
        (None, "expected an object, found NoneType"),
        ({"text": 3}, "text: expected a string, found int"),
        ({"text": ""}, "text: expected at least one character, found an empty string"),
        ({"text": "\ud83d"}, "text: expected text that can be encoded as UTF-8, found the lone surrogate U+D83D at character 1"),
        ({"messages": "Q"}, "messages: expected a list of messages, found str"),
        ({"messages": "Q", "response": "yes"}, "messages: expected a list of messages, found str"),
        ({"messages": []}, "messages: expected at least one message, found an empty list"),
        ({"messages": [USER, YES, USER]}, "messages[2].role: expected the conversation to end with 'assistant', found 'user'"),
        ({"messages": [YES]}, "messages: expected a conversation and its answer, found an answer alone"),
        (
            {"messages": [USER, YES], "response": "yes"},
            "messages[1].role: expected the messages to end before the answer that is scored, found 'assistant'",
        ),
        ({"prompt": "", "response": "yes"}, "prompt: expected at least one character, found an empty string"),
        ({"prompt": [], "response": "yes"}, "prompt: expected at least one message, found an empty list"),
        ({"prompt": 1, "response": "yes"}, "prompt: expected a string or a list of messages, found int"),
        ({"prompt": {"role": "user"}, "response": "x"}, "prompt: expected a string or a list of messages, found dict"),
        ({"prompt": [USER, {"role": "user"}], "response": "yes"}, "prompt[1]: expected role and content, found no content"),
        ({"prompt": "Q", "response": ["yes"]}, "response: expected a string, found list"),
        ({"prompt": "Q", "responses": "yes"}, "responses: expected a list of at least one string, found str"),
        ({"prompt": "Q", "responses": []}, "responses: expected a list of at least one string, found an empty list"),
        ({"prompt": "Q", "responses": ["yes", None]}, "responses[1]: expected a string, found NoneType"),
        ({"prompt": "Q", "chosen": 1, "rejected": "no"}, "chosen: expected a string or a list of messages, found int"),
        (
            {"prompt": "Q", "chosen": "yes", "rejected": [USER]},
            "rejected[0].role: expected the conversation to end with 'assistant', found 'user'",
        ),
        ({"chosen": [YES], "rejected": [NO]}, "chosen: expected a conversation and its answer, found an answer alone"),
        (
            {"prompt": "Q ", "chosen": [USER, YES], "rejected": [USER, NO]},
            "chosen[0].role: expected the assistant's turn, or a conversation that begins with the prompt's own messages, found 'user'",
        ),
        ({"chosen": 1, "rejected": 2}, "chosen: expected a list of messages, found int"),
        (
            {"prompt": "Q", "responses": ["yes", "\udc00"]},
            "responses[1]: expected text that can be encoded as UTF-8, found the lone surrogate U+DC00 at character 1",
        ),
    ],
)  # fmt: skip
def test_a_row_that_is_none_of_the_shapes_says_what_is_wrong(row: object, message: str) -> None:
    with pytest.raises(RowError, match=f"^{re.escape(message)}$"):
        parse_row(row)


def test_one_reward_is_added_after_the_other_fields() -> None:
    row = {"b": 1, "text": "x", "a": None}
    filled = fill_row(row, Scored(float(np.float32(0.1)), 7, 0))
    assert list(filled.items()) == [
        ("b", 1),
        ("text", "x"),
        ("a", None),
        ("reward", 0.1),
        ("tokens", 7),
        ("truncated", 0),
    ]
    assert row == {"b": 1, "text": "x", "a": None}


def test_rewards_come_with_the_first_of_the_best() -> None:
    row = {"prompt": "Q", "responses": ["a", "b", "c"]}
    filled = fill_row(row, ScoredAnswers((Scored(-1.5, 3, 0), Scored(2.25, 4, 1), Scored(2.25, 5, 2))))
    added = {"rewards": [-1.5, 2.25, 2.25], "best": 1, "tokens": [3, 4, 5], "truncated": [0, 1, 2]}
    assert list(filled.items()) == [*row.items(), *added.items()]


def test_a_pair_gets_its_margin_and_lists_in_the_order_chosen_rejected() -> None:
    row = {"rejected": "no", "chosen": "yes", "prompt": "Q"}
    filled = fill_row(row, ScoredPair(Scored(0.5, 3, 0), Scored(1.75, 4, 1)))
    added = {"chosen_reward": 0.5, "rejected_reward": 1.75, "margin": -1.25, "tokens": [3, 4], "truncated": [0, 1]}
    assert list(filled.items()) == [*row.items(), *added.items()]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1, "0.1"),
        (1 / 3, "0.33333334"),
        (23.125, "23.125"),
        (-0.0, "-0.0"),
        (1e-8, "1e-08"),
        (16777217.0, "16777216.0"),
    ],
)
def test_a_reward_is_the_shortest_decimal_that_is_its_float32(value: float, text: str) -> None:
    reward = fill_row({}, Scored(float(np.float32(value)), 1, 0))["reward"]
    assert (repr(reward), np.float32(reward)) == (text, np.float32(value))


def test_outputs_of_an_earlier_run_are_replaced() -> None:
    row = {"reward": 9, "text": "x", "tokens": "old", "error": "old", "rewards": "mine", "id": 1}
    filled = fill_row(row, Scored(1.0, 2, 0))
    assert list(filled.items()) == [
        ("text", "x"), ("rewards", "mine"), ("id", 1), ("reward", 1.0), ("tokens", 2), ("truncated", 0),
    ]  # fmt: skip


def test_an_error_row_keeps_no_score() -> None:
    row = {"error": "old", "id": 1, "reward": 2.0, "margin": 1, "best": 0, "tokens": 3, "truncated": 0, "text": 5}
    assert list(error_row(row, "new").items()) == [("id", 1), ("text", 5), ("error", "new")]
