"""A reward of a verifiers task, which the task's configuration names (`rewards`).

verifiers calls or awaits it with the `trace` of a rollout, whose `messages` are the conversation, and expects a float.
Read from verifiers 0.4: verifiers/v1/task.py, `Task.score` and `Task.hooks`.
"""

from __future__ import annotations

import json
from typing import Any

from rewardrt.trainers.reward import TrainerReward

TOOL_FIELDS = ("name", "description", "parameters")


class Reward(TrainerReward):
    """The reward of a rollout: that of its last answer, given everything before."""

    async def __call__(self, trace: Any) -> float:
        """Return the reward of the conversation in a trace."""
        found: float = (await self.arewards([self.conversation(trace)]))[0]
        return found

    def conversation(self, trace: Any) -> dict[str, Any]:
        """Return the row of a trace."""
        turns = [_message(message.model_dump(exclude_none=True)) for message in trace.messages]
        tools = [_tool(tool) for tool in trace.tools]
        return self.row(turns[:-1], turns[-1:], {"tools": tools})


def _tool(tool: Any) -> dict[str, Any]:
    """Return a tool in the form that chat templates read."""
    given = tool.model_dump(exclude_none=True)
    return {"type": "function", "function": {name: given[name] for name in given if name in TOOL_FIELDS}}


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message in the form that chat templates read."""
    message.pop("provider_state", None)
    if calls := message.get("tool_calls"):
        message["tool_calls"] = [
            {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": _arguments(call)}}
            for call in calls
        ]
    return message


def _arguments(call: dict[str, Any]) -> Any:
    try:
        return json.loads(call["arguments"])
    except ValueError:
        return call["arguments"]
