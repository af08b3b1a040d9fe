"""What all trainers' rewards are made of: a bundle or a server, opened where and when it first scores.

A trainer may pickle its reward function for every call (a pool of processes), ship it to other machines (Ray), or fork
after it was made. So what is kept is where the rewards come from; in each process that is opened once.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rewardrt.bundle.spec import AggregateRule
from rewardrt.errors import RewardRTError, RowError, TruncationWarning
from rewardrt.reward_client import RewardClient
from rewardrt.reward_model import RewardModel
from rewardrt.scoring.scored import Scored
from rewardrt.scoring.source import Results, RewardSource
from rewardrt.text.rows import TEMPLATE_FIELDS

SCHEMES = ("http://", "https://", "unix:")
Turns = str | Sequence[Mapping[str, Any]]
_LOG = logging.getLogger("rewardrt.trainers")


class TrainerReward:
    """Rewards from a bundle or a server, under the options that all trainers' rewards have."""

    def __init__(
        self,
        where: str | Path | RewardSource,
        *,
        failed: float | Literal["raise"] | None = "raise",
        chat: bool = False,
        end: str = "",
        normalize: bool | None = None,
        aggregate: AggregateRule | None = None,
        name: str = "rewardrt",
        **options: Any,
    ) -> None:
        """Say where rewards come from; nothing is opened yet.

        `where`     a bundle folder, or the address of a server (several are separated by commas); or a `RewardModel`
                    or `RewardClient` that is there already
        `failed`    the reward of a text that cannot be scored; "raise": its error ends the call. None is for trainers
                    that leave such a text out
        `chat`      whether a prompt that is a string is a user's turn, for the bundle's chat template. Else prompt and
                    completion are one text already, which is scored as it is
        `end`       what the policy ends its answers with, such as <|im_end|>, where the trainer leaves it in the
                    completion: taken off of an answer that the bundle's chat template ends by itself
        `normalize`, `aggregate`  as in `RewardModel.score_many`
        `name`      what the trainer's log calls the reward
        `options`   those of `RewardModel.load` or `RewardClient`
        """
        self.__name__ = name
        self.failed = failed
        self._where: str | RewardSource = where if isinstance(where, RewardSource) else str(where)
        self._options = options
        self._chat, self._end = chat, end
        self._normalize, self._aggregate = normalize, aggregate

    def open(self) -> RewardSource:
        """Return the bundle or the client, opened once in each process. Raises RewardRTError."""
        if isinstance(self._where, RewardSource):
            return self._where
        return _opened(self._where, self._options)

    def rewards(self, rows: Sequence[Mapping[str, Any] | RowError]) -> list[Any]:
        """Return the rewards of rows of one text each; an error that is given stands for its row."""
        good = [dict(row) for row in rows if not isinstance(row, RowError)]
        return self._settled(rows, self.open().score_rows(good, normalize=self._normalize, aggregate=self._aggregate))

    async def arewards(self, rows: Sequence[Mapping[str, Any] | RowError]) -> list[Any]:
        """Do what `rewards` does, while the event loop goes on."""
        good = [dict(row) for row in rows if not isinstance(row, RowError)]
        scored = await self.open().ascore_rows(good, normalize=self._normalize, aggregate=self._aggregate)
        return self._settled(rows, scored)

    def row(self, prompt: Any, completion: Any, columns: Mapping[str, Any] | None = None) -> dict[str, Any] | RowError:
        """Return the row of a prompt and its completion, each a string or a list of messages.

        Two strings are one text, unless `chat` is set. `columns` may have what a chat template reads: `tools`,
        `documents` and `chat_template_kwargs`.
        """
        before, after = plain(prompt), plain(completion)
        if isinstance(before, str) and isinstance(after, str) and not self._chat:
            return {"text": before + after}
        if isinstance(after, str):
            after = [{"role": "assistant", "content": after.removesuffix(self._end)}]
        if isinstance(before, str):
            before = [{"role": "user", "content": before}]
        if not isinstance(before, list) or not isinstance(after, list):
            found = f"{type(before).__name__} and {type(after).__name__}"
            return RowError(f"expected a prompt and a completion that are strings or lists of messages, found {found}")
        row: dict[str, Any] = {"messages": [*before, *after]}
        for field in TEMPLATE_FIELDS:
            value = plain((columns or {}).get(field))
            row[field] = json.loads(value) if isinstance(value, str) and value else value or None
        return row

    def _settled(self, rows: Sequence[Mapping[str, Any] | RowError], scored: Results) -> list[Any]:
        results = iter(scored)
        found = [row if isinstance(row, RowError) else next(results) for row in rows]
        rewards: list[Any] = []
        errors: dict[int, RewardRTError] = {}
        for index, result in enumerate(found):
            if isinstance(result, Scored) and result.reward == result.reward:
                rewards.append(result.reward)
                continue
            errors[index] = result if isinstance(result, RewardRTError) else RowError("the row has no one reward")
            rewards.append(self.failed)
        if errors:
            index, error = next(iter(errors.items()))
            said = f"{len(errors)} of {len(rows)} texts have no reward; text {index}: {error}"
            if self.failed == "raise":
                raise type(error)(f"{said}; `failed` is the reward that such a text gets instead of this error")
            _LOG.warning("%s", said)
        cut = [result for result in found if isinstance(result, Scored) and result.truncated]
        if cut:
            text = f"texts were cut at {cut[0].tokens} tokens: their rewards are those of what is left"
            warnings.warn(text, TruncationWarning, stacklevel=4)
        return rewards


def plain(value: Any) -> Any:
    """Return a value of a data set as Python's own: arrays as lists, objects without what is null in them."""
    if hasattr(value, "tolist") and not isinstance(value, str):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


_SOURCES: dict[str, RewardSource] = {}
_LOCK = threading.Lock()


def _opened(where: str, options: Mapping[str, Any]) -> RewardSource:
    key = json.dumps([where, sorted(options.items())], default=repr)
    with _LOCK:
        if key not in _SOURCES:
            if where.startswith(SCHEMES):
                _SOURCES[key] = RewardClient(where.split(","), **options)
            else:
                _SOURCES[key] = RewardModel.load(where, **options)
        return _SOURCES[key]


def _forked() -> None:
    """Make a lock that another thread of the parent may have held; the sources open themselves again."""
    global _LOCK  # noqa: PLW0603
    _LOCK = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_forked)
