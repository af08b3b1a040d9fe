"""HTTP: reads bodies within their limits, asks for the key, hands work to the engines and writes the answers.

The event loop decodes small bodies and moves bytes. Large bodies are decoded, and large answers written, in a thread.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, NoReturn

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from rewardrt.files import to_line
from rewardrt.server import kserve
from rewardrt.server.call import Call, Dialect, Incoming, Reply, Scoring
from rewardrt.server.engine import Job
from rewardrt.server.metrics import Metrics, Record, log
from rewardrt.server.models import Models
from rewardrt.server.openapi import document, page
from rewardrt.server.options import ServerOptions
from rewardrt.server.problem import Problem
from rewardrt.server.routes import ROUTES, ScoringRoute
from rewardrt.server.schema import check
from rewardrt.server.views import PAGE_POLICY, VIEWS, View, ViewAnswer

SMALL_BODY = 65_536  # bytes that are decoded on the event loop; the rest costs it more than a thread does
JSON = "application/json"
DESCRIPTIONS: dict[str, Callable[[], ViewAnswer]] = {
    "/openapi.json": lambda: ViewAnswer(to_line(document())),
    "/docs": lambda: ViewAnswer(page(), 200, "text/html", (("content-security-policy", PAGE_POLICY),)),
}


class ClientGoneError(Exception):
    """The client closed its connection before it was answered."""


class Server:
    """What all requests share: the models, the options, and whether the server is going away."""

    def __init__(self, models: Models, options: ServerOptions, metrics: Metrics) -> None:
        self.models = models
        self.options = options
        self.metrics = metrics
        self.draining = False
        self.in_flight = 0
        self.instance = secrets.token_hex(4)

    def authorize(self, headers: Mapping[str, str]) -> None:
        """Raise Problem("unauthorized") unless the request brings the key, compared in constant time."""
        key = self.options.api_key
        if not key:
            return
        bearer = headers.get("authorization", "")
        given = bearer[7:].strip() if bearer[:7].lower() == "bearer " else headers.get("x-api-key", "")
        if not hmac.compare_digest(given.encode(), key.encode()):
            raise Problem("unauthorized", "Unauthorized")


def make_app(server: Server) -> Starlette:
    """Return the ASGI application of a server."""
    routes = [Route(route.path, _Endpoint(server, route), methods=["POST"]) for route in ROUTES]
    views = (*VIEWS, *(_described(path, answer) for path, answer in DESCRIPTIONS.items()))
    routes += [Route(view.path, partial(_view, server, view), methods=["GET"]) for view in views]
    return Starlette(routes=_merged(routes), exception_handlers={HTTPException: _not_served})


def _described(path: str, answer: Callable[[], ViewAnswer]) -> View:
    """Return a view of what is the same for every server of this version: it is made at the first request."""
    made = cache(answer)
    return View(path, lambda server, parameters: made(), "This document.", guarded=False, quiet=True)


def _merged(routes: list[Route]) -> list[Route]:
    paths = [route.path for route in routes]
    assert len(set(paths)) == len(paths), "a path is in the tables twice"
    return routes


async def _not_served(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: not served here; see /openapi.json"
    body = to_line({"error": {"message": message, "type": "not_found", "code": error.status_code}})
    return Response(body, error.status_code, headers=error.headers, media_type=JSON)


async def _view(server: Server, view: View, request: Request) -> Response:
    """Answer one GET."""
    started = time.perf_counter()
    record = Record("GET", request.url.path, _client(request.scope), protocol=view.dialect.name)
    kind = ""
    try:
        if view.guarded and not (view.path == "/metrics" and server.options.open_metrics):
            server.authorize(request.headers)
        answer = view.answer(server, request.path_params)
    except Problem as problem:
        kind = problem.kind
        record.error = problem.message
        answer = _refusal(view.dialect, problem)
    record.status, record.seconds = answer.status, time.perf_counter() - started
    server.metrics.request(record, kind)
    if not view.quiet:
        log(record.line())
    return Response(answer.body, answer.status, headers=dict(answer.headers), media_type=answer.content_type)


class _Endpoint:
    """Answers the POSTs of one route; an ASGI application."""

    def __init__(self, server: Server, route: ScoringRoute) -> None:
        self._server = server
        self._route = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        server, started = self._server, time.perf_counter()
        record = Record(scope["method"], scope["path"], _client(scope))
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        dialect = self._route.scorings[0].dialect
        kind, answer = "", None
        server.in_flight += 1
        try:
            try:
                server.authorize(headers)
                if server.draining:
                    raise Problem("draining", "the server is shutting down", retry_after=1)
                data = await _read_body(receive, headers, server.options.max_body_bytes)
                text, binary = kserve.split(data, headers)
                body = await _maybe_thread(len(data), partial(_decode, text))
                scoring = self._route.choose(body)
                dialect = scoring.dialect
                incoming = Incoming(body, server.models, scope["path_params"], scope["path"], binary)
                call = await _maybe_thread(len(data), partial(_prepare, scoring, incoming))
                record.model, record.protocol = call.served.name, dialect.name
                job = await self._score(call, receive, len(data))
                _account(record, job)
                answer = await _maybe_thread(len(data), partial(_render, call, job))
            except Problem as problem:
                kind, record.error = problem.kind, problem.message
                answer = _refusal(dialect, problem)
            except ClientGoneError:
                kind, record.status = "gone", 499
            except Exception as error:  # a bug of ours: this request fails, and the log says where
                kind, record.error = "backend", f"{type(error).__name__} at {_place(error)}"
                answer = _refusal(dialect, Problem("backend", f"internal error ({type(error).__name__})"))
            record.protocol = dialect.name
            if answer is not None:
                record.status = answer.status
            record.seconds = time.perf_counter() - started
            server.metrics.request(record, kind)
            log(record.line() + (f" body={body!r}" if server.options.log_texts and kind != "too_large" else ""))
            if answer is not None:
                extra = {"connection": "close"} if server.draining or kind == "too_large" else {}
                response = Response(
                    answer.body, answer.status, headers=dict(answer.headers) | extra, media_type=answer.content_type
                )
                await response(scope, receive, send)
        finally:
            server.in_flight -= 1

    async def _score(self, call: Call, receive: Receive, size: int) -> Job | None:
        """Have the engine do the work of a call, and drop it when the client goes."""
        work = await _maybe_thread(size, partial(call.work, self._server.options))
        if not work.items:
            return None
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def deliver(job: Job) -> None:
            loop.call_soon_threadsafe(_resolve, done, None)

        job = call.served.engine.submit(work, deliver)
        watcher = asyncio.ensure_future(_until_gone(receive))
        watcher.add_done_callback(lambda task: None if task.cancelled() else _resolve(done, ClientGoneError()))
        try:
            await done
        except BaseException:
            job.gone = True
            raise
        finally:
            watcher.cancel()
        if job.failure:
            draining = self._server.draining
            raise Problem("draining" if draining else "backend", job.failure, retry_after=1 if draining else None)
        return job


def _resolve(done: asyncio.Future[None], error: Exception | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read_body(receive: Receive, headers: Mapping[str, str], limit: int) -> bytes:
    message = f"the body is over the limit of {limit} bytes; send fewer texts at a time"
    length = headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise Problem("too_large", message)
    if headers.get("content-encoding", "identity") != "identity":
        raise Problem("validation", "content-encoding: expected identity; send the body as it is")
    parts: list[bytes] = []
    size = 0
    while True:
        event = await receive()
        if event["type"] == "http.disconnect":
            raise ClientGoneError
        size += len(event.get("body", b""))
        if size > limit:
            raise Problem("too_large", message)
        parts.append(event.get("body", b""))
        if not event.get("more_body", False):
            return b"".join(parts)


async def _maybe_thread(size: int, work: Callable[[], Any]) -> Any:
    return work() if size <= SMALL_BODY else await asyncio.to_thread(work)


def _decode(data: bytes) -> Any:
    """Return the JSON of a body, and raise Problem for what JSON is not."""
    try:
        return json.loads(data, parse_constant=_refuse_number)
    except UnicodeDecodeError:
        raise Problem("validation", "body: expected UTF-8") from None
    except json.JSONDecodeError as error:
        raise Problem("validation", f"body: not JSON ({error.msg} at character {error.pos + 1})") from None
    except RecursionError:
        raise Problem("validation", "body: nested too deeply") from None
    except ValueError:  # Python's limit on the digits of an integer
        raise Problem("validation", "body: holds an integer of too many digits") from None


def _refuse_number(text: str) -> NoReturn:
    raise Problem("validation", f"body: holds {text}, which is no number that JSON can carry")


def _prepare(scoring: Scoring, incoming: Incoming) -> Call:
    check(incoming.body, scoring.body)
    return scoring.prepare(incoming)


def _render(call: Call, job: Job | None) -> ViewAnswer:
    outcome = call.outcome(job)
    value = call.render(outcome)
    cut = sum(score.truncated > 0 for row in outcome.rows if isinstance(row, tuple) for score in row)
    headers = (("x-rewardrt-truncated", str(cut)),) if cut else ()
    if isinstance(value, Reply):
        return ViewAnswer(value.body, 200, value.content_type, (*headers, *value.headers))
    return ViewAnswer(to_line(value), 200, JSON, headers)


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


def _client(scope: Scope) -> str:
    return f"{scope['client'][0]}" if scope.get("client") else "-"


def _place(error: Exception) -> str:
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return "?"
    return f"{traceback.tb_frame.f_code.co_filename.rpartition('/')[2]}:{traceback.tb_lineno}"
