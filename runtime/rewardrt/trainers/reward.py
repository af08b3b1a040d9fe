"""The base of all trainers' rewards: a bundle or a server, opened in each process when it first scores.

A trainer may pickle its reward function for every call (a pool of processes), ship it to other machines (Ray), or fork
after it was made. So the object only stores where the rewards come from.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import threading
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from rewardrt.bundle.manifest import manifest_sha256
from rewardrt.bundle.spec import AGGREGATE_RULES, AggregateRule
from rewardrt.client.address import SCHEMES
from rewardrt.errors import BundleError, RewardRTError, RowError, TruncationWarning
from rewardrt.forks import after_fork
from rewardrt.reward_client import RewardClient
from rewardrt.reward_model import RewardModel
from rewardrt.scoring.scored import Scored
from rewardrt.scoring.source import Results, RewardSource
from rewardrt.text.rows import REFUSED_FIELDS, TEMPLATE_FIELDS

MEDIA_FIELDS = tuple(name for name, advice in REFUSED_FIELDS.items() if advice == "only text is scored")
_LOG = logging.getLogger("rewardrt.trainers")


class TrainerReward:
    """Rewards from a bundle or a server, with the options common to all trainers."""

    leaves_out: ClassVar[bool] = False  # whether the trainer skips a text whose reward is None

    def __init__(
        self,
        where: str | Path | RewardSource,
        *,
        failed: float | Literal["raise"] | None = "raise",
        chat: bool = False,
        end: str = "",
        columns: Collection[str] = TEMPLATE_FIELDS,
        expect_sha256: str | None = None,
        normalize: bool | None = None,
        aggregate: AggregateRule | None = None,
        name: str = "rewardrt",
        **options: Any,
    ) -> None:
        """Say where rewards come from; nothing is opened yet.

        `where`     a bundle folder, or the address of a server (several are separated by commas); or an existing
                    `RewardModel` or `RewardClient`
        `failed`    the reward of a text that cannot be scored. "raise": its error ends the call. None: for trainers
                    that skip such a text. A server that does not answer always raises
        `chat`      whether a string prompt is a user turn for the bundle's chat template. Otherwise a string prompt
                    and a string completion are joined to one text, which is scored as it is
        `end`       the text with which the policy ends its answers, such as <|im_end|>, if the trainer leaves it in
                    the completion. It is removed from answers to which the bundle's chat template adds its own end
        `columns`   the columns of the data set that are given to the chat template: some of `tools`, `documents` and
                    `chat_template_kwargs`. Leave out one that means something else or that the template does not read
        `expect_sha256` the SHA-256 of the bundle's reward.json, which covers all its files; another bundle is an error
        `normalize`, `aggregate`  as in `RewardModel.score_many`
        `name`      the name of the reward in the trainer's log
        `options`   further options of `RewardModel.load` or `RewardClient`

        Raises RewardRTError for invalid options.
        """
        if failed is None and not self.leaves_out:
            raise RewardRTError('failed=None: this trainer wants a number for every text; give a number, or "raise"')
        if not (failed is None or failed == "raise" or isinstance(failed, int | float)):
            raise RewardRTError(f'failed: expected "raise", a number or None, found {failed!r}')
        if wrong := set(columns) - set(TEMPLATE_FIELDS):
            raise RewardRTError(f"columns: expected some of {', '.join(TEMPLATE_FIELDS)}, found {sorted(wrong)}")
        self.__name__ = name
        self.failed = failed
        self._where = _place(where)
        self._options = _checked(self._where, options | ({"expect_sha256": expect_sha256} if expect_sha256 else {}))
        self._chat, self._end, self._columns = chat, end, frozenset(columns)
        self._normalize, self._aggregate = normalize, aggregate

    def open(self) -> RewardSource:
        """Return the bundle or the client, which is opened once in each process. Raises RewardRTError."""
        source = self._where if isinstance(self._where, RewardSource) else _opened(self._where, self._options)
        if source.input == "pairwise":
            raise RewardRTError(
                "this model compares answers, and gives no reward to one: no trainer's reward can use it"
            )
        if source.input == "steps" and self._aggregate is None:
            rules = " or ".join(map(repr, AGGREGATE_RULES))
            raise RewardRTError(f"this model gives a reward to every step: make one of them, by aggregate={rules}")
        return source

    def rewards(self, rows: Sequence[Mapping[str, Any] | RowError]) -> list[Any]:
        """Return the rewards of rows with one text each; an error among the rows counts as a failed text."""
        good = [dict(row) for row in rows if not isinstance(row, RowError)]
        return self._settled(rows, self.open().score_rows(good, normalize=self._normalize, aggregate=self._aggregate))

    async def arewards(self, rows: Sequence[Mapping[str, Any] | RowError]) -> list[Any]:
        """Do what `rewards` does without blocking the event loop."""
        import asyncio  # a sixth of this package's import time, and rarely needed

        good = [dict(row) for row in rows if not isinstance(row, RowError)]
        source = await asyncio.to_thread(self.open)
        scored = await source.ascore_rows(good, normalize=self._normalize, aggregate=self._aggregate)
        return self._settled(rows, scored)

    def row(self, prompt: Any, completion: Any, columns: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the row of a prompt and its completion, each a string or a list of messages.

        Two strings are joined to one text, unless `chat` is set. `columns` are the data set's values for this sample.
        Those that the chat template reads are passed on. Images and the like are passed on too, so that the row is
        refused.
        """
        before, after = plain(prompt), plain(completion)
        found = columns or {}
        row: dict[str, Any] = {name: True for name in MEDIA_FIELDS if _filled(found.get(name))}
        if isinstance(before, str) and isinstance(after, str) and not self._chat:
            return row | {"text": before + after}
        for name in TEMPLATE_FIELDS:
            if name in self._columns and _filled(value := found.get(name)):
                row[name] = _decoded(plain(value))
        if isinstance(after, str):
            name = "prompt" if isinstance(before, str) else "messages"
            return row | {name: before, "response": after.removesuffix(self._end)}
        if (
            isinstance(after, list)
            and after
            and isinstance(after[-1], dict)
            and isinstance(after[-1].get("content"), str)
        ):
            after[-1]["content"] = after[-1]["content"].removesuffix(self._end)
        if isinstance(before, str):
            before = [{"role": "user", "content": before}]
        if isinstance(before, list) and isinstance(after, list):
            return row | {"messages": [*before, *after]}
        return row | {"messages": before if isinstance(after, list) else after}  # refused later, with its own error

    def rows(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]
    ) -> list[dict[str, Any] | RowError]:
        """Return the rows of completions; `columns` are those of the data set, each a list of the same length."""
        read = (*self._columns, *MEDIA_FIELDS)
        given = {name: columns[name] for name in read if columns.get(name) is not None}
        for name, values in given.items():
            if isinstance(values, str | Mapping) or not hasattr(values, "__len__") or len(values) != len(prompts):
                return [RowError(f"{name}: expected a list with a value for each completion")] * len(prompts)
        pairs = enumerate(zip(prompts, completions, strict=True))
        return [
            self.row(prompt, completion, {name: values[index] for name, values in given.items()})
            for index, (prompt, completion) in pairs
        ]

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
    """Convert a data set's value to Python types: arrays to lists, objects without null fields."""
    if hasattr(value, "tolist") and not isinstance(value, str):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _filled(value: Any) -> bool:
    """Whether a column has a value: not null, and not an empty list, object or string."""
    return value is not None and not (hasattr(value, "__len__") and len(value) == 0)


