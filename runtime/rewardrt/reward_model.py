"""The public call: from rows to rewards.

    row -> items (rows) -> text (text) -> token ids (tokens) -> batches (batching) -> rewards (session)

Order, errors and normalisation are decided here; every step is somebody else's.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rewardrt.bundle.engines import check_whole, engine_request, warm_choice
from rewardrt.bundle.manifest import CHAT_TEMPLATE, TOKENIZER, Bundle, Manifest, Variant, read_bundle
from rewardrt.bundle.spec import AGGREGATE_RULES, Affine, AggregateRule, Spec, to_json
from rewardrt.errors import BundleError, InferenceError, ProviderError, RewardRTError, RowError, TruncationWarning
from rewardrt.graph.session import GraphSession, KeyValues
from rewardrt.machine.processor import read_processor
from rewardrt.machine.providers import Provider, ProviderChoice, select_provider
from rewardrt.scoring.batching import BATCH_TOKENS, make_batch, plan_batches
from rewardrt.scoring.pairwise import plan, settle
from rewardrt.scoring.prefix import (
    Group,
    Link,
    PrefixCache,
    Statistics,
    chunk_ends,
    group_worth,
    plan_chains,
    plan_groups,
)
from rewardrt.text.chat_template import ChatTemplate
from rewardrt.text.rendering import Item, RenderedText, Renderer
from rewardrt.text.rows import Row, Scored, parse_row
from rewardrt.text.tokens import EncodedText, Tokenizer

Values = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Ranked:
    """One answer of a ranking; `index` is its place in the list that was given.

    `comparisons` say how much better it is than each answer in the order given, for models that compare answers.
    """

    index: int
    response: str
    reward: float
    tokens: int
    truncated: int
    comparisons: tuple[float, ...] = ()


@dataclass(frozen=True)
class Opening:
    """How a model was loaded: by which it is loaded again in a process that it was sent to, or that was forked.

    `path` is absolute, `manifest` the digest of what the bundle's manifest says, `precision` the one that was chosen;
    the others are the options of `RewardModel.load`.
    """

    path: str
    manifest: str
    provider: ProviderChoice
    precision: str
    threads: int | None
    batch_tokens: int
    padding: bool | None
    prefix_reuse: bool
    prefix_cache_mb: int
    check_hashes: bool

    def read(self) -> Bundle:
        """Read the bundle again; raises BundleError if it is gone, or is another one now."""
        try:
            bundle = read_bundle(self.path, check_hashes=self.check_hashes)
        except BundleError as error:
            raise BundleError(f"the bundle of a loaded model cannot be opened again: {error}") from error
        if _digest(bundle.manifest) != self.manifest:
            raise BundleError(
                f"{self.path}: holds another bundle than when the model was loaded; load the model from it anew"
            )
        return bundle


class RewardModel:
    """A loaded bundle. Scoring is thread-safe, and a text's reward does not depend on what is scored with it.

    It can be pickled and copied: what is sent is where the bundle lies and the options of `load`, and the bundle is
    opened there. In a process that was forked it is opened again when it first scores.
    """

    def __init__(
        self,
        bundle: Bundle,
        session: GraphSession,
        *,
        precision: str = "fp32",
        batch_tokens: int = BATCH_TOKENS,
        padding: bool | None = None,
        prefix_reuse: bool = True,
        prefix_cache_mb: int = 0,
        opening: Opening | None = None,
    ) -> None:
        if batch_tokens < 1:
            raise RewardRTError(f"batch_tokens {batch_tokens}: expected at least 1")
        if prefix_cache_mb < 0:
            raise RewardRTError(f"prefix_cache_mb {prefix_cache_mb}: expected 0 (nothing is kept) or more")
        self.bundle = bundle
        self.spec: Spec = bundle.manifest.spec
        if self.spec.input == "steps" and not session.has_token_rewards:
            raise BundleError(f"{bundle.path}: the model rewards steps, and its graph has no output token_rewards")
        self.session = session
        self.precision = precision
        self.tokenizer = Tokenizer(bundle.file(TOKENIZER), self.spec)
        template = _read_template(bundle)
        self.renderer = Renderer(self.spec.text, template, with_prompt=self.spec.reads_prompt_end)
        self.uses_date = template is not None and template.uses_date
        self._batch_tokens = batch_tokens
        # On a CPU padding is arithmetic for nothing; an accelerator is fed better by full batches.
        self._padding = session.provider != "cpu" if padding is None else padding
        # A mean is over all tokens, and a first token is read in the first part: such a text is computed whole.
        whole = any(tap.rule in ("first", "mean") for tap in self.spec.taps)
        self._takes_parts = bool(session.past) and not whole
        self._prefix_reuse = prefix_reuse and self._takes_parts
        self._group_worth = group_worth(bundle.weights_bytes(bundle.variant(precision)))
        self._cache = PrefixCache(prefix_cache_mb * 2**20) if self._prefix_reuse and prefix_cache_mb else None
        self._statistics = Statistics()
        self._lock = threading.Lock()
        self._opening = opening or Opening(
            os.path.abspath(bundle.path), _digest(bundle.manifest), session.provider, precision, session.threads,
            batch_tokens, padding, prefix_reuse, prefix_cache_mb, True,
        )  # fmt: skip
        _ALIVE.add(self)

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        *,
        provider: ProviderChoice = "auto",
        precision: str = "auto",
        threads: int | None = None,
        batch_tokens: int = BATCH_TOKENS,
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
        `batch_tokens`  budget of one batch in tokens, padding included
        `padding`       whether texts of different lengths may share a batch; None: not on a CPU
        `prefix_reuse`  compute once what texts of one call begin with; it shows in no reward but by rounding on a GPU
        `prefix_cache_mb` memory for beginnings of texts that are kept between calls, in MiB; 0: none
        `check_hashes`  read every file once and compare its SHA-256 with the manifest

        Raises BundleError or ProviderError.
        """
        opened = read_bundle(bundle, check_hashes=check_hashes)
        return cls._load(
            opened,
            Opening(
                os.path.abspath(bundle), _digest(opened.manifest), provider, precision, threads,
                batch_tokens, padding, prefix_reuse, prefix_cache_mb, check_hashes,
            ),
        )  # fmt: skip

    @classmethod
    def _load(cls, bundle: Bundle, opening: Opening) -> RewardModel:
        selection = select_provider(warm_choice(bundle, opening.provider))
        variant = _choose_variant(bundle, opening.precision, selection.provider)
        check_whole(bundle, variant, selection.provider)
        opening = replace(opening, precision=variant.precision)
        session = GraphSession.open(
            bundle.file(variant.graph),
            selection,
            opening.threads,
            unchanged=opening.read,
            engine=engine_request(bundle, variant),
        )
        return cls(
            bundle,
            session,
            precision=variant.precision,
            batch_tokens=opening.batch_tokens,
            padding=opening.padding,
            prefix_reuse=opening.prefix_reuse,
            prefix_cache_mb=opening.prefix_cache_mb,
            opening=opening,
        )

    @classmethod
    def _load_again(cls, opening: Opening) -> RewardModel:
        return cls._load(opening.read(), opening)

    def __reduce__(self) -> tuple[Any, ...]:
        """Be pickled and copied as what the model was loaded by."""
        return type(self)._load_again, (self._opening,)

    def _forked(self) -> None:
        """Replace what a thread of the other process may have held, or left half done, when this one was forked."""
        self._lock = threading.Lock()
        if self._cache is not None:
            self._cache = PrefixCache(self._opening.prefix_cache_mb * 2**20)

    @property
    def provider(self) -> Provider:
        """The execution provider that runs, whatever was asked for."""
        return self.session.provider

    @property
    def statistics(self) -> Statistics:
        """The tokens that were scored since the model was loaded, and how many of them were computed."""
        return self._statistics

    def score(
        self,
        *,
        prompt: str | list[dict[str, Any]] | None = None,
        response: str | None = None,
        messages: list[dict[str, Any]] | None = None,
        text: str | None = None,
        steps: Sequence[str] | None = None,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        normalize: bool | None = None,
        aggregate: AggregateRule | None = None,
    ) -> float:
        """Return the reward of one text, given as the fields of a row: prompt or messages with response, or text.

        `tools`, `documents` and `chat_template_kwargs` go to the chat template, as in transformers.
        A model that rewards steps takes `steps` for the response, and needs `aggregate` to make one reward of theirs.
        Raises RowError for a combination that is none of these, InferenceError for a reward that is not a number.
        Warns with TruncationWarning when the text was cut.
        """
        fields: dict[str, Any] = {
            "prompt": prompt,
            "response": response,
            "messages": messages,
            "text": text,
            "steps": steps,
        }
        fields |= {"tools": tools, "documents": documents, "chat_template_kwargs": chat_template_kwargs}
        row = {name: value for name, value in fields.items() if value is not None}
        return float(self._score_many([row], normalize, aggregate)[0])

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
        return self._score_many(items, normalize, aggregate)

    def _score_many(
        self, items: Iterable[dict[str, Any]], normalize: bool | None, aggregate: AggregateRule | None
    ) -> npt.NDArray[np.float32]:
        if self.spec.input == "steps" and aggregate is None:
            raise RewardRTError(
                "this model gives a reward to every step: name how to make one of them, "
                f"aggregate={' or '.join(map(repr, AGGREGATE_RULES))}, or call score_rows for the rewards of the steps"
            )
        scored = self.score_rows(items, normalize=normalize, aggregate=aggregate)
        for index, result in enumerate(scored):
            if isinstance(result, RewardRTError):
                raise type(result)(f"item {index}: {result}") from result
        whole = [result for result in scored if isinstance(result, Scored)]
        cut = [(index, result.truncated) for index, result in enumerate(whole) if result.truncated]
        if cut:
            index, tokens = cut[0]
            message = (
                f"{len(cut)} of {len(whole)} texts were cut at {self.spec.max_length} tokens (item {index}: {tokens})"
            )
            warnings.warn(message, TruncationWarning, stacklevel=3)  # the line that called score or score_many
        return np.array([result.reward for result in whole], dtype=np.float32)

    def score_rows(
        self,
        items: Iterable[dict[str, Any]],
        *,
        normalize: bool | None = None,
        aggregate: AggregateRule | None = None,
    ) -> list[Scored | RewardRTError]:
        """Score rows that hold one text each; a row that cannot be scored has its error in its place.

        A model that rewards steps gives `steps`, and the `reward` NaN unless they are aggregated.
        """
        parsed: list[Item | RowError] = [self._single_item(row) for row in items]
        good = [index for index, item in enumerate(parsed) if not isinstance(item, RowError)]
        chosen: Any = [parsed[index] for index in good]
        scored = self.score_items(chosen, normalize=normalize, aggregate=aggregate)
        results: list[Any] = list(parsed)
        for index, result in zip(good, scored, strict=True):
            results[index] = result
        return results

    def rank(
        self,
        *,
        responses: Sequence[str],
        prompt: str | list[dict[str, Any]] | None = None,
        messages: list[dict[str, Any]] | None = None,
        tools: list[dict[str, Any]] | None = None,
        documents: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        normalize: bool | None = None,
    ) -> list[Ranked]:
        """Score answers to one prompt and return them best first; equal rewards keep the order given.

        `tools`, `documents` and `chat_template_kwargs` go to the chat template, as in `score`.
        """
        responses = responses if isinstance(responses, str) else list(responses)  # parse_row refuses a bare string
        fields: dict[str, Any] = {"prompt": prompt, "messages": messages, "responses": responses}
        fields |= {"tools": tools, "documents": documents, "chat_template_kwargs": chat_template_kwargs}
        row = self.parse({name: value for name, value in fields.items() if value is not None})
        scored: list[Scored] = []
        for index, result in enumerate(self.score_items(row.items, normalize=normalize)):
            if isinstance(result, RewardRTError):
                raise type(result)(f"{row.label(index)}{result}") from result
            scored.append(result)
        ranked = [
            Ranked(index, responses[index], answer.reward, answer.tokens, answer.truncated, answer.comparisons)
            for index, answer in enumerate(settle(row, scored))
        ]
        return sorted(ranked, key=lambda answer: -answer.reward)

    def parse(self, row: object) -> Row:
        """Return the texts that this model scores for a row, or raise RowError; see `pairwise` for what follows."""
        return plan(parse_row(row), self.spec)

    def score_items(
        self,
        items: Sequence[Item],
        *,
        normalize: bool | None = None,
        max_length: int | None = None,
        aggregate: AggregateRule | None = None,
    ) -> list[Scored | RewardRTError]:
        """Score parsed items in order; an item that cannot be scored has its error in its place.

        `max_length` lowers the model's limit for this call.
        """
        self.check_options(normalize=normalize, aggregate=aggregate)
        return self.score_texts(self.encode(items, max_length=max_length), normalize=normalize, aggregate=aggregate)

    def score_texts(
        self,
        texts: Sequence[EncodedText | RewardRTError],
        *,
        normalize: bool | None = None,
        aggregate: AggregateRule | None = None,
    ) -> list[Scored | RewardRTError]:
        """Score what `encode` gave, in order; an error stays in its place."""
        self.check_options(normalize=normalize, aggregate=aggregate)
        results: list[Any] = list(texts)
        good = [index for index, text in enumerate(results) if isinstance(text, EncodedText)]
        for index, values in zip(good, self.score_encoded([results[index] for index in good]), strict=True):
            results[index] = self.finish(results[index], values, normalize=normalize, aggregate=aggregate)
        return results

    def check_options(self, *, normalize: bool | None = None, aggregate: AggregateRule | None = None) -> None:
        """Raise RewardRTError for options that this model cannot honour."""
        self._normalisation(normalize)
        if aggregate is not None and self.spec.input != "steps":
            raise RewardRTError(f"aggregate {aggregate!r}: this model gives one reward to a text, there are no steps")
        if aggregate not in (None, *AGGREGATE_RULES):
            raise RewardRTError(f"aggregate {aggregate!r}: expected one of {', '.join(AGGREGATE_RULES)}")

    def finish(
        self,
        text: EncodedText,
        values: Values | InferenceError,
        *,
        normalize: bool | None = None,
        aggregate: AggregateRule | None = None,
    ) -> Scored | InferenceError:
        """Return what `score_items` gives for a text, from what `score_encoded` gave for it."""
        if isinstance(values, InferenceError):
            return values
        affine = self._normalisation(normalize)
        if self.spec.input == "steps":
            return _scored_steps(values, text, affine, aggregate)
        return _scored(values, text, affine)

    def token_rewards(self, text: EncodedText, *, normalize: bool | None = None) -> Values:
        """Return the reward after every token of a text, [tokens] float32, where the graph has them.

        Tokens are those up to the one that the text's own reward is read at.
        Raises RewardRTError where it has not, and InferenceError.
        """
        if not self.session.has_token_rewards:
            raise RewardRTError("this bundle has no rewards of tokens")
        rewards = np.concatenate(self._run_parts(text, None, keep=False, output="token_rewards")[0])[:, 0]
        found = self._check_finite(rewards)
        if not isinstance(found, InferenceError):
            found = _normalised(found, self._normalisation(normalize))
        if isinstance(found, InferenceError):
            raise found
        return found

    def encode(self, items: Sequence[Item], *, max_length: int | None = None) -> list[EncodedText | RewardRTError]:
        """Render and tokenize items; an item that cannot be has its error in its place."""
        results: list[Any] = []
        for item in items:
            try:
                results.append(self.renderer.render(item))
            except RowError as error:
                results.append(error)
        rendered = [index for index, result in enumerate(results) if isinstance(result, RenderedText)]
        encodings = self.tokenizer.encode_many([results[index] for index in rendered], max_length=max_length)
        for index, encoding in zip(rendered, encodings, strict=True):
            results[index] = encoding
        return results

    def score_encoded(
        self, texts: Sequence[EncodedText], *, padding: bool | None = None, batch_tokens: int | None = None
    ) -> list[Values | InferenceError]:
        """Return the graph's outputs for each text, [outputs] float32: the raw reward, then the objectives.

        Of a model that rewards steps they are [steps] float32, the raw reward of each.
        A text for which the graph fails or gives no finite numbers has an InferenceError in its place. `padding` and
        `batch_tokens` override the model's own.
        """
        results: dict[int, Values | InferenceError] = {}
        padding = self._padding if padding is None else padding
        batch_tokens = batch_tokens or self._batch_tokens
        chains = [] if padding or not self._takes_parts else self._plan_chains(texts)
        one_by_one = {link.index for chain in chains for link in chain}
        if padding and self._prefix_reuse and self.session.shares_past:
            for group in plan_groups(texts, self._group_worth):
                results |= self._run_group(texts, group, batch_tokens)
        rest = [index for index in range(len(texts)) if index not in one_by_one and index not in results]
        batches = plan_batches(
            [texts[index].needed if self.spec.causal else len(texts[index].ids) for index in rest],
            batch_tokens=batch_tokens,
            padding=padding,
        )
        batches = [[rest[place] for place in batch] for batch in batches]
        while batches:
            chosen = batches.pop(0)
            try:
                rewards = self._run([texts[index] for index in chosen])
            except InferenceError as error:
                if len(chosen) > 1:  # one bad text must not take the others with it
                    batches[:0] = [[index] for index in chosen]
                else:
                    results[chosen[0]] = error
                continue
            for index, values in zip(chosen, rewards, strict=True):
                results[index] = self._check_finite(values)
        for chain in chains:
            results |= self._run_chain(texts, chain)
        return [results[index] for index in range(len(texts))]

    def _plan_chains(self, texts: Sequence[EncodedText]) -> list[list[Link]]:
        """Return the texts that go through the graph one by one: those that share, and those of several parts."""
        chains = plan_chains(texts) if self._prefix_reuse else [[Link(index, 0)] for index in range(len(texts))]
        return [
            chain
            for chain in chains
            if len(chain) > 1 or self._cache is not None or len(chunk_ends(0, texts[chain[0].index])) > 1
        ]

    def _run_group(
        self, texts: Sequence[EncodedText], group: Group, batch_tokens: int
    ) -> dict[int, Values | InferenceError]:
        """Compute what texts begin with, and then the rest of them in padded batches; what fails is left out."""
        results: dict[int, Values | InferenceError] = {}
        first = texts[group.indices[0]]
        positions = np.zeros_like(first.positions)[None] if self.spec.has_positions else None
        # The rows hold keys and values of the beginning, too, so it counts for each of them.
        batches = plan_batches(
            [texts[index].needed for index in group.indices], batch_tokens=batch_tokens, padding=True
        )
        with suppress(InferenceError):  # of memory, for one: they are tried whole, and each by itself at last
            past = self.session.run_part(first.ids[None, : group.cut], positions, keep=True).values
            self._count(0, group.cut)
            for batch in batches:
                chosen = [group.indices[place] for place in batch]
                rewards = self._run([texts[index] for index in chosen], past)
                results |= {index: self._check_finite(values) for index, values in zip(chosen, rewards, strict=True)}
        return results

    def _run_chain(self, texts: Sequence[EncodedText], chain: Sequence[Link]) -> dict[int, Values | InferenceError]:
        results: dict[int, Values | InferenceError] = {}
        held: KeyValues | None = None
        for link, following in zip(chain, [*(link.cut for link in chain[1:]), 0], strict=True):
            text = texts[link.index]
            if link.cut:
                past = held.first(link.cut) if held is not None else None
            else:
                past = self._cache.find(text) if self._cache is not None else None
            keep = following > (past.tokens if past is not None else 0) or (self._cache is not None and not link.cut)
            try:
                values, present = self._run_new(text, past, keep)
                results[link.index] = self._check_finite(values)
            except InferenceError as error:
                results[link.index], present = error, None
            held = present if keep else past
            if self._cache is not None and not link.cut and present is not None:
                self._cache.keep(text.ids[: text.needed], present)
        return results

    def _run_new(self, text: EncodedText, past: KeyValues | None, keep: bool) -> tuple[Values, KeyValues | None]:
        """Compute what is new of one text, and count it; with `keep`, give its keys and values."""
        first = past.tokens if past is not None else 0
        steps = self.spec.input == "steps"
        found, present = self._run_parts(text, past, keep=keep, output="token_rewards" if steps else "rewards")
        self._count(text.needed, text.needed - first)
        values = np.concatenate(found)[text.positions - first, 0] if steps else found[-1]
        return values, present

    def _run_parts(
        self, text: EncodedText, past: KeyValues | None, *, keep: bool, output: Literal["rewards", "token_rewards"]
    ) -> tuple[list[Values], KeyValues | None]:
        """Return an output of every part of what is new of one text; with `keep`, the text's keys and values, too."""
        start = past.tokens if past is not None else 0
        found: list[Values] = []
        # A graph without a past computes a text whole.
        for end in chunk_ends(start, text) if self.session.past else (text.needed,):
            last = end == text.needed
            positions = None
            if self.spec.has_positions:
                positions = (text.positions - start if last else np.zeros_like(text.positions))[None]
            part = self.session.run_part(
                text.ids[None, start:end],
                positions,
                past=past,
                keep=keep or not last,
                output=output,
            )
            past, start = part.values, end
            found.append(part.rewards[0])
        return found, past

    def _count(self, given: int, computed: int) -> None:
        with self._lock:
            self._statistics = Statistics(self._statistics.given + given, self._statistics.computed + computed)

    def _run(self, texts: Sequence[EncodedText], past: KeyValues | None = None) -> Sequence[Values]:
        """Compute a batch; where a past is given, of tokens that all of them begin with, what follows it."""
        start = past.tokens if past is not None else 0
        batch = make_batch(texts, causal=self.spec.causal, with_positions=self.spec.has_positions, start=start)
        computed = int(batch.lengths.sum())
        self._count(computed + start * len(texts), computed)
        if self.spec.input != "steps":
            return list(self.session.run(batch.input_ids, batch.lengths, batch.positions, batch.type_ids, past=past))
        every = self.session.run(batch.input_ids, batch.lengths, past=past, output="token_rewards")
        return [rewards[text.positions - start, 0] for rewards, text in zip(every, texts, strict=True)]

    def _check_finite(self, values: Values) -> Values | InferenceError:
        if np.isfinite(values).all():
            return values
        small = self.precision in ("half", "tensorrt")
        advice = f"; {self.precision} has no numbers over 65504: score with fp32" if small else ""
        return InferenceError(f"the reward is {values.tolist()}; expected finite numbers{advice}")

    def _single_item(self, row: dict[str, Any]) -> Item | RowError:
        try:
            items = self.parse(row).items
        except RowError as error:
            return error
        if len(items) != 1:
            return RowError(
                f"the row holds {len(items)} texts; expected one (rank() and `rewardrt score` take several)"
            )
        return items[0]

    def _normalisation(self, normalize: bool | None) -> Affine | None:
        """Return the normalisation to apply: the caller's choice, else the bundle's."""
        if not (self.spec.normalise_by_default if normalize is None else normalize):
            return None
        if self.spec.normalise is None:
            raise RewardRTError("normalize: the checkpoint had no mean and std; only raw rewards are there")
        return self.spec.normalise


