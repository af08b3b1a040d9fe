"""What goes wrong with a text stays with it; who is next; and an engine that dies is started again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from panicking_bundle import make_panicking
from rewardrt import RewardModel, RowError, Scored
from rewardrt.errors import InferenceError
from rewardrt.server.engine import RESTARTS, Engine
from rewardrt.server.problem import Problem
from rewardrt.server.turns import LONG_TEXT, Job, Turns, Work, estimated_tokens
from rewardrt.text.items import Conversation, RawText, TokenIds
from server_process import serving


@pytest.fixture(scope="module")
def panicking(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models/tiny with a normalizer that panics, in Rust, at every byte that is not ASCII."""
    return make_panicking(tiny_bundle, tmp_path_factory.mktemp("panic") / "panicking")


@pytest.fixture
def model(tiny_bundle: Path) -> RewardModel:
    return RewardModel.load(tiny_bundle, threads=1)


@pytest.fixture
def make(model: RewardModel) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def engine(**options: Any) -> Engine:
        engines.append(Engine(model, **({"max_queue_tokens": 100_000} | options)))
        return engines[-1]

    yield engine
    for each in engines:
        each.close()
        each.join(10)


def ask(engine: Engine, *items: Any, **options: Any) -> tuple[Job, threading.Event]:
    done = threading.Event()
    work = Work(tuple(RawText(item) if isinstance(item, str) else item for item in items))
    return engine.submit(work, lambda job: done.set(), **options), done


def test_a_panic_in_the_tokenizer_is_the_error_of_its_text_alone(panicking: Path, model: RewardModel) -> None:
    found = RewardModel.load(panicking).score_rows([{"text": text} for text in ("one", "café", "two", "naïve", "x")])
    assert [type(each) for each in found] == [Scored, RowError, Scored, RowError, Scored]
    assert "the tokenizer failed at this text (PanicException: index out of bounds" in str(found[1])
    assert found[0] == model.score_rows([{"text": "one"}])[0]


def test_a_server_outlives_panics_and_others_get_their_rewards(panicking: Path) -> None:
    with serving(panicking) as running:
        for _ in range(3):
            rows = [{"text": "one"}, {"text": "café"}, {"prompt": "é", "response": "two"}, {"text": "é" * 40_000}]
            found = httpx.post(f"{running.url}/v1/reward", json={"rows": rows}, timeout=60).json()["rows"]
            assert ["reward" in row for row in found] == [True, False, False, False]
        refused = httpx.post(f"{running.url}/get_reward", json={"query": ["café"]})
        assert refused.status_code == 400
        assert httpx.get(f"{running.url}/health").status_code == 200


