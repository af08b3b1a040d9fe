"""OpenRLHF's reward file: `--reward.remote_url FILE.py`, which defines the function `reward_func`.

OpenRLHF calls it in threads, one sample at a time, with `queries` (prompt and answer as one text with all special
tokens), `prompts` and `labels`. It expects a dictionary with `rewards`, `scores` and `extra_logs`. If the function
raises, OpenRLHF logs one line and continues with a sample without a reward, at which the training step then fails. Read
from OpenRLHF 0.11.2: openrlhf/utils/agent.py.

With a server no file is needed: `--reward.remote_url http://HOST:PORT/get_reward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rewardrt.trainers.reward import TrainerReward


class Reward(TrainerReward):
    """The function `reward_func` of a reward file."""

    def __call__(self, queries: Sequence[str], prompts: Any = None, labels: Any = None, **_: Any) -> dict[str, Any]:
        """Return the rewards of texts, which are scored as they are."""
        found = self.rewards([{"text": query} for query in queries])
        return {"rewards": found, "scores": found, "extra_logs": {"reward_model": found}}
