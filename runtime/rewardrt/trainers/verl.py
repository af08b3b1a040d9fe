"""verl's custom reward function: `reward.custom_reward_function.path=FILE reward.custom_reward_function.name=NAME`.

verl calls it with `data_source`, `solution_str`, `ground_truth` and `extra_info` and expects a float. Its older manager
`batch` passes the plural of these and expects a list. A plain function runs in threads (manager `naive`) or in workers
of Ray (`remote`); a coroutine function runs on verl's event loop. Read from verl 0.9.1: verl/trainer/ppo/reward.py,
verl/experimental/reward_loop/reward_manager and verl/workers/reward_manager.

The prompt is not among the arguments: put it into `extra_info`, as `prompt`, a string or a list of messages. The answer
comes without special tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rewardrt.errors import RowError
from rewardrt.trainers.reward import TrainerReward, plain


class _Rows(TrainerReward):
    def __init__(self, where: Any, *, prompt_field: str = "prompt", **options: Any) -> None:
        """Name the field of `extra_info` that contains the prompt; the other options are those of `TrainerReward`."""
        super().__init__(where, **options)
        self._prompt_field = prompt_field

    def answer(self, solution_str: str, extra_info: Mapping[str, Any] | None) -> dict[str, Any] | RowError:
        """Return the row of an answer, or an error if the prompt is missing."""
        extra = extra_info if isinstance(extra_info, Mapping) else {}
        prompt = plain(extra.get(self._prompt_field))
        if not prompt:
            wanted = f"extra_info[{self._prompt_field!r}]"
            return RowError(f"expected the prompt in {wanted}, found none: verl passes none; add it to the data set")
        return self.row(prompt, solution_str, extra)


class Reward(_Rows):
    """The reward function for the managers `naive`, `dapo` and `remote`."""

    def __call__(
        self, data_source: Any, solution_str: str, ground_truth: Any, extra_info: Any = None, **_: Any
    ) -> float:
        """Return the reward of one answer."""
        found: float = self.rewards([self.answer(solution_str, extra_info)])[0]
        return found


class AsyncReward(_Rows):
    """The same for verl's event loop, best with a server: `compute_score = AsyncReward("http://...").compute_score`.

    Use the method itself: verl checks whether the function is a coroutine function, which an object with an async
    `__call__` is not.
    """

    async def compute_score(
        self, data_source: Any, solution_str: str, ground_truth: Any, extra_info: Any = None, **_: Any
    ) -> float:
        """Return the reward of one answer."""
        found: float = (await self.arewards([self.answer(solution_str, extra_info)]))[0]
        return found


class BatchReward(_Rows):
    """The reward function for the manager `batch` of verl's older trainers."""

    def __call__(
        self,
        data_sources: Any,
        solution_strs: Sequence[str],
        ground_truths: Any,
        extra_infos: Sequence[Any] | None = None,
        **_: Any,
    ) -> list[float]:
        """Return the reward of each answer."""
        extras = [None] * len(solution_strs) if extra_infos is None else list(extra_infos)
        pairs = zip(solution_strs, extras, strict=True)
        return self.rewards([self.answer(solution, extra) for solution, extra in pairs])
