"""From token ids to the graph's values: plan what is shared and batched, run it, and isolate texts that fail.

    texts -> groups and chains (prefix) -> batches (batching) -> values (graph.session)

This module knows the graph and batches; it knows nothing of rows, words or bundles.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate, islice, takewhile
from typing import Literal

import numpy as np
import numpy.typing as npt

from rewardrt.bundle.spec import Spec
from rewardrt.errors import InferenceError, RewardRTError
from rewardrt.forks import after_fork
from rewardrt.graph.session import GraphSession, KeyValues
from rewardrt.scoring.batching import BATCH_TOKENS, make_batch, plan_batches
from rewardrt.scoring.prefix import (
    BLOCK,
    MAX_STATES,
    Group,
    Link,
    PrefixCache,
    Statistics,
    chunk_ends,
    group_worth,
    least_shared,
    plan_chains,
    plan_groups,
    state_stops,
)
from rewardrt.text.tokens import EncodedText

Values = npt.NDArray[np.float32]
Output = Literal["rewards", "token_rewards"]


class Runner:
    """Runs encoded texts through one graph. Thread-safe; a text's values do not depend on what is run with it."""

    def __init__(
        self,
        session: GraphSession,
        spec: Spec,
        *,
        weights_bytes: int,
        batch_tokens: int = BATCH_TOKENS,
        padding: bool | None = None,
        prefix_reuse: bool = True,
        prefix_cache_mb: int = 0,
        advice: str = "",
    ) -> None:
        """Take a graph and the options of `RewardModel.load` that say how it is fed.

        `weights_bytes` is the size of the graph's weights in bytes. `advice` is appended to the error about values that
        are not finite. Raises RewardRTError for options out of their range.
        """
        if batch_tokens < 1:
            raise RewardRTError(f"batch_tokens {batch_tokens}: expected at least 1")
        if prefix_cache_mb < 0:
            raise RewardRTError(f"prefix_cache_mb {prefix_cache_mb}: expected 0 (nothing is kept) or more")
        self.session = session
        self._spec = spec
        self._batch_tokens = batch_tokens
        self._advice = advice
        # On a CPU padding is wasted work; an accelerator is faster with full batches.
        self._padding = session.provider != "cpu" if padding is None else padding
        # A mean needs the states of all tokens, and "first" that of token 0, so such texts are computed in one call.
        whole = any(tap.rule in ("first", "mean") for tap in spec.taps)
        self._takes_parts = bool(session.past) and not whole
        self._prefix_reuse = prefix_reuse and self._takes_parts
        self._group_worth = group_worth(weights_bytes)
        self._cache_bytes = prefix_cache_mb * 2**20 if self._prefix_reuse else 0
        self._least = least_shared(max((item.shape[-1] for item in session.past if "key" in item.name), default=0))
        self._with_states = any(item.is_state for item in session.past)
        self._cache = self._empty_cache()
        self._statistics = Statistics()
        self._lock = threading.Lock()
        _ALIVE.add(self)

    @property
    def statistics(self) -> Statistics:
        """The number of tokens given since the graph was loaded, and how many of them were computed."""
        return self._statistics

    def run(
        self, texts: Sequence[EncodedText], *, padding: bool | None = None, batch_tokens: int | None = None
    ) -> list[Values | InferenceError]:
        """Return the graph's outputs for each text, [outputs] float32: the raw reward, then the objectives.

        For a model that rewards steps the result is [steps] float32, the raw reward of each step. A text for which the
        graph fails or gives values that are not finite has an InferenceError in its place. `padding` and `batch_tokens`
        override the runner's own.
        """
        results: dict[int, Values | InferenceError] = {}
        padding = (self._padding if padding is None else padding) and self._spec.padded
        batch_tokens = batch_tokens or self._batch_tokens
        chains = [] if padding or not self._takes_parts else self._plan_chains(texts)
        one_by_one = {link.index for chain in chains for link in chain}
        if padding and self._prefix_reuse and self.session.shares_past:
            for group in plan_groups(texts, self._group_worth, self._least):
                results |= self._run_group(texts, group, batch_tokens)
        rest = [index for index in range(len(texts)) if index not in one_by_one and index not in results]
        results |= self._run_batches(texts, rest, padding=padding, batch_tokens=batch_tokens)
        for chain in chains:
            results |= self._run_chain(texts, chain)
        return [results[index] for index in range(len(texts))]

    def token_rewards(self, text: EncodedText) -> Values | InferenceError:
        """Return the raw reward after every token of a text, [tokens] float32, if the graph has this output.

        The tokens end with the last one at which the text's own reward is read. Raises RewardRTError if the graph was
        exported without this output; returns an InferenceError if the graph fails.
        """
        if not self.session.has_token_rewards:
            raise RewardRTError("this bundle has no rewards of tokens; export it with --token-rewards")
        try:
            parts, _ = self._run_parts(text, None, keep=False, output="token_rewards")
        except InferenceError as error:
            return error
        return self._check_finite(np.concatenate(parts)[:, 0])

    def probe(self) -> InferenceError | None:
        """Run a text of four tokens as a test; return the error if the graph fails, else None."""
        ids, taps = np.zeros(4, dtype=np.int64), max(1, len(self._spec.taps))
        type_ids = np.zeros(4, dtype=np.int64) if self._spec.text.type_ids else None
        found = self.run([EncodedText(ids, 0, np.full(taps, 3), type_ids)])[0]
        return found if isinstance(found, InferenceError) else None

    def _run_batches(
        self, texts: Sequence[EncodedText], indices: Sequence[int], *, padding: bool, batch_tokens: int
    ) -> dict[int, Values | InferenceError]:
        """Run texts in batches; if a batch fails, run each of its texts alone."""
        results: dict[int, Values | InferenceError] = {}
        lengths = [texts[index].needed if self._spec.causal else len(texts[index].ids) for index in indices]
        planned = plan_batches(lengths, batch_tokens=batch_tokens, padding=padding)
        batches = [[indices[place] for place in batch] for batch in planned]
        while batches:
            chosen = batches.pop(0)
            try:
                rewards = self._run([texts[index] for index in chosen])
            except InferenceError as error:
                if len(chosen) > 1:  # one bad text must not fail the others
                    batches[:0] = [[index] for index in chosen]
                else:
                    results[chosen[0]] = error
                continue
            for index, values in zip(chosen, rewards, strict=True):
                results[index] = self._check_finite(values)
        return results

    def _plan_chains(self, texts: Sequence[EncodedText]) -> list[list[Link]]:
        """Return chains of the texts to run one by one: those that share a prefix or are computed in several parts."""
        chains = (
            plan_chains(texts, self._least) if self._prefix_reuse else [[Link(index, 0)] for index in range(len(texts))]
        )
        return [
            chain
            for chain in chains
            if len(chain) > 1 or self._cache is not None or len(chunk_ends(0, texts[chain[0].index])) > 1
        ]

    def _run_group(
        self, texts: Sequence[EncodedText], group: Group, batch_tokens: int
    ) -> dict[int, Values | InferenceError]:
        """Compute a group's common prefix, then the rest of its texts in padded batches.

        Texts that fail are missing in the result.
        """
        results: dict[int, Values | InferenceError] = {}
        first = texts[group.indices[0]]
        positions = np.zeros_like(first.positions)[None] if self._spec.has_positions else None
        # Each row also has keys and values of the prefix, so the prefix counts towards each row's length.
        batches = plan_batches(
            [texts[index].needed for index in group.indices], batch_tokens=batch_tokens, padding=True
        )
        with suppress(InferenceError):  # such as out of memory: the texts are then run without the shared prefix
            past = self.session.run_part(first.ids[None, : group.cut], positions, keep=True).values
            self._count(0, group.cut)
            for batch in batches:
                chosen = [group.indices[place] for place in batch]
                rewards = self._run([texts[index] for index in chosen], past)
                results |= {index: self._check_finite(values) for index, values in zip(chosen, rewards, strict=True)}
        return results

    def _run_chain(self, texts: Sequence[EncodedText], chain: Sequence[Link]) -> dict[int, Values | InferenceError]:
        """Run texts one by one, each after the text with which it shares the longest prefix."""
        results: dict[int, Values | InferenceError] = {}
        held: KeyValues | None = None
        cuts = [*(link.cut for link in chain), 0]
        for place, link in enumerate(chain):
            text, following = texts[link.index], cuts[place + 1]
            cached = self._cache if not link.cut else None
            past, known = (held.first(link.cut) if link.cut and held is not None else None), 0
            if cached is not None:
                past, known = cached.find(text)
            start = past.tokens if past is not None else 0
            keep = following > start or cached is not None
            # A later text of the chain shares with this one the minimum of the cuts in between.
            ahead = accumulate(islice(cuts, place + 1, None), min)
            stops = self._stops(text, start, [*takewhile(start.__lt__, ahead), known]) if keep else []
            try:
                values, present = self._run_new(text, past, keep, stops)
                results[link.index] = self._check_finite(values)
            except InferenceError as error:
                results[link.index], present = error, None
            held = present if keep else past
            if cached is not None and present is not None:
                cached.keep(text.ids[: text.needed], present)
        return results

    def _stops(self, text: EncodedText, start: int, wanted: Sequence[int]) -> list[int]:
        """Return the numbers of tokens of a text, computed from `start` on, after which its layers' states are kept."""
        if not self._with_states:
            return []
        # Where a later text will branch off is unknown; the ends of the calls, rounded to blocks, serve some of them.
        ends = chunk_ends(start, text)[:-1] if self._cache is not None else []
        return state_stops(start, text, [*wanted, *(end // BLOCK * BLOCK for end in ends)], self._least)

    def _run_new(
        self, text: EncodedText, past: KeyValues | None, keep: bool, stops: Sequence[int]
    ) -> tuple[Values, KeyValues | None]:
        """Compute and count the tokens of one text after its past; with `keep`, also return its keys and values."""
        first = past.tokens if past is not None else 0
        steps = self._spec.input == "steps"
        output: Output = "token_rewards" if steps else "rewards"
        found, present = self._run_parts(text, past, keep=keep, output=output, stops=stops)
        self._count(text.needed, text.needed - first)
        values = np.concatenate(found)[text.positions - first, 0] if steps else found[-1]
        return values, present

    def _run_parts(
        self,
        text: EncodedText,
        past: KeyValues | None,
        *,
        keep: bool,
        output: Output,
        stops: Sequence[int] = (),
    ) -> tuple[list[Values], KeyValues | None]:
        """Compute the tokens of one text after its past in parts; return each part's output.

        With `keep`, also return the text's keys and values. These include the states after `stops`, and the states that
        came with the past.
        """
        start = past.tokens if past is not None else 0
        states = dict(past.states) if past is not None else {}
        found: list[Values] = []
        # A graph without inputs for a past computes a text in one call.
        for end in chunk_ends(start, text, stops) if self.session.past else (text.needed,):
            last = end == text.needed
            positions = None
            if self._spec.has_positions:
                positions = (text.positions - start if last else np.zeros_like(text.positions))[None]
            part = self.session.run_part(
                text.ids[None, start:end],
                positions,
                past=past,
                keep=keep or not last,
                output=output,
            )
            past, start = part.values, end
            if past is not None and (end in stops or last):
                states |= past.states
            found.append(part.rewards[0])
        if past is not None:
            past = replace(past, states={end: states[end] for end in sorted(states)[-MAX_STATES:]})
        return found, past

    def _run(self, texts: Sequence[EncodedText], past: KeyValues | None = None) -> Sequence[Values]:
        """Compute a batch of texts, or with a `past`, which is the cache of their common prefix, what follows it."""
        start = past.tokens if past is not None else 0
        batch = make_batch(texts, causal=self._spec.causal, with_positions=self._spec.has_positions, start=start)
        computed = int(batch.lengths.sum())
        self._count(computed + start * len(texts), computed)
        if self._spec.input != "steps":
            return list(self.session.run(batch.input_ids, batch.lengths, batch.positions, batch.type_ids, past=past))
        every = self.session.run(batch.input_ids, batch.lengths, past=past, output="token_rewards")
        return [rewards[text.positions - start, 0] for rewards, text in zip(every, texts, strict=True)]

    def _check_finite(self, values: Values) -> Values | InferenceError:
        if np.isfinite(values).all():
            return values
        return InferenceError(f"the reward is {values.tolist()}; expected finite numbers{self._advice}")

    def _count(self, given: int, computed: int) -> None:
        with self._lock:
            self._statistics = Statistics(self._statistics.given + given, self._statistics.computed + computed)

    def forked(self) -> None:
        """In a forked process, replace the lock and the cache, which another thread may have been using at the fork."""
        self._lock = threading.Lock()
        self._cache = self._empty_cache()

    def _empty_cache(self) -> PrefixCache | None:
        if not self._cache_bytes:
            return None
        return PrefixCache(self._cache_bytes, self._least, with_states=self._with_states)


_ALIVE: weakref.WeakSet[Runner] = weakref.WeakSet()


def _forked() -> None:
    for runner in list(_ALIVE):
        runner.forked()


after_fork(_forked)
