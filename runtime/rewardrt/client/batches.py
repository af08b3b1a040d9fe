"""Send the rows of all callers together: batches by number, size and time, several requests at once.

One thread runs an event loop, on which a few workers take rows and send them. Callers in different threads and
coroutines share it, so that many calls with one text become few requests.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rewardrt.client.servers import Access, Servers, TooManyError
from rewardrt.client.wire import Options, encode_row
from rewardrt.errors import RewardRTError, RowError, ServerError
from rewardrt.scoring.scored import ScoredRow

BATCH_BYTES = 2 * 2**20  # size of a request's rows; by default a server accepts 8 MiB
Result = ScoredRow | RewardRTError


@dataclass(frozen=True)
class Batching:
    """How rows are put into requests: at most `rows` rows, gathered for `seconds`, `concurrency` requests at once."""

    rows: int = 64
    seconds: float = 0.002
    concurrency: int = 8


@dataclass(eq=False)
class _Job:
    """The rows of one call, and their results."""

    rows: Sequence[Any]
    options: Options
    future: Future[list[Result]]
    next: int = 0  # index of the first row that was not sent yet
    left: int = 0  # number of rows without a result
    results: list[Any] = field(default_factory=list)

    def settle(self, index: int, result: Result) -> None:
        self.results[index] = result
        self.left -= 1
        if self.left == 0:
            with suppress(InvalidStateError):  # the call failed or was cancelled
                self.future.set_result(self.results)

    def fail(self, error: BaseException) -> None:
        self.next = len(self.rows)
        with suppress(InvalidStateError):
            self.future.set_exception(error)


_Taken = tuple[_Job, int, bytes]  # a job, the index of one of its rows, and that row as JSON


class Connection:
    """The thread of a client that sends requests; each process makes one when it first needs it."""

    def __init__(self, access: Access, batching: Batching) -> None:
        """Start the thread."""
        self._batching = batching
        self._access = access
        self._loop = asyncio.new_event_loop()
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="rewardrt-client", daemon=True)
        self._thread.start()
        started.result()

    def submit(self, rows: Sequence[Any], options: Options) -> Future[list[Result]]:
        """Have rows scored; the future's result has their results in order.

        Cancelling it drops rows that were not sent.
        """
        future: Future[list[Result]] = Future()
        if not rows:
            future.set_result([])
            return future
        job = _Job(rows, options, future, left=len(rows), results=[None] * len(rows))
        self._loop.call_soon_threadsafe(self._add, job)
        return future

    def describe(self, model: str | None) -> dict[str, Any]:
        """Return a server's description of the model. Raises ServerError."""
        return asyncio.run_coroutine_threadsafe(self._servers.describe(model), self._loop).result()

    def close(self) -> None:
        """End the thread; waiting calls fail with ServerError."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(10)

    def _run(self, started: Future[None]) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve(started))
        except BaseException as error:
            started.set_exception(error)
        finally:
            self._loop.close()

    async def _serve(self, started: Future[None]) -> None:
        self._stopping, self._waiting = asyncio.Event(), asyncio.Event()
        self._gathering = asyncio.Lock()
        self._jobs: deque[_Job] = deque()
        self._begun: set[_Job] = set()
        self._servers = Servers(self._access)
        workers = [asyncio.create_task(self._work()) for _ in range(self._batching.concurrency)]
        started.set_result(None)
        await self._stopping.wait()
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        for job in (*self._jobs, *self._begun):
            job.fail(ServerError("the client was closed before the answer came"))
        await self._servers.close()

    def _add(self, job: _Job) -> None:
        if self._stopping.is_set():
            job.fail(ServerError("the client was closed"))
            return
        self._jobs.append(job)
        self._begun.add(job)
        self._waiting.set()

    async def _work(self) -> None:
        while True:
            async with self._gathering:
                await self._waiting.wait()
                if sum(len(job.rows) - job.next for job in self._jobs) < self._batching.rows:
                    await asyncio.sleep(self._batching.seconds)
                taken, options = self._take()
            if taken:
                await self._send(taken, options)

    def _take(self) -> tuple[list[_Taken], Options]:
        """Return the rows of the next request: rows of the first job, and of others with the same options.

        A job with rows left goes behind the others, so that a large job does not delay small ones.
        """
        taken: list[_Taken] = []
        options = self._jobs[0].options if self._jobs else Options()
        size, others = 0, []
        while self._jobs and len(taken) < self._batching.rows and size < BATCH_BYTES:
            job = self._jobs.popleft()
            if job.options != options:
                others.append(job)
                continue
            while not job.future.done() and job.next < len(job.rows):
                if len(taken) == self._batching.rows or size >= BATCH_BYTES:
                    others.append(job)
                    break
                index, job.next = job.next, job.next + 1
                try:
                    row = encode_row(job.rows[index])
                except RowError as error:
                    job.settle(index, error)
                    continue
                size += len(row)
                taken.append((job, index, row))
            if job.future.done():
                self._begun.discard(job)
        self._jobs.extend(others)
        if not self._jobs:
            self._waiting.clear()
        return taken, options

    async def _send(self, taken: Sequence[_Taken], options: Options) -> None:
        try:
            results = await self._servers.score([row for _, _, row in taken], options)
        except TooManyError:
            middle = len(taken) // 2
            await self._send(taken[:middle], options)
            await self._send(taken[middle:], options)
            return
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # the callers are waiting, so they get any error, even a bug of ours
            for job, _, _ in taken:
                job.fail(error)
                self._begun.discard(job)
            return
        for (job, index, _), result in zip(taken, results, strict=True):
            job.settle(index, result)
            if job.future.done():
                self._begun.discard(job)
