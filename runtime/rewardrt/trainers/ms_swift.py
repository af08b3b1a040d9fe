"""ms-swift's reward plug-in: `--external_plugins FILE.py --reward_funcs NAME`.

ms-swift makes an object of the class that the file puts into `swift.rewards.orms`. It calls the object with
`completions`, a list of strings, and the columns of the data set. The column `messages` has one conversation for each
completion, which ends with that completion. ms-swift expects a list of floats, in which None skips a completion. Read
from ms-swift 4.6: swift/rewards/orm.py, swift/rl_core/grpo_algorithm.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rewardrt.errors import RowError
from rewardrt.trainers.reward import TrainerReward, plain


class _Rows(TrainerReward):
    leaves_out = True

    def conversations(self, completions: Sequence[str], columns: dict[str, Any]) -> list[Any]:
        """Return the rows of completions."""
        found = columns.get("messages")
        if not isinstance(found, Sequence) or len(found) != len(completions):
            return [RowError("expected a conversation for each completion in the column messages")] * len(completions)
        turns = [plain(each) or [] for each in found]
        return self.rows([each[:-1] for each in turns], [each[-1:] for each in turns], columns)


def orm(where: Any, *, failed: Any = None, name: str = "rewardrt", **options: Any) -> type[TrainerReward]:
    """Return the class for `orms`; its options are those of `TrainerReward`."""

    class RewardRT(_Rows):
        def __init__(self, args: Any = None, **_: Any) -> None:
            super().__init__(where, failed=failed, name=name, **options)

        def __call__(self, completions: Sequence[str], **columns: Any) -> list[float | None]:
            return self.rewards(self.conversations(completions, columns))

    RewardRT.__name__ = name  # ms-swift's log shows the name of the class
    return RewardRT


def async_orm(where: Any, *, failed: Any = None, name: str = "rewardrt", **options: Any) -> type[TrainerReward]:
    """Return the same class with a coroutine, so that several such rewards wait for their servers together."""

    class AsyncRewardRT(_Rows):
        def __init__(self, args: Any = None, **_: Any) -> None:
            super().__init__(where, failed=failed, name=name, **options)

        async def __call__(self, completions: Sequence[str], **columns: Any) -> list[float | None]:
            return await self.arewards(self.conversations(completions, columns))

    AsyncRewardRT.__name__ = name
    return AsyncRewardRT
