"""Connections: time limits for clients, and the maximum number of connections.

uvicorn's protocol waits forever for a header, for a body, and for a client to read its answer. Here each has a time
limit, checked twice a second for all connections. If there are too many connections, the oldest with an unfinished
request is closed for a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any, Literal

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from rewardrt.server.options import ServerOptions

HEADER_BYTES = 16_384
SMALL_CHUNKS = 512  # a body of more chunks is refused if they are smaller than SMALL_CHUNK bytes on average
SMALL_CHUNK = 64
BODY_GRACE = 2.0  # additional seconds for a body, so that the application answers first, in its protocol's format

Phase = Literal["header", "body", "answer", "idle"]


class Connections:
    """All open connections of one server.

    `refused` is called for malformed HTTP, and for requests that took too long.
    """

    def __init__(self, options: ServerOptions, refused: Callable[[str, int, str], None]) -> None:
        self.options = options
        self.limit = options.max_connections
        self.refused = refused
        self.open: set[Connection] = set()
        self.closed_for_others = 0

    def opened(self, connection: Connection) -> None:
        """Register a new connection; if there are too many, close another one."""
        self.open.add(connection)
        if len(self.open) <= self.limit:
            return
        self.closed_for_others += 1
        self._least(connection).abort()

    def _least(self, newest: Connection) -> Connection:
        """Return the connection to close: the oldest unfinished request, else the one that was idle longest."""
        for phases in (("header", "body"), ("idle",)):
            chosen = [each for each in self.open if each.phase in phases and each is not newest]
            if chosen:
                return min(chosen, key=lambda each: each.since)
        return newest

    def sweep(self) -> None:
        """Close connections that exceed a time limit."""
        now = time.monotonic()
        for connection in list(self.open):
            connection.check(now)

    def close_unfinished(self) -> None:
        """Close connections with an incomplete request or none."""
        for connection in list(self.open):
            if connection.phase != "answer":
                connection.abort()

    def abort_all(self) -> None:
        """Close every connection at once."""
        for connection in list(self.open):
            connection.abort()


class _Http(h11.Connection):
    """h11's connection, which also refuses bodies in very small chunks, because each chunk costs an event."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, HEADER_BYTES)
        self._chunks = self._chunk_bytes = 0

    def next_event(self) -> Any:
        """Return the next event."""
        event = super().next_event()
        if isinstance(event, h11.Data) and event.chunk_start:
            self._chunks += 1
            self._chunk_bytes += len(event.data)
            if self._chunks > SMALL_CHUNKS and self._chunk_bytes < self._chunks * SMALL_CHUNK:
                raise h11.RemoteProtocolError("chunks are too small")
        elif isinstance(event, h11.Request):
            self._chunks = self._chunk_bytes = 0
        return event


class Connection(H11Protocol):
    """One connection; `phase` is its state, and `since` when that began (monotonic time in seconds)."""

    def __init__(self, connections: Connections, **options: Any) -> None:
        super().__init__(**options)
        self.conn = _Http()
        self.phase: Phase = "header"
        self.since = time.monotonic()
        self._connections = connections
        self._stuck: float | None = None  # time since which the client has not read, or the connection is closing

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start waiting for a header."""
        super().connection_made(transport)
        self._connections.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Unregister the connection."""
        self._connections.open.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Pass the data on in pieces, so that a header cannot exceed its size limit."""
        for start in range(0, len(data), HEADER_BYTES):
            if self.transport.is_closing():
                return
            super().data_received(data[start : start + HEADER_BYTES])
        self._settle()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._settle()

    def pause_writing(self) -> None:
        """Start the time limit for a client that does not read."""
        self._stuck = time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        """Stop that time limit: the client reads again."""
        self._stuck = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer malformed HTTP with 400, unless an answer has already begun."""
        self._connections.refused(self._client(), 400, "malformed HTTP")
        with contextlib.suppress(h11.LocalProtocolError):
            super().send_400_response(msg)
            return
        self.abort()

    def abort(self) -> None:
        """Close at once, without sending what is still buffered."""
        self.transport.abort()

    def check(self, now: float) -> None:
        """Close the connection if it exceeds a time limit."""
        options = self._connections.options
        if self._stuck is None and self.transport.is_closing():
            self._stuck = now  # we closed it, and the client has not read everything yet
        if self._stuck is not None:
            if now - self._stuck > options.write_seconds:
                self.abort()
            return
        limits = {"header": options.header_seconds, "body": options.body_seconds + BODY_GRACE}
        if self.phase in limits and now - self.since > limits[self.phase]:
            if self.cycle is None and not self.conn.trailing_data[0]:  # opened in advance and not used
                self.abort()
                return
            self._connections.refused(self._client(), 408, f"the {self.phase} did not come in time")
            if self.conn.our_state is h11.IDLE:
                self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
                self.transport.close()
            else:
                self.abort()

    def _settle(self) -> None:
        state = self.conn.their_state
        phase: Phase = "answer"
        if state is h11.IDLE:
            phase = "header" if self.conn.trailing_data[0] or self.cycle is None else "idle"
        elif state is h11.SEND_BODY:
            phase = "body"
        if phase != self.phase:
            self.phase, self.since = phase, time.monotonic()

    def _client(self) -> str:
        return self.client[0] if self.client else "-"
