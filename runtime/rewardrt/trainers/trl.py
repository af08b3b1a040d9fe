"""TRL's `GRPOTrainer(reward_funcs=[...])`, and its RLOO and online DPO trainers.

TRL calls it with `prompts` and `completions`, strings or lists of messages, `completion_ids`, and every other column of
the data set as a list of the same length; with objects of its own besides. It wants a list of floats, in which None
leaves a completion out. Read from TRL 1.16, trl/trainer/grpo_trainer.py: `_calculate_rewards`.

As in TRL's own use of a reward model, prompt and completion that are strings are one text, scored as it is; messages go
through the chat template, with the columns `tools`, `documents` and `chat_template_kwargs`.
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
    """A reward function for `reward_funcs`. `failed` is None: a completion that cannot be scored is left out."""

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Return the reward of each completion."""
        return self.rewards(self.rows(prompts, completions, columns))


class AsyncReward(_Rows):
    """The same for TRL's event loop: reward functions of this kind wait for their servers together."""

    async def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Return the reward of each completion."""
        return await self.arewards(self.rows(prompts, completions, columns))
