"""The HTTP application: check the key, read bodies within their limits, pass work to the engines, write answers.

The event loop only decodes small bodies and moves bytes. A few threads decode large bodies and write large answers, so
that no request delays the others.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from rewardrt.data.lines import to_line
from rewardrt.server import kserve, own
from rewardrt.server.isolation import place
from rewardrt.server.log import Record
from rewardrt.server.openapi import DOCUMENTS
from rewardrt.server.problem import Problem
from rewardrt.server.request import ScoringRequest, client_address, path_of, refusal
from rewardrt.server.routes import RELOAD, ROUTES, ScoringRoute
from rewardrt.server.state import Server
from rewardrt.server.views import JSON, VIEWS, View, ViewAnswer

WRITE_BYTES = 65_536  # passed to a connection at a time; the rest waits until the client has read


def make_app(server: Server) -> Starlette:
    """Return the ASGI application of a server."""
    routes = [Route(route.path, _Endpoint(server, route), methods=["POST"]) for route in ROUTES]
    routes += [Route(view.path, partial(_view, server, view), methods=["GET"]) for view in (*VIEWS, *DOCUMENTS)]
    routes += [Route(RELOAD, partial(_reload, server), methods=["POST"])]
    app = Starlette(routes=_merged(routes), exception_handlers={HTTPException: partial(_not_served, server)})
    app.router.redirect_slashes = False  # a redirect would trust the client's Host, and come before the key check
    return app


def _merged(routes: list[Route]) -> list[Route]:
    paths = [route.path for route in routes]
    assert len(set(paths)) == len(paths), "a path is in the tables twice"
    return routes


async def _not_served(server: Server, request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    record = Record(request.method, path_of(request.scope), client_address(request.scope), status=error.status_code)
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
    record = Record(request.method, path_of(request.scope), client_address(request.scope), protocol=view.dialect.name)
    kind = ""
    try:
        server.access.check_names(request.method, request.headers)
        if view.guarded and not (view.path == "/metrics" and server.options.open_metrics):
            server.access.check_key(request.headers)
        answer = view.answer(server, request.path_params)
    except Problem as problem:
        kind = problem.kind
        record.error = problem.message
        answer = refusal(view.dialect, problem)
    except Exception as error:  # a bug of ours: this request fails, and the log says where
        kind, record.error = "backend", f"{type(error).__name__} at {place(error)}"
        answer = refusal(view.dialect, Problem("backend", f"internal error ({type(error).__name__})"))
    record.status, record.seconds = answer.status, time.perf_counter() - started
    server.finish(record, kind, quiet=view.quiet and not kind)
    return Response(answer.body, answer.status, headers=dict(answer.headers), media_type=answer.content_type)


async def _reload(server: Server, request: Request) -> Response:
    """Reload the bundles."""
    started = time.perf_counter()
    record = Record("POST", path_of(request.scope), client_address(request.scope), protocol=own.DIALECT.name)
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
        answer = refusal(own.DIALECT, problem)
    record.status, record.seconds = answer.status, time.perf_counter() - started
    server.finish(record, kind)
    return Response(answer.body, answer.status, headers=dict(answer.headers), media_type=answer.content_type)


class _Endpoint:
    """An ASGI application that answers the POST requests of one route."""

    def __init__(self, server: Server, route: ScoringRoute) -> None:
        self._server = server
        self._route = route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        server, started = self._server, time.perf_counter()
        request = ScoringRequest(server, self._route, scope, receive)
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


async def _write(send: Send, answer: ViewAnswer, *, close: bool) -> None:
    """Write an answer as fast as the client reads it; the connection closes if the client does not read in time."""
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
