"""HTTP: asks for the key, reads bodies within their limits, hands work to the engines and writes the answers.

The event loop decodes small bodies and moves bytes. What is larger is decoded, and large answers are written, by a few
threads, so that no request holds up the others.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from rewardrt.data.files import to_line
from rewardrt.errors import RewardRTError
from rewardrt.server import kserve, own
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
from rewardrt.server.engine import place
from rewardrt.server.log import Record
from rewardrt.server.models import Uses
from rewardrt.server.openapi import DOCUMENTS
from rewardrt.server.options import ServerOptions
from rewardrt.server.problem import Problem
from rewardrt.server.routes import RELOAD, ROUTES, ScoringRoute
from rewardrt.server.schema import check
from rewardrt.server.state import Server
from rewardrt.server.turns import Job, Work
from rewardrt.server.views import VIEWS, View, ViewAnswer

JSON = "application/json"
WRITE_BYTES = 65_536  # handed to a connection at a time: the rest waits until the client has read
FEW_ITEMS = 64  # an answer for so many is written on the event loop
LOGGED_BYTES = 16_384  # of a body, with --log-texts


def make_app(server: Server) -> Starlette:
    """Return the ASGI application of a server."""
    routes = [Route(route.path, _Endpoint(server, route), methods=["POST"]) for route in ROUTES]
    routes += [Route(view.path, partial(_view, server, view), methods=["GET"]) for view in (*VIEWS, *DOCUMENTS)]
    routes += [Route(RELOAD, partial(_reload, server), methods=["POST"])]
    app = Starlette(routes=_merged(routes), exception_handlers={HTTPException: partial(_not_served, server)})
    app.router.redirect_slashes = False  # to the Host that a client names, and before it is asked for the key
    return app


def _merged(routes: list[Route]) -> list[Route]:
    paths = [route.path for route in routes]
    assert len(set(paths)) == len(paths), "a path is in the tables twice"
    return routes


async def _not_served(server: Server, request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    record = Record(request.method, _path(request.scope), _client(request.scope), status=error.status_code)
    message = f"{request.method} {record.path[:200]}: not served here; see /openapi.json"
    problem = Problem("method" if error.status_code == 405 else "not_found", message)
    record.error = problem.kind
    server.finish(record, problem.kind)
    if "/v2/models" in request.url.path or "/v2/health" in request.url.path:
        body: Any = kserve.refusal(error.status_code, problem)
    else:
        body = own.refusal(error.status_code, problem)
    headers = dict(error.headers or {})
    if request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers:
        headers["connection"] = "close"  # the body is not read
    return Response(to_line(body), error.status_code, headers=headers, media_type=JSON)


async def _view(server: Server, view: View, request: Request) -> Response:
    """Answer one GET."""
    started = time.perf_counter()
    record = Record(request.method, _path(request.scope), _client(request.scope), protocol=view.dialect.name)
    kind = ""
    try:
        server.access.check_names(request.method, request.headers)
        if view.guarded and not (view.path == "/metrics" and server.options.open_metrics):
            server.access.check_key(request.headers)
        answer = view.answer(server, request.path_params)
    except Problem as problem:
        kind = problem.kind
        record.error = problem.message
        answer = _refusal(view.dialect, problem)
    except Exception as error:  # a bug of ours: this request fails, and the log says where
        kind, record.error = "backend", f"{type(error).__name__} at {place(error)}"
        answer = _refusal(view.dialect, Problem("backend", f"internal error ({type(error).__name__})"))
    record.status, record.seconds = answer.status, time.perf_counter() - started
    server.finish(record, kind, quiet=view.quiet and not kind)
    return Response(answer.body, answer.status, headers=dict(answer.headers), media_type=answer.content_type)


async def _reload(server: Server, request: Request) -> Response:
    """Load the bundles anew."""
    started = time.perf_counter()
    record = Record("POST", _path(request.scope), _client(request.scope), protocol=own.DIALECT.name)
    kind = ""
    try:
        server.access.check_names("POST", request.headers)
        server.access.check_key(request.headers)
        if not server.options.api_keys:
            raise Problem("forbidden", "expected a server with --api-key; without one, send it SIGUSR1")
        if server.draining:
            raise Problem("draining", "the server is shutting down", retry_after=1)
        assert server.reload is not None
        answer = ViewAnswer(to_line({"models": await server.reload()}))
    except Problem as problem:
        kind, record.error = problem.kind, problem.message
        answer = _refusal(own.DIALECT, problem)
    record.status, record.seconds = answer.status, time.perf_counter() - started
    server.finish(record, kind)
    return Response(answer.body, answer.status, headers=dict(answer.headers), media_type=answer.content_type)


class _Endpoint:
    """Answers the POSTs of one route; an ASGI application."""

    def __init__(self, server: Server, route: ScoringRoute) -> None:
        self._server = server
        self._route = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        server, started = self._server, time.perf_counter()
        request = _Scored(server, self._route, scope, receive)
        try:
            kind, answer = await request.answer()
            record = request.record
            if answer is not None:
                record.status = answer.status
            record.protocol = request.dialect.name
            record.seconds = time.perf_counter() - started
            server.finish(record, kind, request.logged())
            if answer is not None:
                close = server.draining or not request.whole
                await _write(send, answer, close=close)
        finally:
            request.release()


class _Scored:
    """One request for rewards, from its first byte to what is written."""

    def __init__(self, server: Server, route: ScoringRoute, scope: Scope, receive: Receive) -> None:
        self.record = Record(scope["method"], _path(scope), _client(scope))
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
        """Return the kind of problem, or "", and what to answer; nothing where nobody waits."""
        try:
            return "", await self._score()
        except Problem as problem:
            self.record.error = problem.message
            return problem.kind, _refusal(self.dialect, problem)
        except ClientGoneError:
            self.record.status = 499
            return "gone", None
        except Exception as error:  # a bug of ours: this request fails, and the log says where
            self.record.error = f"{type(error).__name__} at {place(error)}"
            return "backend", _refusal(self.dialect, Problem("backend", f"internal error ({type(error).__name__})"))

    def logged(self) -> str:
        """Return what the log says of the body, where that is wanted."""
        if not self._server.options.log_texts or not self._data:
            return ""
        return f" body={self._data[:LOGGED_BYTES].decode('utf-8', 'backslashreplace')!r}"

    def release(self) -> None:
        """Forget what the request held."""
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
        """Have the engine do the work of a call, and drop it when the client goes or has waited for long."""
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


async def _write(send: Send, answer: ViewAnswer, *, close: bool) -> None:
    """Write an answer as the client reads it; one that does not read in time is cut off by its connection."""
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers]
    if answer.content_type is not None:
        headers.append((b"content-type", answer.content_type.encode("latin-1")))
    headers.append((b"content-length", str(len(answer.body)).encode()))
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    for start in range(0, max(1, len(answer.body)), WRITE_BYTES):
        end = start + WRITE_BYTES
        part = answer.body if len(answer.body) <= WRITE_BYTES else answer.body[start:end]
        await send({"type": "http.response.body", "body": part, "more_body": end < len(answer.body)})


def _prepare(scoring: Scoring, incoming: Incoming) -> Call:
    check_counts(incoming.body, incoming.options.max_items)
    check(incoming.body, scoring.body)
    return scoring.prepare(incoming)


def _work(call: Call, options: ServerOptions) -> Work:
    work = call.work(options)
    assert len(work.tokens) == len(work.items) >= len(work.long)  # computed here, once
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


def _refusal(dialect: Dialect, problem: Problem) -> ViewAnswer:
    status = dialect.status(problem)
    headers = (("retry-after", str(problem.retry_after)),) if problem.retry_after is not None else ()
    if problem.kind == "unauthorized":
        headers = (*headers, ("www-authenticate", "Bearer"))
    return ViewAnswer(to_line(dialect.body(status, problem)), status, JSON, headers)


def _client(scope: Mapping[str, Any]) -> str:
    return f"{scope['client'][0]}" if scope.get("client") else "-"


def _path(scope: Mapping[str, Any]) -> str:
    """Return the path as it was sent, in which nothing that could end a line stands for itself."""
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    return raw.decode("latin-1")
