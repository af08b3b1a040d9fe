"""The public call: from rows to rewards.

rows -> texts (scoring.answers) -> values (scoring.runner) -> rows with rewards (scoring.answers)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rewardrt.bundle.engines import check_whole, engine_request, warm_choice
from rewardrt.bundle.manifest import Bundle
from rewardrt.bundle.opening import LoadOptions, Opening, check_shareable, choose_variant, open_bundle, with_graphs
from rewardrt.bundle.precisions import range_advice
from rewardrt.bundle.spec import AggregateRule, Spec
from rewardrt.errors import BundleError, InferenceError
from rewardrt.graph.session import GraphSession
from rewardrt.machine.providers import Provider, ProviderChoice, check_onnxruntime, select_provider
from rewardrt.scoring.answers import Answers, Prepared, regroup
from rewardrt.scoring.batching import BATCH_TOKENS
from rewardrt.scoring.prefix import Statistics
from rewardrt.scoring.runner import Runner
from rewardrt.scoring.source import Results, RewardSource
from rewardrt.text.tokens import EncodedText


class RewardModel(RewardSource):
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
            raise BundleError(f"{bundle.name}: the model rewards steps, and its graph has no output token_rewards")
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
        share_weights: bool = False,
    ) -> RewardModel:
        """Load a bundle: a folder, or one of the Hugging Face Hub by its name, `hf://ORG/NAME` or with `@REVISION`.

        From the Hub only what is used is downloaded, to huggingface_hub's cache: the manifest, tokenizer and texts, and
        the graph that is taken here. Such a model is sent to other processes by its commit.

        `provider`      "auto" takes CUDA where it really starts, else the CPU; a named one is obtained or raises
        `precision`     one of the bundle's graphs; "auto" takes int8 on a CPU that is good for it and half on a GPU,
                        where its certificate allows, and else the first that was asked for at export
        `threads`       of the CPU provider; None leaves it to onnxruntime (the physical cores)
        `batch_tokens`  budget of one batch in tokens, padding included; None: 16,384
        `padding`       whether texts of different lengths may share a batch; None: not on a CPU
        `prefix_reuse`  compute once what texts of one call begin with; it shows in no reward but by rounding on a GPU
        `prefix_cache_mb` memory for beginnings of texts that are kept between calls, in MiB; 0: none
        `share_weights` read the weights of an int8 graph in the mapped file, which all processes of the machine share:
                        for many processes of one model. Refused but on a CPU with AVX-512 VNNI
        `check_hashes`  read every file once and compare its SHA-256 with the manifest

        Raises BundleError or ProviderError; of a name on the Hub HubError, or MissingExtraError.
        """
        options = LoadOptions(
            provider,
            precision,
            threads,
            batch_tokens,
            padding,
            prefix_reuse,
            prefix_cache_mb,
            check_hashes,
            share_weights,
        )
        opened = open_bundle(bundle, check_hashes=check_hashes)
        return cls._load(opened, Opening.of(opened, options))

    @classmethod
    def _load(cls, bundle: Bundle, opening: Opening) -> RewardModel:
        selection = select_provider(warm_choice(bundle, opening.options.provider))
        variant = choose_variant(bundle, opening.options.precision, selection.provider)
        check_whole(bundle, variant, selection.provider)
        if opening.options.share_weights:
            check_shareable(bundle, variant, selection.provider)
        if variant.onnxruntime:
            check_onnxruntime(variant.onnxruntime, f"{bundle.name}: the {variant.precision} graph")
        bundle = with_graphs(bundle, [variant])
        opening = replace(opening, options=replace(opening.options, precision=variant.precision))
        graph, engine, threads = bundle.file(variant.graph), engine_request(bundle, variant), opening.options.threads
        session = GraphSession.open(
            graph,
            selection,
            threads,
            share_weights=opening.options.share_weights,
            unchanged=opening.read,
            engine=engine,
        )
        return cls(bundle, session, opening)

    @classmethod
    def _load_again(cls, opening: Opening) -> RewardModel:
        return cls._load(opening.read(), opening)

    def __reduce__(self) -> tuple[Any, ...]:
        """Be pickled and copied as what the model was loaded by."""
        return type(self)._load_again, (self._opening,)

    def __repr__(self) -> str:
        return (
            f"RewardModel({self.bundle.name!r}, family={self.spec.family!r}, precision={self.precision!r}, "
            f"provider={self.provider!r}, max_length={self.spec.max_length})"
        )

    @property
    def session(self) -> GraphSession:
        """The graph that runs."""
        return self.runner.session

    @property
    def input(self) -> str:
        """What the model reads: one text, the steps of one, or two answers."""
        return self.spec.input

    @property
    def provider(self) -> Provider:
        """The execution provider that runs, whatever was asked for."""
        return self.session.provider

    @property
    def statistics(self) -> Statistics:
        """The tokens that were scored since the model was loaded, and how many of them were computed."""
        return self.runner.statistics

    def score_rows(
        self,
        items: Iterable[dict[str, Any]],
        *,
        normalize: bool | None = None,
        aggregate: AggregateRule | None = None,
    ) -> Results:
        """Score rows of any shape; see `RewardSource.score_rows`."""
        return self.score_prepared(self.answers.prepare(items), normalize=normalize, aggregate=aggregate)

    def score_prepared(
        self, prepared: Prepared, *, normalize: bool | None = None, aggregate: AggregateRule | None = None
    ) -> Results:
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

    def token_rewards(self, text: EncodedText, *, normalize: bool | None = None) -> npt.NDArray[np.float32]:
        """Return the reward after every token of a text, [tokens] float32, where the graph has them.

        Tokens are those up to the one that the text's own reward is read at.
        Raises RewardRTError where it has not, and InferenceError.
        """
        found = self.answers.normalised(self.runner.token_rewards(text), normalize=normalize)
        if isinstance(found, InferenceError):
            raise found
        return found
