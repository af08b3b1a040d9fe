"""ms-swift's reward plug-in: `--external_plugins FILE.py --reward_funcs NAME`.

ms-swift makes an object of the class that the file puts into `swift.rewards.orms`, and calls it with `completions`, a
list of strings, and the columns of the data set, `messages` among them: a conversation each, which ends with the
completion. It wants a list of floats, in which None leaves a completion out. Read from ms-swift 4.6:
swift/rewards/orm.py, swift/rl_core/grpo_algorithm.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rewardrt.errors import RowError
from rewardrt.text.rows import TEMPLATE_FIELDS
from rewardrt.trainers.reward import TrainerReward, plain


class _Rows(TrainerReward):
    def rows(self, completions: Sequence[str], columns: dict[str, Any]) -> list[Any]:
        """Return the rows of completions."""
        conversations = columns.get("messages")
        if not isinstance(conversations, Sequence) or len(conversations) != len(completions):
            return [RowError("expected a conversation for each completion in the column messages")] * len(completions)
        fields = {name: columns[name] for name in TEMPLATE_FIELDS if isinstance(columns.get(name), Sequence)}
        found = []
        for index, (completion, conversation) in enumerate(zip(completions, conversations, strict=True)):
            turns = plain(conversation)
            if turns and turns[-1].get("role") == "assistant":
                turns = turns[:-1]
            found.append(self.row(turns, completion, {name: values[index] for name, values in fields.items()}))
        return found


def orm(where: Any, *, failed: Any = None, **options: Any) -> type[TrainerReward]:
    """Return the class for `orms`; its options are those of `TrainerReward`."""

    class RewardRT(_Rows):
        def __init__(self, args: Any = None, **_: Any) -> None:
            super().__init__(where, failed=failed, **options)

        def __call__(self, completions: Sequence[str], **columns: Any) -> list[float | None]:
            return self.rewards(self.rows(completions, columns))

    return RewardRT


def async_orm(where: Any, *, failed: Any = None, **options: Any) -> type[TrainerReward]:
    """Return the same with a coroutine: such rewards wait for their servers together."""

    class AsyncRewardRT(_Rows):
        def __init__(self, args: Any = None, **_: Any) -> None:
            super().__init__(where, failed=failed, **options)

        async def __call__(self, completions: Sequence[str], **columns: Any) -> list[float | None]:
            return await self.arewards(self.rows(completions, columns))

    return AsyncRewardRT
