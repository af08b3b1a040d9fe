"""The engine: one thread for each bundle that does all its computing, and the queue in front of it.

Requests of all connections wait in one queue; `turns` says which is next. In each turn the engine takes waiting texts
up to a number of tokens, scores them together, and answers every request whose texts are all scored. A request larger
than one turn takes several. A text's reward does not depend on its turn.

Long texts are tokenized by a second thread before they join the queue, so that they do not delay others. A failure only
affects the text that causes it: a failed batch is split until that text is alone.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rewardrt.errors import InferenceError, RewardRTError, RowError
from rewardrt.reward_model import RewardModel
from rewardrt.scoring.answers import Values
from rewardrt.scoring.scored import Scored, shortest
from rewardrt.server.isolation import apart, place
from rewardrt.server.problem import Problem
from rewardrt.server.turns import SLICE_TOKENS, Job, Slice, TokenReward, Turns, Work
from rewardrt.text.items import Input
from rewardrt.text.tokens import EncodedText

TURN_TOKENS = 8192  # tokens scored together: more makes larger batches, but longer waits for the next requests
RESTARTS = 3  # restarts of an engine's threads within RESTART_SECONDS; at the next failure the engine is dead
RESTART_SECONDS = 60.0


class OverflowRowError(RowError):
    """A text is longer than the limit, and the request asked not to cut it."""


@dataclass(frozen=True)
class Turn:
    """The counts of one turn of the engine, for the metrics. `texts` and `tokens` count texts that got a reward."""

    texts: int
    failed: int  # texts that got no reward
    tokens: int
    computed: int  # tokens that were computed; the others came from shared prefixes
    truncated: int
    seconds: float
    waits: tuple[float, ...]  # queueing times in seconds of the requests that began in this turn


class Engine:
    """The threads, the queue and the health of one loaded bundle. `fault` says why it cannot score, or is None.

    A thread that dies is restarted. An engine whose threads died too often is `dead` and accepts no more work.
    """

    def __init__(
        self,
        model: RewardModel,
        *,
        max_queue_tokens: int,
        turn_tokens: int = TURN_TOKENS,
        slice_tokens: int = SLICE_TOKENS,
        observe: Callable[[Turn], None] = lambda turn: None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.model = model
        self.fault: str | None = None
        self.dead = False
        self.waiting_tokens = 0  # estimated tokens of accepted, unanswered requests
        self._max_queue_tokens = max_queue_tokens
        self._turn_tokens = turn_tokens
        self._slice_tokens = slice_tokens
        self._observe = observe
        self._report = report
        self._turns = Turns(slice_tokens)
        self._long = Turns()  # jobs with long texts to tokenize first, one text of each client at a time
        self._open: set[Job] = set()
        self._at: dict[str, list[Job]] = {}  # the jobs that each thread is working on
        self._changed = threading.Condition()
        self._closed = False
        self._deaths: list[float] = []
        self._rate = 0.0  # moving average of estimated tokens per second
        self._threads: dict[str, threading.Thread] = {}
        self._start("engine", self._score_turns)

    def submit(self, work: Work, deliver: Callable[[Job], None], *, client: str = "", patience: float = 0.0) -> Job:
        """Put work into the queue; return its job.

        If the queue is full: with `patience` (seconds) the job is queued, and the caller may `withdraw` it after that
        time if it has not begun. Without patience, raises Problem("overloaded"), which says after how many seconds to
        retry.
        """
        limit = min(self.model.spec.max_length, work.max_length or self.model.spec.max_length)
        costs = [min(limit, tokens) for tokens in work.tokens]
        job = Job(work, costs, deliver, time.perf_counter(), client)
        job.booked = job.left = sum(costs)
        job.long = list(reversed(work.long))
        with self._changed:
            if self._closed:
                raise Problem("draining", "the server is shutting down", retry_after=1)
            if self._is_full(job.booked):
                job.may_be_refused = True
                if patience <= 0:
                    raise self._overloaded()
            self.waiting_tokens += job.booked
            self._open.add(job)
            (self._long if job.long else self._turns).add(job)
            if job.long and "long texts" not in self._threads:
                self._start("long texts", self._encode_long_texts)
            self._changed.notify_all()
        return job

    def withdraw(self, job: Job) -> Problem | None:
        """Take back a job that arrived when the queue was full and has not begun; return None if it goes on."""
        with self._changed:
            if job.taken or job.delivered or not job.may_be_refused:
                return None
            job.gone = True
            self._forget(job)
            return self._overloaded()

    def close(self) -> None:
        """Accept no more work, fail all waiting jobs, and end the threads after their current work."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def join(self, timeout: float) -> None:
        """Wait for the threads to end."""
        end = time.monotonic() + timeout
        for thread in list(self._threads.values()):
            thread.join(max(0.0, end - time.monotonic()))

    def _is_full(self, cost: int) -> bool:
        """Whether a request of this cost would have too many tokens in front of it in the queue.

        Of larger requests only a slice comes before it, as `turns` shares the engine. A request larger than the whole
        queue is accepted if half of the queue is free; otherwise it never would be.
        """
        if not self.waiting_tokens or self.waiting_tokens + cost <= self._max_queue_tokens:
            return False
        size = max(cost, self._slice_tokens)
        before = sum(min(job.left, size) for job in self._open if not job.gone)
        return before > 0 and before + min(cost, self._max_queue_tokens // 2) > self._max_queue_tokens

    def _overloaded(self) -> Problem:
        seconds = self.waiting_tokens / self._rate if self._rate else 1.0
        return Problem(
            "overloaded",
            f"the queue holds {self.waiting_tokens} of {self._max_queue_tokens} tokens; try again later",
            retry_after=max(1, min(60, round(seconds))),
        )

    def _start(self, name: str, work: Callable[[], None]) -> None:
        """Start a thread, or restart it."""
        self._threads[name] = threading.Thread(
            target=self._keep, args=(name, work), name=f"rewardrt-{name}", daemon=True
        )
        self._threads[name].start()

    def _keep(self, name: str, work: Callable[[], None]) -> None:
        """Run a thread's work until the engine is closed; if the thread dies, handle that."""
        try:
            work()
        except BaseException as error:  # a bug of ours, or the interpreter is shutting down
            self._died(name, work, f"{type(error).__name__} at {place(error)}")
        else:
            if name == "engine":
                self._abandon("the server is shutting down")

    def _died(self, name: str, work: Callable[[], None], reason: str) -> None:
        now = time.monotonic()
        self._deaths = [*(then for then in self._deaths if now - then < RESTART_SECONDS), now]
        for job in self._at.pop(name, []):
            job.failure = f"the engine failed ({reason})"
            self._deliver(job)
        if len(self._deaths) <= RESTARTS and not self._closed:
            self._report(f"error: a thread of the engine died ({reason}); it is started again")
            with contextlib.suppress(RuntimeError):  # raised if no thread can be started
                self._start(name, work)
                return
        self.dead = True
        self.fault = f"the engine has stopped ({reason})"
        self._abandon(self.fault)

    def _abandon(self, reason: str) -> None:
        with self._changed:
            self._closed = True
            self.fault = self.fault or "the engine has stopped"
            left = list(self._open)
            self._turns.clear()
            self._long.clear()
            self._changed.notify_all()
        for job in left:
            job.failure = reason
            self._deliver(job)

    def _score_turns(self) -> None:
        while slices := self._take():
            self._score_turn(slices)

    def _take(self) -> list[Slice]:
        """Wait for work and return the slices of the next turn; [] when the engine is closed."""
        while True:
            with self._changed:
                while not self._turns and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return []
                slices, dropped = self._turns.plan(self._turn_tokens)
                self._at["engine"] = [each.job for each in slices]
                for job in dropped:
                    self._forget(job)
            if slices:
                return slices

    def _forget(self, job: Job) -> None:
        self._open.discard(job)
        self.waiting_tokens -= job.booked
        job.booked = 0

    def _score_turn(self, slices: Sequence[Slice]) -> None:
        started = time.perf_counter()
        before = self.model.statistics.computed
        waits = []
        for each in slices:
            if each.job.queue_seconds is None:
                each.job.queue_seconds = started - each.job.submitted
                waits.append(each.job.queue_seconds)
        cost = sum(sum(each.job.costs[each.start : each.stop]) for each in slices)
        scored = self._score(slices)
        seconds = time.perf_counter() - started
        good = [result for result in scored if isinstance(result, Scored)]
        if good:
            self.fault = None
        elif any(isinstance(result, InferenceError) for result in scored):
            self._probe()
        self._rate = 0.5 * self._rate + 0.5 * cost / max(seconds, 1e-6)
        turn = Turn(
            len(good),
            len(scored) - len(good),
            sum(result.tokens for result in good),
            self.model.statistics.computed - before,
            sum(result.truncated > 0 for result in good),
            seconds,
            tuple(waits),
        )
        with contextlib.suppress(Exception):  # a failure in the metrics must not stop scoring
            self._observe(turn)
        for each in slices:
            each.job.compute_seconds += seconds
            if each.job.taken == len(each.job.costs):
                self._deliver(each.job)

    def _deliver(self, job: Job) -> None:
        with self._changed:
            if job.delivered:
                return
            job.delivered = job.gone = True  # the rest of a failed job gets no further turn
            self._forget(job)
        with contextlib.suppress(Exception):  # the event loop may have ended
            job.deliver(job)

    def _score(self, slices: Sequence[Slice]) -> list[Scored | RewardRTError]:
        """Score the items of a turn in one call, and add the results to their jobs."""
        encoded: list[EncodedText | RewardRTError] = []
        for each in slices:
            encoded += self._encode(each.job, range(each.start, each.stop))
        good = [text for text in encoded if isinstance(text, EncodedText)]
        values = iter(apart(self.model.runner.run, good, _failed))
        results: list[Scored | RewardRTError] = []
        texts = iter(encoded)
        for each in slices:
            for index in range(each.start, each.stop):
                text = next(texts)
                result = self._finish(each.job, index, text, next(values)) if isinstance(text, EncodedText) else text
                each.job.results.append(result)
                results.append(result)
        return results

    def _finish(
        self, job: Job, index: int, text: EncodedText, values: Values | InferenceError
    ) -> Scored | RewardRTError:
        def finish(_: Sequence[int]) -> list[Scored | RewardRTError]:
            result = self.model.answers.finish(text, values, normalize=job.work.normalize, aggregate=job.work.aggregate)
            if job.work.every_token and isinstance(result, Scored):
                job.token_rewards[index] = self._token_rewards(job, index, text)
            return [result]

        return apart(finish, [index], _failed)[0]

    def _encode(self, job: Job, indices: Sequence[int]) -> list[EncodedText | RewardRTError]:
        """Return each item's token ids or its error, using those that were made in advance."""
        found = {index: job.encoded.pop(index) for index in indices if index in job.encoded}
        plain: list[tuple[int, Input]] = []
        for index in indices:
            item = job.work.items[index]
            if isinstance(item, RowError):
                found[index] = item
            elif index not in found:
                plain.append((index, item))

        def encode(some: Sequence[tuple[int, Input]]) -> list[EncodedText | RewardRTError]:
            return self.model.answers.encode([item for _, item in some], max_length=job.work.max_length)

        made = apart(encode, plain, _failed) if plain else []
        found |= {index: text for (index, _), text in zip(plain, made, strict=True)}
        return [self._fitting(found[index], job.work) for index in indices]

    @staticmethod
    def _fitting(text: EncodedText | RewardRTError, work: Work) -> EncodedText | RewardRTError:
        if work.overflow == "cut" or isinstance(text, RewardRTError) or not text.truncated:
            return text
        whole = len(text.ids) + text.truncated
        return OverflowRowError(f"{whole} tokens are more than the limit of {len(text.ids)}; shorten the text")

    def _encode_long_texts(self) -> None:
        """Tokenize long texts one at a time; a job joins the queue when all its long texts are done."""
        while True:
            with self._changed:
                while not self._long and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                self._at["long texts"] = []
                job = self._long.first()
                if job is None or job.gone:
                    if job is not None:
                        self._forget(job)
                    continue
                self._at["long texts"] = [job]
            index = job.long.pop()
            text = self._encode(job, [index])[0]
            cost = len(text.ids) if isinstance(text, EncodedText) else 1
            with self._changed:
                job.encoded[index] = text
                job.left += cost - job.costs[index]
                job.costs[index] = cost
                (self._long if job.long else self._turns).add(job)
                self._changed.notify_all()

    def _token_rewards(self, job: Job, index: int, text: EncodedText) -> list[TokenReward]:
        item = job.work.items[index]
        found = self.model.runner.token_rewards(text)
        rewards = self.model.answers.normalised(found, normalize=job.work.normalize)
        if isinstance(rewards, InferenceError):
            return []
        pieces = [] if isinstance(item, RowError) else self.model.answers.pieces(item)[: len(rewards)]
        pieces += [""] * (len(rewards) - len(pieces))
        return [(piece, shortest(value)) for piece, value in zip(pieces, rewards, strict=True)]

    def _probe(self) -> None:
        """Run a test text to find out whether the graph still works."""
        try:
            found = self.model.runner.probe()
        except Exception as error:  # any failure makes the engine unhealthy
            self.fault = f"the engine failed ({type(error).__name__})"
        else:
            self.fault = None if found is None else str(found)


def _failed(error: BaseException) -> InferenceError:
    return InferenceError(f"the engine failed at this text ({type(error).__name__} at {place(error)})")
