"""The engine's queue: what fails, fails alone, and what nobody waits for is not computed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewardrt import RewardModel, Scored
from rewardrt.errors import InferenceError
from rewardrt.server.engine import Engine, Job, Work
from rewardrt.text.items import RawText


@pytest.fixture
def model(tiny_bundle: Path) -> RewardModel:
    return RewardModel.load(tiny_bundle, threads=1)


@pytest.fixture
def engine(model: RewardModel) -> Iterator[Engine]:
    engine = Engine(model, max_queue_tokens=100_000, turn_tokens=1000)
    yield engine
    engine.close()
    engine.join(10)


def ask(engine: Engine, *texts: str) -> tuple[Job, threading.Event]:
    done = threading.Event()
    work = Work(tuple(RawText(text) for text in texts))
    return engine.submit(work, lambda job: done.set()), done


def test_a_reward_that_is_no_number_fails_its_text_alone(
    engine: Engine, model: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bad,) = model.answers.encode([RawText("bad")])
    run = model.session.run

    def broken(input_ids: Any, *arguments: Any, **options: Any) -> Any:
        rewards = run(input_ids, *arguments, **options)
        rewards[[row[: len(bad.ids)].tolist() == bad.ids.tolist() for row in input_ids]] = np.nan
        return rewards

    monkeypatch.setattr(model.session, "run", broken)
    asked = [ask(engine, text) for text in ("good", "bad", "also good")]
    assert all(done.wait(30) for _, done in asked)
    kinds = [type(job.results[0]) for job, _ in asked]
    assert kinds == [Scored, InferenceError, Scored]
    assert (engine.fault, engine.waiting_tokens) == (None, 0)


def test_a_graph_that_fails_makes_the_engine_ill_until_a_text_is_scored_again(
    engine: Engine, model: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any, **options: Any) -> Any:
        raise InferenceError("the graph failed")

    def crashes(*arguments: Any, **options: Any) -> Any:
        raise MemoryError

    for broken, fault in ((fails, "the graph failed"), (crashes, "the engine failed (MemoryError)")):
        with monkeypatch.context() as patch:
            patch.setattr(model.session, "run", broken)
            job, done = ask(engine, "a text")
            assert done.wait(30)
            assert job.failure or isinstance(job.results[0], InferenceError)
            assert engine.fault == fault
        job, done = ask(engine, "a text")
        assert done.wait(30)
        assert isinstance(job.results[0], Scored)
        assert (engine.fault, engine.waiting_tokens) == (None, 0)


def test_work_that_nobody_waits_for_is_dropped(
    engine: Engine, model: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()
    encode = model.answers.encode
    seen: list[int] = []

    def slow(items: Any, **options: Any) -> Any:
        begun.set()
        assert go.wait(30)
        seen.append(len(items))
        return encode(items, **options)

    monkeypatch.setattr(model.answers, "encode", slow)
    _, first = ask(engine, "first")
    assert begun.wait(30)  # the first is being scored while the others come
    gone, _ = ask(engine, *["gone"] * 5)
    _, last = ask(engine, "last")
    gone.gone = True
    go.set()
    assert first.wait(30)
    assert last.wait(30)
    assert (seen, gone.results, engine.waiting_tokens) == ([1, 1], [], 0)
