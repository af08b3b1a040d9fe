"""OpenRLHF's reward file: `--reward.remote_url FILE.py`, whose function is called `reward_func`.

OpenRLHF calls it in threads, a sample each, with `queries` (prompt and answer as one text, special tokens and all),
`prompts` and `labels`, and wants an object with `rewards`, `scores` and `extra_logs`. Of an error it writes a line to
its log, and the sample goes on without a reward, on which the step then fails. Read from OpenRLHF 0.11.2:
openrlhf/utils/agent.py.

A server needs no file: `--reward.remote_url http://HOST:PORT/get_reward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rewardrt.trainers.reward import TrainerReward


class Reward(TrainerReward):
    """The function `reward_func` of a reward file."""

    def __call__(self, queries: Sequence[str], prompts: Any = None, labels: Any = None, **_: Any) -> dict[str, Any]:
        """Return the rewards of texts that are scored as they are."""
        found = self.rewards([{"text": query} for query in queries])
        return {"rewards": found, "scores": found, "extra_logs": {"reward_model": found}}
