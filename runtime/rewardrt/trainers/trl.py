"""TRL's `GRPOTrainer(reward_funcs=[...])`, and its RLOO and online DPO trainers.

TRL calls the function with `prompts` and `completions` (strings or lists of messages), `completion_ids`, every other
column of the data set as a list of the same length, and some objects of its own. It expects a list of floats, in which
None skips a completion. Read from TRL 1.16, trl/trainer/grpo_trainer.py: `_calculate_rewards`.

As when TRL itself uses a reward model, a string prompt and a string completion are joined to one text, which is scored
as it is. Messages go through the chat template, with the columns `tools`, `documents` and `chat_template_kwargs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rewardrt.trainers.reward import TrainerReward


class _Rows(TrainerReward):
    leaves_out = True

    def __init__(self, where: Any, *, failed: Any = None, **options: Any) -> None:
        super().__init__(where, failed=failed, **options)


class Reward(_Rows):
    """A reward function for `reward_funcs`.

    By default `failed` is None: a completion that cannot be scored is skipped.
    """

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Return the reward of each completion."""
        return self.rewards(self.rows(prompts, completions, columns))


class AsyncReward(_Rows):
    """The same for TRL's event loop, so that several such reward functions wait for their servers together."""

    async def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Return the reward of each completion."""
        return await self.arewards(self.rows(prompts, completions, columns))
