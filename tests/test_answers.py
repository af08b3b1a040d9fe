"""From rows to rewards in Python: every shape of row, in any mix, gives what a file of the same rows gives."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewardrt import (
    InferenceError,
    Ranked,
    RewardModel,
    RewardRTError,
    RowError,
    Scored,
    ScoredAnswers,
    ScoredPair,
    TruncationWarning,
)
from rewardrt.data.files import score_file
from rewardrt.data.lines import read_lines
from rewardrt.scoring.answers import flatten, read_rows, regroup
from rewardrt.scoring.scored import fill_row

BUNDLE = Path(__file__).parent / "bundles" / "version-1"
ROWS: list[dict[str, Any]] = [
    {"text": "as it stands", "id": 1},
    {"prompt": "What is tea?", "response": "A drink."},
    {"prompt": "What is tea?", "chosen": "A drink made of leaves.", "rejected": "No."},
    {"prompt": "What is rain?", "responses": ["Water.", "Water that falls.", "Water."], "id": 2},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    {"prompt": "no answer"},
    {"prompt": "What is tea?", "chosen": "A drink.", "rejected": ""},
]


@pytest.fixture(scope="module")
def model() -> RewardModel:
    return RewardModel.load(BUNDLE, provider="cpu", precision="fp32")


def as_file(model: RewardModel, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    out: list[bytes] = []
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    score_file(model.answers.prepare, model.score_prepared, read_lines(io.BytesIO(data)), out.append)
    return [json.loads(line) for line in out]


def test_rows_of_every_shape_give_in_python_what_they_give_in_a_file(model: RewardModel) -> None:
    found = model.score_rows(ROWS)
    kinds = [Scored, Scored, ScoredPair, ScoredAnswers, Scored, RowError, ScoredPair]
    assert [type(result) for result in found] == kinds
    written = as_file(model, ROWS)
    for row, result, line in zip(ROWS, found, written, strict=True):
        if isinstance(result, RewardRTError):
            assert line["error"] == str(result)
        else:
            assert fill_row(row, result) == line
    pair, answers = found[2], found[3]
    assert isinstance(pair, ScoredPair)
    assert isinstance(answers, ScoredAnswers)
    assert (np.float32(pair.margin), written[2]["best" if "best" in written[2] else "margin"]) == (
        np.float32(pair.chosen_reward) - np.float32(pair.rejected_reward), pytest.approx(pair.margin, rel=1e-6),
    )  # fmt: skip
    assert answers.rewards[0] == answers.rewards[2]
    assert answers.best == int(np.argmax(answers.rewards))


def test_one_text_has_one_reward_by_every_call(model: RewardModel) -> None:
    prompt, responses = "What is rain?", ["Water.", "Water that falls.", "It is water, is it not?"]
    alone = [model.score(prompt=prompt, response=response) for response in responses]
    many = model.score_many([{"prompt": prompt, "response": response} for response in responses])
    ranked = model.rank(prompt=prompt, responses=responses)
    (row,) = model.score_rows([{"prompt": prompt, "responses": responses}])
    assert isinstance(row, ScoredAnswers)
    assert alone == many.tolist() == list(row.rewards)
    assert [(each.index, each.reward) for each in ranked] == sorted(enumerate(alone), key=lambda each: -each[1])
    assert all(isinstance(each, Ranked) for each in ranked)


def test_the_twins_for_coroutines_give_the_same_and_leave_the_event_loop_free(
    model: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, responses = "What is tea?", ["A drink.", "Leaves in hot water."]
    rows = [{"prompt": prompt, "response": response} for response in responses]

    begun, went_on, run = threading.Event(), threading.Event(), model.runner.run

    def waits(texts: Any, **options: Any) -> Any:
        begun.set()
        assert went_on.wait(30), "the event loop waited for the call"
        return run(texts, **options)

    async def all_at_once() -> tuple[Any, ...]:
        async def go_on() -> None:
            assert await asyncio.to_thread(begun.wait, 30)
            went_on.set()

        *found, _ = await asyncio.gather(
            model.ascore(**rows[0]),  # type: ignore[arg-type]
            model.ascore_many(rows),
            model.ascore_rows([{"prompt": prompt, "responses": responses}]),
            model.arank(prompt=prompt, responses=responses),
            go_on(),
        )
        return tuple(found)

    with monkeypatch.context() as patch:
        patch.setattr(model.runner, "run", waits)
        one, many, scored, ranked = asyncio.run(all_at_once())
    assert one == model.score(**rows[0])  # type: ignore[arg-type]
    assert many.tolist() == model.score_many(rows).tolist()
    assert scored == model.score_rows([{"prompt": prompt, "responses": responses}])
    assert ranked == model.rank(prompt=prompt, responses=responses)


def test_a_twin_raises_what_the_call_raises(model: RewardModel) -> None:
    with pytest.raises(RowError, match="found prompt"):
        asyncio.run(model.ascore(prompt="no answer"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROWS[3], "item 1: the row holds 3 texts; expected one (rank(), score_rows() and `rewardrt score` take several)"),
        (ROWS[2], "item 1: the row holds 2 texts; expected one (rank(), score_rows() and `rewardrt score` take several)"),
    ],
)  # fmt: skip
def test_score_many_takes_rows_of_one_text(model: RewardModel, row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError) as caught:
        model.score_many([ROWS[0], row, {"prompt": "no answer"}])
    assert str(caught.value) == message


def test_a_failed_row_says_of_each_of_its_texts_what_is_wrong(
    model: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(texts: list[Any], **options: Any) -> list[InferenceError]:
        return [InferenceError("the graph failed") for _ in texts]

    monkeypatch.setattr(model.runner, "run", fails)
    single, pair, ranking = model.score_rows([ROWS[1], ROWS[2], {"prompt": "Q", "responses": ["a", "b"]}])
    assert [type(each) for each in (single, pair, ranking)] == [InferenceError] * 3
    assert str(single) == "the graph failed"
    assert str(pair) == "chosen: the graph failed; rejected: the graph failed"
    assert str(ranking) == "responses[0]: the graph failed; responses[1]: the graph failed"
    with pytest.raises(InferenceError, match=r"^responses\[0\]: the graph failed; responses\[1\]"):
        model.rank(prompt="Q", responses=["a", "b"])


def test_results_find_their_rows_again() -> None:
    rows = read_rows(
        [{"text": "a"}, {"nothing": 1}, {"prompt": "Q", "responses": ["b", "c"]}, RowError("line 4"), {"text": "d"}]
    )
    items = flatten(rows)
    scores = [Scored(float(index), 1, 0) for index in range(len(items))]
    first, second, third, fourth, last = regroup(rows, scores)
    assert (first, last) == (scores[0], scores[3])
    assert isinstance(second, RowError)
    assert str(fourth) == "line 4"
    assert third == ScoredAnswers((scores[1], scores[2]))


def test_a_loaded_model_says_what_it_is(model: RewardModel) -> None:
    assert repr(model) == (
        f"RewardModel({str(BUNDLE)!r}, family={model.spec.family!r}, precision='fp32', provider='cpu', "
        f"max_length={model.spec.max_length})"
    )


def test_the_warning_of_a_cut_names_the_line_that_called(model: RewardModel) -> None:
    long = "word " * (model.spec.max_length + 10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.score(text=long)
        model.score_many([{"text": long}])
    assert [(one.category, one.filename) for one in caught] == [(TruncationWarning, __file__)] * 2
