"""The calls shared by everything that gives rewards: a loaded bundle (`RewardModel`) and a server (`RewardClient`).

All of them are built on `score_rows`. Each call also exists as a coroutine, whose name begins with `a`.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from rewardrt.bundle.spec import AGGREGATE_RULES, AggregateRule
from rewardrt.errors import RewardRTError, RowError, TruncationWarning
from rewardrt.scoring.scored import Ranked, Scored, ScoredRow

Messages = Sequence[dict[str, Any]]
Results = list[ScoredRow | RewardRTError]
_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class _Call(Generic[_Made]):
    """The rows that a call wants scored, and how it turns the results into its return value."""

    rows: Iterable[dict[str, Any]]
    finish: Callable[[Results], _Made]
    normalize: bool | None = None
    aggregate: AggregateRule | None = None


def _now(
    plan: Callable[Concatenate[RewardSource, _Given], _Call[_Made]],
) -> Callable[Concatenate[RewardSource, _Given], _Made]:
    def call(self: RewardSource, /, *args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
        made = plan(self, *args, **kwargs)
        return made.finish(self.score_rows(made.rows, normalize=made.normalize, aggregate=made.aggregate))

    _name(call, plan, plan.__name__.removeprefix("_"))
    return call


def _later(
    plan: Callable[Concatenate[RewardSource, _Given], _Call[_Made]],
) -> Callable[Concatenate[RewardSource, _Given], Coroutine[Any, Any, _Made]]:
    async def call(self: RewardSource, /, *args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
        made = plan(self, *args, **kwargs)
        return made.finish(await self.ascore_rows(made.rows, normalize=made.normalize, aggregate=made.aggregate))

    _name(call, plan, f"a{plan.__name__.removeprefix('_')}")
    return call


def _name(call: Any, plan: Any, name: str) -> None:
    """Give a call its own name, and the parameters and docstring of its plan."""
    functools.update_wrapper(call, plan)
    call.__name__, call.__qualname__ = name, f"RewardSource.{name}"
    made = plan.__annotations__["return"].removeprefix("_Call[").removesuffix("]")
    call.__signature__ = inspect.signature(plan).replace(return_annotation=made)


class RewardSource(ABC):
    """Base class of everything that gives rewards."""

    @property
    @abstractmethod
    def input(self) -> str:
        """What the model reads: "single", "steps" or "pairwise", as in `spec.input`."""

    @abstractmethod
    def score_rows(
        self,
        items: Iterable[dict[str, Any]],
        *,
        normalize: bool | None = None,
        aggregate: AggregateRule | None = None,
    ) -> Results:
        """Score rows of any shape; for a row that cannot be scored, the result is its error.

        A row with one text gives a `Scored`, one with `responses` a `ScoredAnswers` (`rewards`, `best`), and one with
        `chosen` and `rejected` a `ScoredPair` (`chosen_reward`, `rejected_reward`, `margin`).

        A model that rewards steps sets `steps`; its `reward` is NaN unless `aggregate` says how to combine them.
        `normalize` overrides the bundle's default. Raises RewardRTError for options that the model does not support.
        """

    async def ascore_rows(
        self,
        items: Iterable[dict[str, Any]],
        *,
        normalize: bool | None = None,
        aggregate: AggregateRule | None = None,
    ) -> Results:
        """Do what `score_rows` does without blocking the event loop."""
        import asyncio  # a sixth of this package's import time, and rarely needed

        return await asyncio.to_thread(self.score_rows, items, normalize=normalize, aggregate=aggregate)

    def _score(
        self,
        *,
        prompt: str | Messages | None = None,
        response: str | None = None,
        messages: Messages | None = None,
        text: str | None = None,
        steps: Sequence[str] | None = None,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        instruction: str | None = None,
        normalize: bool | None = None,
        aggregate: AggregateRule | None = None,
    ) -> _Call[float]:
        """Return the reward of one text, given as the fields of a row: prompt or messages with response, or text.

        `tools`, `documents` and `chat_template_kwargs` are passed to the chat template, as in transformers.
        `instruction` says what is judged, for models that read one; None takes the bundle's default. A model that
        rewards steps takes `steps` in place of response, and needs `aggregate` to combine their rewards.

        Raises RowError for any other combination of fields, and InferenceError for a reward that is not finite. Issues
        a TruncationWarning if the text was cut.
        """
        row = _given(
            prompt=prompt, response=response, messages=messages, text=text, steps=steps,
            tools=tools, documents=documents, chat_template_kwargs=chat_template_kwargs, instruction=instruction,
        )  # fmt: skip
        return _Call([row], _reward, normalize, aggregate)

    def _score_many(
        self,
        items: Iterable[dict[str, Any]],
        *,
        normalize: bool | None = None,
        aggregate: AggregateRule | None = None,
    ) -> _Call[npt.NDArray[np.float32]]:
        """Return the rewards, [n] float32, of rows that have one text each, in their order.

        A model that rewards steps needs `aggregate`: the reward of a text is the min, product, last or mean of its
        steps.

        Raises the error of the first row that cannot be scored, with its index; `score_rows` keeps the other rows.
        Issues a TruncationWarning if texts were cut.
        """
        return _Call(items, _rewards, normalize, aggregate)

    def _rank(
        self,
        *,
        responses: Sequence[str],
        prompt: str | Messages | None = None,
        messages: Messages | None = None,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        instruction: str | None = None,
        normalize: bool | None = None,
    ) -> _Call[list[Ranked]]:
        """Score answers to one prompt and return them best first; equal rewards keep the given order.

        `tools`, `documents`, `chat_template_kwargs` and `instruction` are as in `score`. Raises as `score` does.
        """
        responses = responses if isinstance(responses, str) else list(responses)  # a string is refused later, as a row
        row = _given(
            prompt=prompt, messages=messages, responses=responses,
            tools=tools, documents=documents, chat_template_kwargs=chat_template_kwargs, instruction=instruction,
        )  # fmt: skip
        return _Call([row], functools.partial(_ranked, responses), normalize)

    score, ascore = _now(_score), _later(_score)
    score_many, ascore_many = _now(_score_many), _later(_score_many)
    rank, arank = _now(_rank), _later(_rank)


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _ranked(responses: Sequence[str], results: Results) -> list[Ranked]:
    (scored,) = results
    if isinstance(scored, RewardRTError):
        raise scored
    ranked = [
        Ranked(index, responses[index], answer.reward, answer.tokens, answer.truncated, answer.comparisons)
        for index, answer in enumerate(scored.answers)
    ]
    return sorted(ranked, key=lambda answer: -answer.reward)


def _reward(results: Results) -> float:
    return float(_rewards(results, level=4)[0])


def _rewards(results: Results, *, level: int = 3) -> npt.NDArray[np.float32]:
    """Return the reward of each result, [n] float32, or raise the first error.

    `level` is the stack level that a TruncationWarning is attributed to: the line of the user's call.
    """
    whole = []
    for index, result in enumerate(results):
        if isinstance(result, RewardRTError):
            raise type(result)(f"item {index}: {result}") from result
        if not isinstance(result, Scored):
            texts = f"the row holds {len(result.answers)} texts; expected one"
            raise RowError(f"item {index}: {texts} (rank(), score_rows() and `rewardrt score` take several)")
        if result.steps and np.isnan(result.reward):
            raise RewardRTError(
                "this model gives a reward to every step: name how to make one of them, "
                f"aggregate={' or '.join(map(repr, AGGREGATE_RULES))}, or call score_rows for the rewards of the steps"
            )
        whole.append(result)
    cut = [(index, result) for index, result in enumerate(whole) if result.truncated]
    if cut:
        index, first = cut[0]
        found = f"{len(cut)} of {len(whole)} texts were cut at {first.tokens} tokens"
        warnings.warn(f"{found} (item {index}: {first.truncated})", TruncationWarning, stacklevel=level)
    return np.array([result.reward for result in whole], dtype=np.float32)
