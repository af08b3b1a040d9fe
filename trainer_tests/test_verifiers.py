"""verifiers' own `Task.score`, with the reward plugged in by the configuration that `rewardrt trainer` prints."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import verifiers.v1 as vf
from pydantic_config import cli
from verifiers.v1.cli.resolve import narrow_config
from verifiers.v1.configs.cli.eval import EvalConfig
from verifiers.v1.errors import TaskError
from verifiers.v1.graph import MessageNode
from verifiers.v1.trace import AgentInfo, Trace, TraceTask
from verifiers.v1.types import AssistantMessage, SystemMessage, UserMessage

from conftest import bits
from rewardrt.trainers.listing import find

TASKS = """
import verifiers.v1 as vf

class Ask(vf.Task):
    @vf.reward
    async def short(self, trace):
        return 1.0

class Asks(vf.Taskset[Ask, vf.TasksetConfig]):
    def load(self):
        yield Ask(vf.TaskData(prompt="Why?"), self.config.task)

__all__ = ["Asks"]
"""
TURNS = [
    SystemMessage(content="Be kind."),
    UserMessage(content="Why?"),
    AssistantMessage(content="so."),
    UserMessage(content="And?"),
    AssistantMessage(content="yes.", provider_state=[{"id": "1"}]),
]
ROWS = [{"role": turn.role, "content": turn.content} for turn in TURNS]


@pytest.fixture
def task(rewards_file: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The task of a configuration file with the printed lines in it, as verifiers reads it."""
    rewards_file("verifiers")
    (tmp_path / f"asks_{tmp_path.name}.py").write_text(TASKS)
    (tmp_path / "eval.toml").write_text(f'[env.taskset]\nid = "asks_{tmp_path.name}"\n\n{find("verifiers").use}\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments = ["@", "eval.toml"]
    config = cli(narrow_config(EvalConfig, arguments), args=arguments)
    return next(iter(vf.load_taskset(config.env.taskset)))


def trace(task: Any, turns: list[Any]) -> Any:
    nodes = [
        MessageNode(parent=index - 1 if index else None, message=turn, sampled=turn.role == "assistant")
        for index, turn in enumerate(turns)
    ]
    agent = AgentInfo(config=vf.AgentConfig())
    return Trace(task=TraceTask(type="Ask", data=task.data), agent=agent, nodes=nodes)


def test_versions() -> None:
    assert importlib.metadata.version("verifiers") == "0.4.0"


def test_a_plugged_reward_stands_beside_the_tasks_own(task: Any, offline: Callable[..., Any]) -> None:
    for turns, row in ((TURNS, ROWS), (TURNS[:3], ROWS[:3])):
        made = trace(task, turns)
        asyncio.run(task.score(made))
        assert {name: reward.weight for name, reward in made.rewards.items()} == {"rewardrt": 1.0, "short": 1.0}
        assert bits(made.rewards["rewardrt"].score) == bits(offline([{"messages": row}]))


def test_a_rollout_that_cannot_be_scored_is_the_tasks_error(task: Any) -> None:
    made = trace(task, TURNS[:4])
    with pytest.raises(TaskError, match="expected the conversation to end with 'assistant'"):
        asyncio.run(task.score(made))
    assert made.rewards["rewardrt"] is None