_ALIVE: weakref.WeakSet[RewardModel] = weakref.WeakSet()


def _forked() -> None:
    models = list(_ALIVE)
    for model in models:
        model._forked()
    # The threads that tokenize are gone. tokenizers then goes without them, unless this says otherwise: it would wait.
    if models and os.environ.get("TOKENIZERS_PARALLELISM"):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_forked)


def _digest(manifest: Manifest) -> str:
    """Return the SHA-256 of what a manifest says; it names the SHA-256 of every file."""
    return hashlib.sha256(json.dumps(to_json(manifest), sort_keys=True).encode()).hexdigest()


def _choose_variant(bundle: Bundle, precision: str, provider: Provider) -> Variant:
    """Return the graph to load on a provider; one that was made for some processors is for no other."""
    variant = bundle.variant(precision, provider)
    if not variant.runs_on("cpu", read_processor().instruction_sets or ()):
        raise BundleError(
            f"{bundle.path}: the {variant.precision} graph needs a CPU with {' or '.join(variant.needs)}; "
            "score with another precision"
        )
    if variant.needs and provider != "cpu":
        raise ProviderError(f"{bundle.path}: the {variant.precision} graph is for CPUs; score with the provider 'cpu'")
    return variant


def _scored(values: Values, text: EncodedText, affine: Affine | None) -> Scored | InferenceError:
    rewards = _normalised(values[:1], affine)
    if isinstance(rewards, InferenceError):
        return rewards
    return Scored(float(rewards[0]), len(text.ids), text.truncated, tuple(values[1:].tolist()))


