"""A reward function for a trainer, such as TRL's GRPOTrainer(reward_funcs=...).

    python examples/trainer_reward.py BUNDLE                    # in the trainer's own process
    python examples/trainer_reward.py http://127.0.0.1:8000     # by a server: rewardrt serve BUNDLE

A trainer calls it with prompts and completions, each a string or a list of messages, and wants one number each.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Callable
from typing import Any

from rewardrt import RewardModel

Turns = str | list[dict[str, Any]]
RewardFunction = Callable[..., list[float]]


def row_of(prompt: Turns, completion: Turns) -> dict[str, Any]:
    """Return a row of one answer, as scoring takes it."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return {"prompt": prompt, "response": completion}
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    after = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    return {"messages": [*before, *after]}


def in_process(bundle: str) -> RewardFunction:
    """Return a reward function that loads the bundle once, in this process."""
    model = RewardModel.load(bundle)

    def reward(prompts: list[Turns], completions: list[Turns], **_: Any) -> list[float]:
        rows = [row_of(*pair) for pair in zip(prompts, completions, strict=True)]
        return [float(value) for value in model.score_many(rows)]

    return reward


def by_server(url: str, seconds: float = 60.0) -> RewardFunction:
    """Return a reward function that asks a server, so that no trainer process holds the model."""

    def reward(prompts: list[Turns], completions: list[Turns], **_: Any) -> list[float]:
        rows = [row_of(*pair) for pair in zip(prompts, completions, strict=True)]
        body = json.dumps({"rows": rows}).encode()
        request = urllib.request.Request(f"{url}/v1/reward", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            return [row["reward"] for row in json.load(answer)["rows"]]

    return reward


def main(where: str) -> None:
    """Call it once, as a trainer would."""
    reward = by_server(where) if where.startswith("http") else in_process(where)
    prompts: list[Turns] = ["Name a colour.", [{"role": "user", "content": "Name a colour."}]]
    completions: list[Turns] = ["Blue.", [{"role": "assistant", "content": "Seven"}]]
    print(reward(prompts=prompts, completions=completions))


if __name__ == "__main__":
    main(*sys.argv[1:])