def _decoded(value: Any) -> Any:
    """Decode a string of JSON, as which data sets may store objects; anything else is returned unchanged."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _place(where: str | Path | RewardSource) -> str | RewardSource:
    """Return where rewards come from in a form that works in other processes, whatever their working directory."""
    if isinstance(where, RewardSource) or "://" in str(where) or str(where).startswith(SCHEMES):
        return where if isinstance(where, RewardSource) else str(where)
    return os.path.abspath(where)


def _checked(where: str | RewardSource, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options if opening will accept them, or raise RewardRTError."""
    if isinstance(where, RewardSource):
        known: set[str] = set()
        said = f"{type(where).__name__} that is there already: give the options to it"
    else:
        makes: Any = RewardClient if where.startswith(SCHEMES) else RewardModel.load
        known = {*inspect.signature(makes).parameters, "expect_sha256"} - {"bundle", "urls"}
        said = f"{makes.__qualname__}, which has {', '.join(sorted(known))}"
    if wrong := sorted(options.keys() - known):
        raise RewardRTError(f"{', '.join(wrong)}: not an option of a reward, nor of the {said}")
    return options


_SOURCES: dict[str, RewardSource] = {}
_LOCK = threading.Lock()


def _opened(where: str, options: Mapping[str, Any]) -> RewardSource:
    key = json.dumps([where, sorted(options.items())], default=repr)
    with _LOCK:
        if key not in _SOURCES:
            _SOURCES[key] = _open(where, **options)
        return _SOURCES[key]


def _open(where: str, *, expect_sha256: str | None = None, **options: Any) -> RewardSource:
    if where.startswith(SCHEMES):
        return RewardClient(where.split(","), expect_sha256=expect_sha256, **options)
    model = RewardModel.load(where, **options)
    if expect_sha256 is not None:
        found = manifest_sha256(model.bundle.path)
        if found != expect_sha256:
            raise BundleError(f"{where}: has the manifest SHA-256 {found}, expected {expect_sha256}")
    return model


def _forked() -> None:
    """In a forked process, replace the lock, which another thread may have held; the sources reopen themselves."""
    global _LOCK  # noqa: PLW0603
    _LOCK = threading.Lock()


after_fork(_forked)
