"""The public class `RewardModel`: from rows to rewards.

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

    A model can be pickled and copied: only the bundle's address and the options of `load` are transferred, and the
    bundle is opened again at the destination. In a forked process the bundle is opened again when it first scores
    there.
    """

    def __init__(self, bundle: Bundle, session: GraphSession, opening: Opening) -> None:
        """Combine a bundle and one of its graphs; callers use `load`."""
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
        """Load a bundle: a folder, or `hf://ORG/NAME` or `hf://ORG/NAME@REVISION` on the Hugging Face Hub.

        From the Hub only the files used here are downloaded, to huggingface_hub's cache: the manifest, the tokenizer,
        the golden texts and the chosen graph. When such a model is pickled, its address names the commit.

        `provider`        "auto": CUDA if it really starts, else the CPU; if a named provider does not work, load raises
        `precision`       one of the bundle's graphs; "auto": int8 on a CPU that is good for it, half on a GPU, if its
                          certificate allows; else the first one exported
        `threads`         threads of the CPU provider; None leaves it to onnxruntime (one for each physical core)
        `batch_tokens`    budget of one batch in tokens, including padding; None: 16,384
        `padding`         whether texts of different lengths may share a batch; None: yes, except on a CPU
        `prefix_reuse`    compute a prefix that several texts of one call share only once; this changes no reward on a
                          CPU, and on a GPU only by rounding
        `prefix_cache_mb` memory for prefixes that are kept between calls, in MiB; 0: none
        `share_weights`   let an int8 graph read its weights directly from the mapped file, which all processes of the
                          machine share; only on a CPU with AVX-512 VNNI, refused elsewhere
        `check_hashes`    read every file once and compare its SHA-256 with the manifest

        Raises BundleError or ProviderError; for a bundle on the Hub also HubError or MissingExtraError.
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
        """Pickle and copy the model as the bundle's address and the options that it was loaded with."""
        return type(self)._load_again, (self._opening,)

    def __repr__(self) -> str:
        return (
            f"RewardModel({self.bundle.name!r}, family={self.spec.family!r}, precision={self.precision!r}, "
            f"provider={self.provider!r}, max_length={self.spec.max_length})"
        )

    @property
    def session(self) -> GraphSession:
        """The graph session that computes the rewards."""
        return self.runner.session

    @property
    def input(self) -> str:
        """What the model reads: "single", "steps" or "pairwise"."""
        return self.spec.input

    @property
    def provider(self) -> Provider:
        """The execution provider that really runs, whatever was requested."""
        return self.session.provider

    @property
    def statistics(self) -> Statistics:
        """The number of tokens given since the model was loaded, and how many of them were computed."""
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
        """Score rows that `answers.prepare` has prepared earlier or in another thread; see `score_rows`."""
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
        """Return the reward after every token of a text, [tokens] float32, if the graph has this output.

        The tokens end with the last one at which the text's own reward is read. Raises RewardRTError if the graph was
        exported without this output, and InferenceError if it fails.
        """
        found = self.answers.normalised(self.runner.token_rewards(text), normalize=normalize)
        if isinstance(found, InferenceError):
            raise found
        return found
