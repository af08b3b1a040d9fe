"""slime's `--custom-rm-path module.function`.

slime awaits it with its arguments and a sample and expects a number; in group and batch mode it passes a list of
samples and expects a list. A sample has `prompt` (a rendered text with --apply-chat-template, else a list of messages),
`response`, `label` and `metadata`. Read from slime, slime/rollout/rm_hub: `async_rm`, `batched_async_rm`.

With a server no function is needed: `--rm-type remote_rm --rm-url http://HOST:PORT/remote_rm`.
"""

from __future__ import annotations

from typing import Any

from rewardrt.trainers.reward import TrainerReward


class Reward(TrainerReward):
    """The function of `--custom-rm-path`.

    `end` is the policy's end of an answer, which slime leaves in the response.
    """

    def __init__(self, where: Any, *, end: str, **options: Any) -> None:
        super().__init__(where, end=end, **options)

    async def __call__(self, args: Any, sample: Any, **_: Any) -> Any:
        """Return the reward of a sample, or the rewards of a list of samples."""
        if isinstance(sample, list | tuple):
            return await self.arewards([self.sample(each) for each in sample])
        return (await self.arewards([self.sample(sample)]))[0]

    def sample(self, sample: Any) -> dict[str, Any]:
        """Return the row of a sample."""
        metadata = sample.metadata if isinstance(sample.metadata, dict) else {}
        images = {"images": getattr(sample, "multimodal_inputs", None)}
        return self.row(sample.prompt, sample.response, metadata | images)
