"""One scoring request, from its first byte to its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from starlette.types import Receive, Scope

from rewardrt.data.lines import to_line
from rewardrt.errors import RewardRTError
from rewardrt.server import kserve
from rewardrt.server.access import check_media_type, client_of
from rewardrt.server.body import (
    SMALL_BODY,
    ClientGoneError,
    Lease,
    check_counts,
    decode,
    hold,
    is_small,
    read_body,
    unpack,
)
from rewardrt.server.call import Call, Dialect, Incoming, Reply, Scoring
from rewardrt.server.isolation import place
from rewardrt.server.log import Record
from rewardrt.server.models import Uses
from rewardrt.server.options import ServerOptions
from rewardrt.server.problem import Problem
from rewardrt.server.routes import ScoringRoute
from rewardrt.server.schema import check
from rewardrt.server.state import Server
from rewardrt.server.turns import Job, Work
from rewardrt.server.views import JSON, ViewAnswer

FEW_ITEMS = 64  # answers with up to this many items are written on the event loop
LOGGED_BYTES = 16_384  # bytes of a body that are logged with --log-texts


class ScoringRequest:
    """One scoring request, from its first byte to its answer."""

    def __init__(self, server: Server, route: ScoringRoute, scope: Scope, receive: Receive) -> None:
        self.record = Record(scope["method"], path_of(scope), client_address(scope))
        self.dialect = route.scorings[0].dialect
        self.whole = False  # whether the body has been read to its end
        self._server = server
        self._route = route
        self._scope = scope
        self._receive = receive
        self._data = b""
        self._lease = Lease(server.budget, "")
        self._uses: Uses | None = None

    async def answer(self) -> tuple[str, ViewAnswer | None]:
        """Return the kind of problem ("" if none) and the answer, or None if the client has gone."""
        try:
            return "", await self._score()
        except Problem as problem:
            self.record.error = problem.message
            return problem.kind, refusal(self.dialect, problem)
        except ClientGoneError:
            self.record.status = 499
            return "gone", None
        except Exception as error:  # a bug of ours: this request fails, and the log says where
            self.record.error = f"{type(error).__name__} at {place(error)}"
            return "backend", refusal(self.dialect, Problem("backend", f"internal error ({type(error).__name__})"))

    def logged(self) -> str:
        """Return the body for the log if --log-texts is set, else ""."""
        if not self._server.options.log_texts or not self._data:
            return ""
        return f" body={self._data[:LOGGED_BYTES].decode('utf-8', 'backslashreplace')!r}"

    def release(self) -> None:
        """Release everything that the request has reserved."""
        self._lease.release()
        if self.whole:
            self._server.in_flight -= 1
        if self._uses is not None:
            self._uses.count -= 1

    async def _score(self) -> ViewAnswer:
        server, options = self._server, self._server.options
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in self._scope["headers"]}
        server.access.check_names("POST", headers)
        key = server.access.check_key(headers)
        client = client_of(self.record.client, key, len(options.api_keys))
        check_media_type(headers)
        if server.draining:
            raise Problem("draining", "the server is shutting down", retry_after=1)
        self._lease = Lease(server.budget, client)
        data = await read_body(self._receive, headers, options, self._lease)
        self.whole = True
        server.in_flight += 1
        if headers.get("content-encoding", "identity") != "identity":
            data = await self._thread(partial(unpack, data, headers, options.max_body_bytes))
        self._data = data
        self._uses = server.models.uses
        self._uses.count += 1
        small = is_small(data)
        text, binary = kserve.split(data, headers)
        body = await self._run(small, partial(decode, text, options))
        scoring = self._route.choose(body)
        self.dialect = scoring.dialect
        incoming = Incoming(body, server.models, self._scope["path_params"], self._route.path, binary, options)
        call = await self._run(small, partial(_prepare, scoring, incoming))
        self.record.model = call.served.name
        job = await self._work(call, await self._run(small, partial(_work, call, options)), client)
        _account(self.record, job)
        few = small and (job is None or len(job.results) <= FEW_ITEMS) and not call.every_token
        answer: ViewAnswer = await self._run(few, partial(_render, call, job))
        if self._lease.size or len(answer.body) > SMALL_BODY:
            await hold(self._lease, len(answer.body), options.write_seconds)
        return answer

    async def _run(self, small: bool, work: Callable[[], Any]) -> Any:
        return work() if small else await self._thread(work)

    async def _thread(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._server.threads, work)

    async def _work(self, call: Call, work: Work, client: str) -> Job | None:
        """Have the engine do the work of a call; drop it if the client goes, or if it waited too long to begin."""
        if not work.items:
            return None
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def deliver(job: Job) -> None:
            loop.call_soon_threadsafe(_resolve, done, None)

        patience = min(self.dialect.patience, self._server.options.max_wait_seconds)
        engine = call.served.engine
        job = engine.submit(work, deliver, client=client, patience=patience)
        watcher = asyncio.ensure_future(_until_gone(self._receive))
        watcher.add_done_callback(lambda task: None if task.cancelled() else _resolve(done, ClientGoneError()))
        limit: asyncio.TimerHandle | None = None
        if job.may_be_refused:
            limit = loop.call_later(patience, lambda: _resolve(done, engine.withdraw(job), only_error=True))
        try:
            await done
        except BaseException:
            job.gone = True
            raise
        finally:
            watcher.cancel()
            if limit is not None:
                limit.cancel()
        if job.failure:
            draining = self._server.draining
            raise Problem("draining" if draining else "backend", job.failure, retry_after=1 if draining else None)
        return job


def _resolve(done: asyncio.Future[None], error: Exception | None, *, only_error: bool = False) -> None:
    if done.done() or (only_error and error is None):
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _prepare(scoring: Scoring, incoming: Incoming) -> Call:
    check_counts(incoming.body, incoming.options.max_items)
    check(incoming.body, scoring.body)
    return scoring.prepare(incoming)


def _work(call: Call, options: ServerOptions) -> Work:
    work = call.work(options)
    assert len(work.tokens) == len(work.items) >= len(work.long)  # computes and caches them in this thread
    return work


def _render(call: Call, job: Job | None) -> ViewAnswer:
    outcome = call.outcome(job)
    value = call.render(outcome)
    cut = sum(
        score.truncated > 0 for row in outcome.rows if not isinstance(row, RewardRTError) for score in row.answers
    )
    headers: Sequence[tuple[str, str]] = (("x-rewardrt-bundle", call.served.sha256),)
    if cut:
        headers = (*headers, ("x-rewardrt-truncated", str(cut)))
    if isinstance(value, Reply):
        return ViewAnswer(value.body, 200, value.content_type, (*headers, *value.headers))
    return ViewAnswer(to_line(value), 200, JSON, tuple(headers))


def _account(record: Record, job: Job | None) -> None:
    if job is None:
        return
    record.texts = len(job.results)
    for result in job.results:
        record.tokens += getattr(result, "tokens", 0)
        record.truncated += getattr(result, "truncated", 0) > 0
    record.queue_seconds, record.compute_seconds = job.queue_seconds or 0.0, job.compute_seconds


def refusal(dialect: Dialect, problem: Problem) -> ViewAnswer:
    """Return the answer to a refused or failed request."""
    status = dialect.status(problem)
    headers = (("retry-after", str(problem.retry_after)),) if problem.retry_after is not None else ()
    if problem.kind == "unauthorized":
        headers = (*headers, ("www-authenticate", "Bearer"))
    return ViewAnswer(to_line(dialect.body(status, problem)), status, JSON, headers)


def client_address(scope: Mapping[str, Any]) -> str:
    """Return the address that a request comes from, or "-" if there is none."""
    return f"{scope['client'][0]}" if scope.get("client") else "-"


def path_of(scope: Mapping[str, Any]) -> str:
    """Return the path as sent, still percent-encoded, so that it cannot contain a line break."""
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    return raw.decode("latin-1")
