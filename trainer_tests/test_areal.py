"""AReaL's own wrapper, which calls the reward function in a pool of processes."""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from conftest import bits, without_init
from rewardrt import RowError
from rewardrt.trainers.areal import Reward

without_init("areal")

from areal.api import reward_api
from areal.utils.dynamic_import import import_from_string

MESSAGES = [{"role": "user", "content": "Why?"}]
SAMPLES: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    (("<|im_start|>user\nWhy?<|im_end|>\n", "so.<|im_end|>", [1], [2]), {"messages": MESSAGES, "answer": "1"}),
    (("good", " yes<|im_end|>", [1], [2]), {"answer": "2"}),
]
ROWS = [{"messages": MESSAGES, "response": "so."}, {"text": "good yes<|im_end|>"}]


@pytest.fixture(params=["fork", "spawn"])
def pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """AReaL's pools start as this system's processes do; here in both ways."""
    context = multiprocessing.get_context(request.param)

    def make(max_workers: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(max_workers, mp_context=context)

    monkeypatch.setattr(reward_api, "ProcessPoolExecutor", make)
    yield
    reward_api.AsyncRewardWrapper._atexit_shutdown_all()


def ask(reward: Any, *, again: int = 1, **options: Any) -> list[float]:
    async def gather() -> list[float]:
        wrapper = reward_api.AsyncRewardWrapper(reward, max_workers=2, timeout_seconds=60, **options)
        return await asyncio.gather(*(wrapper(*given, **data) for given, data in SAMPLES * again))

    return asyncio.run(gather())


def test_versions() -> None:
    assert importlib.metadata.version("areal") == "1.0.4"


def test_the_printed_file_in_a_pool_of_processes(
    pool: None, rewards_file: Callable[[str], Path], offline: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(rewards_file("areal").parent)
    monkeypatch.delitem(sys.modules, "rewards", raising=False)
    importlib.invalidate_caches()
    reward = import_from_string("rewards.reward_fn")
    assert bits(ask(reward, again=10)) == bits(offline(ROWS * 10))


def test_processes_that_are_forked_after_the_reward_was_used(
    pool: None, where: str, offline: Callable[..., Any]
) -> None:
    reward = Reward(where, end="<|im_end|>")
    expected = offline(ROWS)
    assert bits([reward(*given, **data) for given, data in SAMPLES]) == bits(expected)
    assert bits(ask(reward)) == bits(expected)
    assert bits([reward(*given, **data) for given, data in SAMPLES]) == bits(expected)


def test_an_error_comes_back_from_the_pool_with_its_words(pool: None, where: str) -> None:
    reward = Reward(where, end="<|im_end|>")

    async def call() -> float:
        wrapper = reward_api.AsyncRewardWrapper(reward, max_workers=2, max_retries=0)
        return await wrapper("", "", [], [])

    with pytest.raises(RowError, match="text: expected at least one character"):
        asyncio.run(call())