def _scored_steps(
    values: Values, text: EncodedText, affine: Affine | None, rule: AggregateRule | None
) -> Scored | InferenceError:
    steps = _normalised(values, affine)
    if isinstance(steps, InferenceError):
        return steps
    reward = float("nan") if rule is None else _AGGREGATES[rule](steps.astype(np.float64))
    return Scored(float(np.float32(reward)), len(text.ids), text.truncated, steps=tuple(steps.tolist()))


_AGGREGATES: dict[AggregateRule, Callable[[npt.NDArray[np.float64]], float]] = {
    "min": lambda steps: float(steps.min()),
    "product": lambda steps: float(steps.prod()),
    "last": lambda steps: float(steps[-1]),
    "mean": lambda steps: float(steps.mean()),
}


def _normalised(values: Values, affine: Affine | None) -> Values | InferenceError:
    if affine is None:
        return values
    normalised = ((values.astype(np.float64) - affine.mean) / (affine.std + affine.eps)).astype(np.float32)
    if not np.isfinite(normalised).all():
        return InferenceError(f"the normalised reward is {normalised.tolist()}; expected finite numbers")
    return normalised


def _read_template(bundle: Bundle) -> ChatTemplate | None:
    if bundle.manifest.spec.text.source != "chat_template":
        return None
    path = bundle.file(CHAT_TEMPLATE)
    try:
        source = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{path}: expected UTF-8 ({error.reason}); mend the template and export again") from error
    return ChatTemplate(source, bundle.manifest.spec.special_tokens)
