"""ms-swift's own computation of a batch's rewards, with the printed plug-in imported as ms-swift imports it."""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from swift.rewards import orms
from swift.rl_core.data import GRPOSample
from swift.rl_core.grpo_algorithm import compute_rewards_per_func
from swift.utils.utils import import_external_file

from conftest import bits

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "so."}],
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Blue."},
    ],
]


def samples() -> list[Any]:
    made = [GRPOSample(messages=messages, extra={"solution": "1"}) for messages in CONVERSATIONS]
    return [*made, GRPOSample(messages=[{"role": "assistant", "content": "alone"}])]


def rewards(made: list[Any], names: list[str]) -> torch.Tensor:
    functions = [orms[name](args=None) for name in names]  # as its trainer does
    return compute_rewards_per_func(
        made, functions, [None] * len(functions), torch.device("cpu"), trainer_state=object()
    )


@pytest.fixture(autouse=True)
def no_others() -> Any:
    before = dict(orms)
    yield
    orms.clear()
    orms.update(before)


def test_versions() -> None:
    assert importlib.metadata.version("ms-swift") == "4.6.0"


def test_the_printed_plug_in(rewards_file: Callable[[str], Path], offline: Callable[..., Any]) -> None:
    import_external_file(str(rewards_file("ms-swift")))
    found = rewards(samples(), ["rewardrt"])
    assert found.shape == (3, 1)
    assert bits(found[:2, 0]) == bits(offline([{"messages": messages} for messages in CONVERSATIONS]))
    assert found[2, 0].isnan()  # a conversation that is an answer alone
    (reward,) = [orms["rewardrt"](args=None)]
    assert not inspect.isfunction(reward) and type(reward).__name__ == "rewardrt"  # the name in its log


def test_coroutines_together(where: str, tmp_path: Path, offline: Callable[..., Any]) -> None:
    path = tmp_path / "rewards.py"
    path.write_text(
        "from swift.rewards import orms\n\nfrom rewardrt.trainers.ms_swift import async_orm, orm\n\n"
        f"orms['one'] = async_orm({where!r}, name='one')\n"
        f"orms['two'] = async_orm({where!r}, name='two', normalize=True)\n"
        f"orms['three'] = orm({where!r}, name='three')\n"
    )
    import_external_file(str(path))
    found = rewards(samples()[:2], ["one", "two", "three"])
    expected = offline([{"messages": messages} for messages in CONVERSATIONS])
    assert bits(found[:, 0]) == bits(found[:, 2]) == bits(expected)
    assert found[:, 1].tolist() == pytest.approx([(value - 0.5) / 2.0 for value in expected], rel=1e-6)


def test_a_conversation_with_images_has_no_reward(rewards_file: Callable[[str], Path]) -> None:
    import_external_file(str(rewards_file("ms-swift")))
    made = samples()[:2]
    made[0].images = ["picture.png"]
    found = rewards(made, ["rewardrt"])
    assert found[:, 0].isnan().tolist() == [True, False]
