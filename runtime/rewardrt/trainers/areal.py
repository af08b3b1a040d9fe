"""AReaL's reward function, which a workflow takes as a callable or as the string "module.name".

AReaL calls it in a pool of processes with `prompt` and `completions`, both decoded with their special tokens,
`prompt_ids`, `completion_ids`, and the fields of the sample. It waits 15 seconds, tries four times, and then takes the
reward 0; so use a server for a model that takes seconds to load. Read from AReaL 1.0.4: areal/api/reward_api.py,
areal/workflow/rlvr.py.

If the sample has `messages`, they and the completion go through the bundle's chat template. Otherwise prompt and
completion are joined to one text, which is scored as it is.
"""

from __future__ import annotations

from typing import Any

from rewardrt.trainers.reward import TrainerReward


class Reward(TrainerReward):
    """The reward function of a workflow.

    `end` is the policy's end of an answer, which AReaL leaves in the completion.
    """

    def __init__(self, where: Any, *, end: str, **options: Any) -> None:
        super().__init__(where, end=end, **options)

    def __call__(
        self, prompt: str, completions: str, prompt_ids: Any = None, completion_ids: Any = None, **data: Any
    ) -> float:
        """Return the reward of one completion."""
        before = data["messages"] if data.get("messages") is not None else prompt
        found: float = self.rewards([self.row(before, completions, data)])[0]
        return found
