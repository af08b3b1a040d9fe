"""Any JSON value as a row: the parser raises nothing but RowError, and every line in is one line out."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardrt import RewardModel, RewardRTError
from rewardrt.data.files import score_file
from rewardrt.data.lines import read_lines
from rewardrt.errors import RowError
from rewardrt.scoring.scored import Scored
from rewardrt.text.rows import INPUT_FIELDS, Row, parse_row
from rewardrt.text.tokens import EncodedText

BUNDLE = Path(__file__).parent / "bundles" / "version-1"
NAMES = st.sampled_from(
    [
        *INPUT_FIELDS,
        "steps",
        "tools",
        "documents",
        "chat_template_kwargs",
        "role",
        "content",
        "tool_calls",
        "name",
        "error",
        "question",
    ]
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False)
    | st.text(max_size=8)
    | st.sampled_from(["user", "assistant", "system", "\ud800"])
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool", 1, ""]), "content": JSON}), max_size=3
)
NEAR_ROWS = st.dictionaries(NAMES, MESSAGES | st.text(max_size=8) | JSON, max_size=4)


@pytest.fixture(scope="module")
def model() -> RewardModel:
    return RewardModel.load(BUNDLE, provider="cpu", precision="fp32")


@settings(deadline=None, max_examples=500)
@given(JSON | NEAR_ROWS)
def test_any_json_value_is_a_row_or_a_row_error(row: Any) -> None:
    try:
        found = parse_row(row)
    except RowError as error:
        assert not {"\n", "\x1b"} & set(str(error))  # noqa: PT017
        return
    assert isinstance(found, Row)
    assert found.items


@settings(deadline=None, max_examples=60)
@given(st.lists(JSON | NEAR_ROWS | st.just({"text": "a"}), min_size=1, max_size=6))
def test_every_row_comes_out_scored_or_with_an_error(model: RewardModel, rows: list[Any]) -> None:
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    out: list[bytes] = []
    summary = score_file(model.answers.prepare, model.score_prepared, read_lines(io.BytesIO(data)), out.append)
    assert (len(out), summary.rows, summary.scored + summary.failed) == (len(rows), len(rows), len(rows))
    for line in out:
        row = json.loads(line)
        assert line.count(b"\n") == 1
        assert ("error" in row) != bool({"reward", "rewards", "margin"} & set(row))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.binary(max_size=30).filter(lambda line: b"\n" not in line), min_size=1, max_size=6))
def test_every_line_of_any_bytes_comes_out_as_one_line(model: RewardModel, lines: list[bytes]) -> None:
    out: list[bytes] = []
    data = b"\n".join(lines) + b"\n"
    summary = score_file(model.answers.prepare, model.score_prepared, read_lines(io.BytesIO(data)), out.append)
    assert len(out) == summary.rows == len(lines)
    assert all(json.loads(line) for line in out)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers() | st.sampled_from([2**31, 2**63, -(2**63), 2**64]), max_size=6))
def test_any_whole_numbers_as_token_ids_are_a_text_or_a_refusal(model: RewardModel, ids: list[int]) -> None:
    try:
        encoded = model.answers.tokenizer.encode_ids(ids)
    except RowError as error:
        assert "token" in str(error)  # noqa: PT017
        return
    assert isinstance(encoded, EncodedText)
    assert encoded.ids.tolist() == ids


LONG: dict[str, dict[str, Any]] = {
    "an answer of a megabyte": {"prompt": "a", "response": "b " * 2**19},
    "a thousand answers": {"prompt": "a", "responses": ["b"] * 1000},
    "a thousand turns": {
        "messages": [{"role": role, "content": "a"} for _ in range(500) for role in ("user", "assistant")]
    },
    "a key of a megabyte": {"a" * 2**20: 1, "text": "a"},
    "a megabyte in another field": {"text": "a", "other": "b" * 2**20},
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_row_is_scored(model: RewardModel, name: str) -> None:
    out: list[bytes] = []
    data = json.dumps(LONG[name]).encode()
    score_file(model.answers.prepare, model.score_prepared, read_lines([data]), out.append)
    assert "error" not in json.loads(out[0])


def test_the_library_raises_nothing_else_either(model: RewardModel) -> None:
    for row in ({}, {"text": None}, {"prompt": 1, "response": 2}, {"messages": [{"role": []}]}):
        with pytest.raises(RewardRTError):
            model.score_many([row])
    assert all(isinstance(result, Scored | RewardRTError) for result in model.score_rows([{}, {"text": "a"}]))