def test_a_turn_that_fails_is_taken_apart_until_the_text_at_fault_is_alone(
    make: Callable[..., Engine], model: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicError(BaseException):
        pass

    (bad,) = model.answers.encode([RawText("bad")])
    score = model.runner.run

    def fails(texts: Any, **options: Any) -> Any:
        if any(text.ids.tolist() == bad.ids.tolist() for text in texts):
            raise PanicError
        return score(texts, **options)

    engine = make()
    monkeypatch.setattr(model.runner, "run", fails)
    asked = [ask(engine, *texts) for texts in (["a"], ["b", "bad", "c"], ["d"], [TokenIds((1, 2**63)), TokenIds((5,))])]
    assert all(done.wait(30) for _, done in asked)
    kinds = [[type(result) for result in job.results] for job, _ in asked]
    assert kinds == [[Scored], [Scored, InferenceError, Scored], [Scored], [RowError, Scored]]
    assert (engine.fault, engine.waiting_tokens) == (None, 0)


def test_an_engine_that_dies_is_started_again_and_one_that_dies_too_often_is_dead(
    make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[str] = []
    engine = make(report=reported.append)
    real = engine._score_turn

    def dies(slices: Any) -> None:
        raise SystemExit

    for _ in range(RESTARTS):
        monkeypatch.setattr(engine, "_score_turn", dies)
        job, done = ask(engine, "a")
        assert done.wait(30)
        assert job.failure.startswith("the engine failed (SystemExit")
        monkeypatch.setattr(engine, "_score_turn", real)
        job, done = ask(engine, "a")
        assert done.wait(30)
        assert isinstance(job.results[0], Scored)
    assert len(reported) == RESTARTS
    monkeypatch.setattr(engine, "_score_turn", dies)
    _, done = ask(engine, "a")
    assert done.wait(30)
    engine.join(10)
    assert engine.dead
    assert "the engine has stopped" in str(engine.fault)
    with pytest.raises(Problem):
        ask(engine, "a")


def job_of(costs: list[int], client: str = "") -> Job:
    job = Job(Work(()), costs, lambda job: None, 0.0, client)
    job.left = sum(costs)
    return job


def test_small_requests_are_not_behind_a_large_one_and_the_large_one_is_not_left_out() -> None:
    turns = Turns(2048)
    large = job_of([2048] * 1024)
    small = [job_of([200]) for _ in range(6)]
    for job in (large, *small):
        turns.add(job)
    slices, _ = turns.plan(8192)
    assert {id(each.job) for each in slices} == {id(job) for job in (large, *small)}
    assert large.taken >= 1
    assert [job.taken for job in small] == [1] * 6


def test_each_client_gets_a_share_however_many_requests_another_one_has() -> None:
    turns = Turns(2048)
    many = [job_of([2048], "many") for _ in range(500)]
    one = job_of([2048] * 4, "one")
    for job in (*many, one):
        turns.add(job)
    taken = []
    for _ in range(2):
        turns.plan(8192)
        taken.append((sum(job.taken for job in many), one.taken))
    assert taken == [(2, 2), (4, 4)]


def test_a_text_is_booked_by_its_bytes_and_every_part_of_a_conversation_counts() -> None:
    assert estimated_tokens(RawText("a" * 300)) == 101
    assert estimated_tokens(RawText("語" * 300)) == 301
    parts = [{"type": "text", "text": "b" * 300}]
    prompt = (
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [{"x": "c" * 300}]},
    )
    assert estimated_tokens(Conversation(prompt, {"role": "assistant", "content": "d" * 300})) >= 300


def test_a_long_text_is_tokenized_beside_the_engine_and_nobody_waits_for_it(
    make: Callable[..., Engine], model: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, encode, threads = threading.Event(), model.answers.encode, set()

    def slow(items: Any, **options: Any) -> Any:
        if any(len(item.text) > LONG_TEXT for item in items):
            threads.add(threading.current_thread().name)
            assert go.wait(30)
        return encode(items, **options)

    monkeypatch.setattr(model.answers, "encode", slow)
    engine = make()
    long, long_done = ask(engine, "short", "word " * 10_000, "another", client="a")
    short, short_done = ask(engine, "short", client="a")
    assert short_done.wait(30)
    assert not long.results
    go.set()
    assert long_done.wait(30)
    assert threads == {"rewardrt-long texts"}
    assert long.results[0] == short.results[0]
    assert isinstance(long.results[1], Scored)
    assert long.results[1].truncated > 0
    assert engine.waiting_tokens == 0


def test_a_full_queue_makes_a_request_wait_and_it_may_be_taken_back_until_it_begins(
    make: Callable[..., Engine], model: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go, encode = threading.Event(), threading.Event(), model.answers.encode

    def slow(items: Any, **options: Any) -> Any:
        begun.set()
        assert go.wait(30)
        return encode(items, **options)

    monkeypatch.setattr(model.answers, "encode", slow)
    engine = make(max_queue_tokens=100)
    _, first = ask(engine, "word " * 100)
    assert begun.wait(30)
    _, second = ask(engine, *["word " * 60] * 3)  # taken although it is too much: nothing else waits
    with pytest.raises(Problem, match="the queue holds"):
        ask(engine, *["word " * 60] * 3)
    waits, done = ask(engine, *["word " * 60] * 3, patience=10)
    taken_back, _ = ask(engine, *["word " * 60] * 3, patience=10)
    assert waits.may_be_refused
    assert isinstance(engine.withdraw(taken_back), Problem)
    go.set()
    assert all(each.wait(30) for each in (first, second, done))
    assert engine.withdraw(waits) is None
    assert (len(waits.results), taken_back.results, engine.waiting_tokens) == (3, [], 0)
