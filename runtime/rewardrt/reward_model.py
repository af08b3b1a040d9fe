"""The public call: from rows to rewards.

rows -> texts (scoring.answers) -> values (scoring.runner) -> rows with rewards (scoring.answers)
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from rewardrt.bundle.engines import check_whole, engine_request, warm_choice
from rewardrt.bundle.manifest import Bundle, read_bundle
from rewardrt.bundle.opening import LoadOptions, Opening, choose_variant
from rewardrt.bundle.precisions import range_advice
from rewardrt.bundle.spec import AGGREGATE_RULES, AggregateRule, Spec
from rewardrt.errors import BundleError, InferenceError, RewardRTError, RowError, TruncationWarning
from rewardrt.graph.session import GraphSession
from rewardrt.machine.providers import Provider, ProviderChoice, check_onnxruntime, select_provider
from rewardrt.scoring.answers import Answers, Prepared, regroup
from rewardrt.scoring.batching import BATCH_TOKENS
from rewardrt.scoring.prefix import Statistics
from rewardrt.scoring.runner import Runner
from rewardrt.scoring.scored import Ranked, Scored, ScoredRow
from rewardrt.text.tokens import EncodedText

Messages = Sequence[dict[str, Any]]
_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")


def _in_thread(
    call: Callable[Concatenate[RewardModel, _Given], _Made],
) -> Callable[Concatenate[RewardModel, _Given], Coroutine[Any, Any, _Made]]:
    """Return the twin of a call for coroutines: it waits in a thread, and the event loop goes on."""

    async def twin(self: RewardModel, /, *args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
        import asyncio  # a sixth of this package's import time, and not everybody's

        return await asyncio.to_thread(call, self, *args, **kwargs)

    functools.update_wrapper(twin, call)
    return twin


class RewardModel:
    """A loaded bundle. Scoring is thread-safe, and a text's reward does not depend on what is scored with it.

    It can be pickled and copied: what is sent is where the bundle lies and the options of `load`, and the bundle is
    opened there. In a process that was forked it is opened again when it first scores.
    """

    def __init__(self, bundle: Bundle, session: GraphSession, opening: Opening) -> None:
        """Put a bundle and one of its graphs together; use `load`."""
        options = opening.options
        self.bundle = bundle
        self.spec: Spec = bundle.manifest.spec
        self.precision = options.precision
        if self.spec.input == "steps" and not session.has_token_rewards:
            raise BundleError(f"{bundle.path}: the model rewards steps, and its graph has no output token_rewards")
        self.answers = Answers(bundle)
        self.runner = Runner(
            session,
            self.spec,
            weights_bytes=bundle.weights_bytes(bundle.variant(self.precision)),
            batch_tokens=BATCH_TOKENS if options.batch_tokens is None else options.batch_tokens,
            padding=options.padding,
            prefix_reuse=options.prefix_reuse,
            prefix_cache_mb=options.prefix_cache_mb,
            advice=range_advice(self.precision),
        )
        self._opening = opening

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        *,
        provider: ProviderChoice = "auto",
        precision: str = "auto",
        threads: int | None = None,
        batch_tokens: int | None = None,
        padding: bool | None = None,
        prefix_reuse: bool = True,
        prefix_cache_mb: int = 0,
        check_hashes: bool = True,
    ) -> RewardModel:
        """Load a bundle folder.

        `provider`      "auto" takes CUDA where it really starts, else the CPU; a named one is obtained or raises
        `precision`     one of the bundle's graphs; "auto" takes int8 on a CPU that is good for it and half on a GPU,
                        where its certificate allows, and else the first that was asked for at export
        `threads`       of the CPU provider; None leaves it to onnxruntime (the physical cores)
        `batch_tokens`  budget of one batch in tokens, padding included; None: 16,384
        `padding`       whether texts of different lengths may share a batch; None: not on a CPU
        `prefix_reuse`  compute once what texts of one call begin with; it shows in no reward but by rounding on a GPU
        `prefix_cache_mb` memory for beginnings of texts that are kept between calls, in MiB; 0: none
        `check_hashes`  read every file once and compare its SHA-256 with the manifest

        Raises BundleError or ProviderError.
        """
        options = LoadOptions(
            provider, precision, threads, batch_tokens, padding, prefix_reuse, prefix_cache_mb, check_hashes
        )
        opened = read_bundle(bundle, check_hashes=check_hashes)
        return cls._load(opened, Opening.of(opened, options))

    @classmethod
    def _load(cls, bundle: Bundle, opening: Opening) -> RewardModel:
        selection = select_provider(warm_choice(bundle, opening.options.provider))
        variant = choose_variant(bundle, opening.options.precision, selection.provider)
        check_whole(bundle, variant, selection.provider)
        if variant.onnxruntime:
            check_onnxruntime(variant.onnxruntime, f"{bundle.path}: the {variant.precision} graph")
        opening = replace(opening, options=replace(opening.options, precision=variant.precision))
        graph, engine, threads = bundle.file(variant.graph), engine_request(bundle, variant), opening.options.threads
        session = GraphSession.open(graph, selection, threads, unchanged=opening.read, engine=engine)
        return cls(bundle, session, opening)

    @classmethod
    def _load_again(cls, opening: Opening) -> RewardModel:
        return cls._load(opening.read(), opening)

    def __reduce__(self) -> tuple[Any, ...]:
        """Be pickled and copied as what the model was loaded by."""
        return type(self)._load_again, (self._opening,)

    def __repr__(self) -> str:
        return (
            f"RewardModel({str(self.bundle.path)!r}, family={self.spec.family!r}, precision={self.precision!r}, "
            f"provider={self.provider!r}, max_length={self.spec.max_length})"
        )

    @property
    def session(self) -> GraphSession:
        """The graph that runs."""
        return self.runner.session

    @property
    def provider(self) -> Provider:
        """The execution provider that runs, whatever was asked for."""
        return self.session.provider

    @property
    def statistics(self) -> Statistics:
        """The tokens that were scored since the model was loaded, and how many of them were computed."""
        return self.runner.statistics

    def score(
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
    ) -> float:
        """Return the reward of one text, given as the fields of a row: prompt or messages with response, or text.

        `tools`, `documents` and `chat_template_kwargs` go to the chat template, as in transformers. `instruction` says
        what is judged, of a model that reads one; None takes the bundle's.
        A model that rewards steps takes `steps` for the response, and needs `aggregate` to make one reward of theirs.
        Raises RowError for a combination that is none of these, InferenceError for a reward that is not a number.
        Warns with TruncationWarning when the text was cut.
        """
        row = _given(
            prompt=prompt, response=response, messages=messages, text=text, steps=steps,
            tools=tools, documents=documents, chat_template_kwargs=chat_template_kwargs, instruction=instruction,
        )  # fmt: skip
        return float(self._score_texts([row], normalize, aggregate)[0])

    def score_many(
        self,
        items: Iterable[dict[str, Any]],
        *,
        normalize: bool | None = None,
        aggregate: AggregateRule | None = None,
    ) -> npt.NDArray[np.float32]:
        """Return the rewards, [n] float32, of rows that hold one text each, in their order.

        A model that rewards steps needs `aggregate`: the min, product, last or mean of a text's steps is its reward.
        Raises what the first row that cannot be scored deserves, naming it; use `score_rows` to keep the others.
        Warns with TruncationWarning when texts were cut.
        """
        return self._score_texts(items, normalize, aggregate)

    def score_rows(
        self,
        items: Iterable[dict[str, Any]],
        *,
        normalize: bool | None = None,
        aggregate: AggregateRule | None = None,
    ) -> list[ScoredRow | RewardRTError]:
        """Score rows of any shape; a row that cannot be scored has its error in its place.

        A row of one text gives a `Scored`, one with `responses` a `ScoredAnswers` (`rewards`, `best`), and one with
        `chosen` and `rejected` a `ScoredPair` (`chosen_reward`, `rejected_reward`, `margin`).
        A model that rewards steps gives `steps`, and the `reward` NaN unless they are aggregated.
        """
        return self.score_prepared(self.answers.prepare(items), normalize=normalize, aggregate=aggregate)

    def score_prepared(
        self, prepared: Prepared, *, normalize: bool | None = None, aggregate: AggregateRule | None = None
    ) -> list[ScoredRow | RewardRTError]:
        """Score rows that `answers.prepare` made ready, ahead or in another thread; see `score_rows`."""
        self.answers.check_options(normalize=normalize, aggregate=aggregate)
        good = [text for text in prepared.texts if isinstance(text, EncodedText)]
        values = iter(self.runner.run(good))
        scores = (
            self.answers.finish(text, next(values), normalize=normalize, aggregate=aggregate)
            if isinstance(text, EncodedText)
            else text
            for text in prepared.texts
        )
        return regroup(prepared.rows, scores)

    def rank(
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
    ) -> list[Ranked]:
        """Score answers to one prompt and return them best first; equal rewards keep the order given.

        `tools`, `documents`, `chat_template_kwargs` and `instruction` are those of `score`.
        """
        responses = responses if isinstance(responses, str) else list(responses)  # a bare string is refused as a row
        row = _given(
            prompt=prompt, messages=messages, responses=responses,
            tools=tools, documents=documents, chat_template_kwargs=chat_template_kwargs, instruction=instruction,
        )  # fmt: skip
        (scored,) = self.score_rows([row], normalize=normalize)
        if isinstance(scored, RewardRTError):
            raise scored
        ranked = [
            Ranked(index, responses[index], answer.reward, answer.tokens, answer.truncated, answer.comparisons)
            for index, answer in enumerate(scored.answers)
        ]
        return sorted(ranked, key=lambda answer: -answer.reward)

    def token_rewards(self, text: EncodedText, *, normalize: bool | None = None) -> npt.NDArray[np.float32]:
        """Return the reward after every token of a text, [tokens] float32, where the graph has them.

        Tokens are those up to the one that the text's own reward is read at.
        Raises RewardRTError where it has not, and InferenceError.
        """
        found = self.answers.normalised(self.runner.token_rewards(text), normalize=normalize)
        if isinstance(found, InferenceError):
            raise found
        return found

    def _score_texts(
        self, items: Iterable[dict[str, Any]], normalize: bool | None, aggregate: AggregateRule | None
    ) -> npt.NDArray[np.float32]:
        if self.spec.input == "steps" and aggregate is None:
            raise RewardRTError(
                "this model gives a reward to every step: name how to make one of them, "
                f"aggregate={' or '.join(map(repr, AGGREGATE_RULES))}, or call score_rows for the rewards of the steps"
            )
        whole = []
        for index, result in enumerate(self.score_rows(items, normalize=normalize, aggregate=aggregate)):
            if isinstance(result, RewardRTError):
                raise type(result)(f"item {index}: {result}") from result
            if not isinstance(result, Scored):
                texts = f"the row holds {len(result.answers)} texts; expected one"
                raise RowError(f"item {index}: {texts} (rank(), score_rows() and `rewardrt score` take several)")
            whole.append(result)
        cut = [(index, result.truncated) for index, result in enumerate(whole) if result.truncated]
        if cut:
            index, tokens = cut[0]
            message = (
                f"{len(cut)} of {len(whole)} texts were cut at {self.spec.max_length} tokens (item {index}: {tokens})"
            )
            warnings.warn(message, TruncationWarning, stacklevel=3)  # the line that called score or score_many
        return np.array([result.reward for result in whole], dtype=np.float32)

    ascore = _in_thread(score)
    ascore_many = _in_thread(score_many)
    ascore_rows = _in_thread(score_rows)
    arank = _in_thread(rank)


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
