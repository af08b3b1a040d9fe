"""One thread for each bundle that does all its computing, and the queue before it.

Requests of all connections wait in one queue, bounded in tokens. The engine takes what waits, up to a number of tokens,
scores it together and answers each request as soon as all its texts are scored. A request that is larger than one turn
is scored over several. What a text's reward is does not depend on its turn.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rewardrt.errors import InferenceError, RewardRTError, RowError
from rewardrt.reward_model import RewardModel
from rewardrt.rows import Scored
from rewardrt.server.options import Overflow
from rewardrt.server.problem import Problem
from rewardrt.spec import AggregateRule
from rewardrt.text import Conversation, Item, Pair, RawText, Steps, as_turns
from rewardrt.tokens import EncodedText

TURN_TOKENS = 8192  # what is scored together: more makes larger batches, and longer waits for those who come next
# A text's tokens are counted when its turn comes; until then it is taken for so many characters a token, and some
# more for the template.
CHARACTERS_A_TOKEN = 3
TEMPLATE_TOKENS = 16

TokenReward = tuple[str, float]  # the part of the text that a token ends, and the reward after it


class OverflowRowError(RowError):
    """A text is longer than the limit, and the request did not want it cut."""


@dataclass(frozen=True)
class TokenIds:
    """A text that comes as token ids."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """What a request wants of an engine."""

    items: tuple[Item | TokenIds, ...]
    normalize: bool | None = None
    aggregate: AggregateRule | None = None
    max_length: int | None = None
    overflow: Overflow = "cut"
    every_token: bool = False


@dataclass
class Job:
    """A request's work in the queue, and what became of it; `deliver` is called once, by the engine's thread."""

    work: Work
    costs: list[int]  # estimated tokens of each item
    deliver: Callable[[Job], None]
    submitted: float
    results: list[Scored | RewardRTError] = field(default_factory=list)
    token_rewards: dict[int, list[TokenReward]] = field(default_factory=dict)
    gone: bool = False  # set when nobody waits for it any more: what is not computed yet never is
    taken: int = 0  # items that a turn has taken
    queue_seconds: float | None = None
    compute_seconds: float = 0.0
    failure: str = ""


@dataclass(frozen=True)
class Turn:
    """What one turn of the engine did, for the metrics."""

    texts: int
    tokens: int
    computed: int  # of these tokens; the others were shared
    truncated: int
    seconds: float
    waits: tuple[float, ...]  # seconds that requests which began in this turn had waited


class Engine:
    """The thread, the queue and the health of one loaded bundle. `fault` says why it cannot score, or is None."""

    def __init__(
        self,
        model: RewardModel,
        *,
        max_queue_tokens: int,
        turn_tokens: int = TURN_TOKENS,
        observe: Callable[[Turn], None] = lambda turn: None,
    ) -> None:
        self.model = model
        self.fault: str | None = None
        self.waiting_tokens = 0  # estimated, of accepted requests that are not answered
        self._max_queue_tokens = max_queue_tokens
        self._turn_tokens = turn_tokens
        self._observe = observe
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._rate = 0.0  # estimated tokens a second of the last turns
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, work: Work, deliver: Callable[[Job], None]) -> Job:
        """Put work into the queue, or raise Problem("overloaded") with the seconds after which to try again."""
        limit = min(self.model.spec.max_length, work.max_length or self.model.spec.max_length)
        costs = [min(limit, estimated_tokens(item)) for item in work.items]
        total = sum(costs)
        with self._changed:
            if self._closed:
                raise Problem("draining", "the server is shutting down", retry_after=1)
            if self.waiting_tokens and self.waiting_tokens + total > self._max_queue_tokens:
                seconds = self.waiting_tokens / self._rate if self._rate else 1.0
                raise Problem(
                    "overloaded",
                    f"the queue holds {self.waiting_tokens} of {self._max_queue_tokens} tokens; try again later",
                    retry_after=max(1, min(60, round(seconds))),
                )
            job = Job(work, costs, deliver, time.perf_counter())
            self.waiting_tokens += total
            self._jobs.append(job)
            self._changed.notify()
        return job

    def close(self) -> None:
        """Take nothing more, fail what waits, and end the thread after its turn."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def join(self, timeout: float) -> None:
        """Wait for the thread to end."""
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            while turn := self._take():
                self._score_turn(turn)
        finally:
            self._closed = True
            self.fault = self.fault or "the engine has stopped"
            self._abandon()

    def _abandon(self) -> None:
        with self._changed:
            left = list(self._jobs)
            self._jobs.clear()
        for job in left:
            job.failure = "the server is shutting down"
            self._deliver(job)

    def _take(self) -> list[tuple[Job, int, int]]:
        """Wait for work and return the items of the next turn: jobs, with the range of their items; [] at the end."""
        with self._changed:
            while True:
                while not self._jobs and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return []
                if turn := self._plan():
                    return turn

    def _plan(self) -> list[tuple[Job, int, int]]:
        turn = []
        room = self._turn_tokens
        while self._jobs and room > 0:
            job = self._jobs[0]
            if job.gone:
                self._jobs.popleft()
                self.waiting_tokens -= sum(job.costs)
                continue
            start = job.taken
            while job.taken < len(job.costs) and room > 0:
                room -= job.costs[job.taken]
                job.taken += 1
            turn.append((job, start, job.taken))
            if job.taken == len(job.costs):
                self._jobs.popleft()
        return turn

    def _score_turn(self, turn: Sequence[tuple[Job, int, int]]) -> None:
        started = time.perf_counter()
        before = self.model.statistics.computed
        waits = []
        for job, _, _ in turn:
            if job.queue_seconds is None:
                job.queue_seconds = started - job.submitted
                waits.append(job.queue_seconds)
        try:
            scored = self._score(turn)
        except Exception as error:  # a bug, or out of memory: this turn's requests fail, and the engine goes on
            for job, _, _ in turn:
                job.failure = f"the engine failed ({type(error).__name__})"
            scored = []
            self._probe()
        seconds = time.perf_counter() - started
        if scored and not any(isinstance(result, Scored) for result in scored):
            if any(isinstance(result, InferenceError) for result in scored):
                self._probe()
        elif scored:
            self.fault = None
        good = [result for result in scored if isinstance(result, Scored)]
        cost = sum(sum(job.costs[start:stop]) for job, start, stop in turn)
        self._rate = 0.5 * self._rate + 0.5 * cost / max(seconds, 1e-6)
        self._observe(
            Turn(
                len(scored),
                sum(result.tokens for result in good),
                self.model.statistics.computed - before,
                sum(result.truncated > 0 for result in good),
                seconds,
                tuple(waits),
            )
        )
        for job, _, _ in turn:
            job.compute_seconds += seconds
            if job.failure or job.taken == len(job.costs):
                self._deliver(job)

    def _deliver(self, job: Job) -> None:
        with self._changed:
            if job.failure and self._jobs and self._jobs[0] is job:
                self._jobs.popleft()
            self.waiting_tokens -= sum(job.costs)
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            job.deliver(job)

    def _score(self, turn: Sequence[tuple[Job, int, int]]) -> list[Scored | RewardRTError]:
        """Score the items of a turn in one call, and put each job's results where they belong."""
        encoded: list[EncodedText | RewardRTError] = []
        for job, start, stop in turn:
            encoded += self._encode(job, start, stop)
        good = [text for text in encoded if isinstance(text, EncodedText)]
        values = iter(self.model.score_encoded(good))
        results: list[Scored | RewardRTError] = []
        texts = iter(encoded)
        for job, start, stop in turn:
            for index in range(start, stop):
                text = next(texts)
                result: Scored | RewardRTError
                if isinstance(text, EncodedText):
                    result = self.model.finish(
                        text, next(values), normalize=job.work.normalize, aggregate=job.work.aggregate
                    )
                    if job.work.every_token and isinstance(result, Scored):
                        job.token_rewards[index] = self._token_rewards(job, index, text)
                else:
                    result = text
                job.results.append(result)
                results.append(result)
        return results

    def _encode(self, job: Job, start: int, stop: int) -> list[EncodedText | RewardRTError]:
        work, items = job.work, job.work.items[start:stop]
        found: list[EncodedText | RewardRTError]
        plain = [item for item in items if not isinstance(item, TokenIds)]
        rendered = iter(self.model.encode(plain, max_length=work.max_length)) if plain else iter(())
        found = [self._take_ids(item, work) if isinstance(item, TokenIds) else next(rendered) for item in items]
        if work.overflow == "cut":
            return found
        return [_too_long(text) if isinstance(text, EncodedText) and text.truncated else text for text in found]

    def _take_ids(self, item: TokenIds, work: Work) -> EncodedText | RewardRTError:
        try:
            return self.model.tokenizer.encode_ids(item.ids, max_length=work.max_length)
        except RowError as error:
            return error

    def _token_rewards(self, job: Job, index: int, text: EncodedText) -> list[TokenReward]:
        item = job.work.items[index]
        try:
            rewards = self.model.token_rewards(text, normalize=job.work.normalize)
        except RewardRTError:
            return []
        names = [""] * len(rewards)
        if not isinstance(item, TokenIds):
            rendered = self.model.renderer.render(item)
            if rendered.pair is None and not rendered.pieces:
                shown = self.model.tokenizer.pieces(rendered)[: len(names)]
                names[: len(shown)] = shown
        return [(name, float(str(value))) for name, value in zip(names, rewards, strict=True)]

    def _probe(self) -> None:
        """Find out by a text of our own whether the graph still works."""
        rule, taps = self.model.spec, max(1, len(self.model.spec.taps))
        ids = np.zeros(4, dtype=np.int64)
        type_ids = np.zeros(4, dtype=np.int64) if rule.text.type_ids else None
        try:
            found = self.model.score_encoded([EncodedText(ids, 0, np.full(taps, 3), type_ids)])[0]
        except Exception as error:  # whatever ails the engine
            self.fault = f"the engine failed ({type(error).__name__})"
        else:
            self.fault = str(found) if isinstance(found, InferenceError) else None


def estimated_tokens(item: Item | TokenIds) -> int:
    """Return about how many tokens an item has, without reading it."""
    if isinstance(item, TokenIds):
        return max(1, len(item.ids))
    if isinstance(item, RawText):
        return 1 + len(item.text) // CHARACTERS_A_TOKEN
    if isinstance(item, Pair):
        return estimated_tokens(item.first) + estimated_tokens(item.second)
    if isinstance(item, Steps):
        answer = sum(map(len, item.steps))
    else:
        assert isinstance(item, Conversation)
        answer = len(item.answer["content"])
    size = answer + sum(len(turn["content"]) for turn in as_turns(item.prompt))
    return TEMPLATE_TOKENS + size // CHARACTERS_A_TOKEN


def _too_long(text: EncodedText) -> OverflowRowError:
    whole = len(text.ids) + text.truncated
    return OverflowRowError(f"{whole} tokens are more than the limit of {len(text.ids)}; shorten the text")
