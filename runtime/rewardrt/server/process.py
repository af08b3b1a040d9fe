"""The server process: its socket, its signals, and its shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import ssl
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from rewardrt.errors import RewardRTError
from rewardrt.machine.providers import ProviderChoice
from rewardrt.server.address import ACCEPTED_AT_ONCE, BACKLOG, Address, connection_limit, listening, shown, tls_context
from rewardrt.server.app import make_app
from rewardrt.server.connection import Connection
from rewardrt.server.log import LOG, log
from rewardrt.server.metrics import Metrics
from rewardrt.server.models import Loader
from rewardrt.server.openapi import document
from rewardrt.server.options import ServerOptions
from rewardrt.server.reload import Reloader
from rewardrt.server.state import Server

KEEP_ALIVE_SECONDS = 75
TICK_SECONDS = 0.02
SWEEP_SECONDS = 0.5
UNFINISHED_SECONDS = 1.0  # time for requests that are incomplete when the shutdown begins
SWITCH_SECONDS = 0.001  # Python's thread switch interval: about how long the event loop waits for other threads


def serve(
    bundles: Sequence[tuple[tuple[str, ...], Path]],
    options: ServerOptions,
    address: Address,
    *,
    provider: ProviderChoice = "auto",
    precision: str = "auto",
    threads: int | None = None,
) -> None:
    """Serve bundles, each under its names, until SIGTERM, SIGINT or SIGHUP.

    Raises RewardRTError if the address cannot be used or an engine died, and whatever loading a bundle raises.
    """
    context = tls_context(address)
    with listening(address) as listener:  # before loading anything, in case the port is in use
        if not address.is_local and address.uds is None and not options.api_keys:
            log(f"warning: {address.host} can be reached from other machines, and no --api-key guards it")
        metrics = Metrics()
        started = time.perf_counter()
        loader = Loader(options, provider, precision, threads, metrics.turn, log)
        models = loader.load_all(bundles)
        server = Server(models, options, metrics, local=address.is_local)
        server.connections.limit = connection_limit(options.max_connections)
        if server.connections.limit < options.max_connections:
            log(f"warning: at most {server.connections.limit} connections: this process may open few files (ulimit -n)")
        metrics.watch(models, server.connections)
        document()  # build it before anybody waits for it
        for served in models.each:
            source = f", from {served.model.bundle.source}" if served.model.bundle.source else ""
            model = served.model
            log(f"{served.name}: {model.precision} on {model.session.runs_on}{source}, sha256 {served.sha256}")
        where = shown(address, listener)
        log(f"serving {', '.join(models.names)} at {where} (loaded in {time.perf_counter() - started:.2f} s)")
        sys.setswitchinterval(SWITCH_SECONDS)
        try:
            _Process(server, loader, address, context).run([listener])
        finally:
            server.threads.shutdown(wait=False, cancel_futures=True)
            for served in models.each:
                served.engine.close()
            for served in models.each:
                served.engine.join(5.0)
            LOG.flush()
    if dead := [served for served in models.each if served.engine.dead]:
        raise RewardRTError(f"{dead[0].name}: {dead[0].engine.fault}; start the server again")


class _Process(uvicorn.Server):
    """uvicorn's server with RewardRT's connections.

    On a signal it answers the requests that it has accepted, and refuses new ones with 503.
    """

    def __init__(self, server: Server, loader: Loader, address: Address, context: ssl.SSLContext | None) -> None:
        config = uvicorn.Config(
            make_app(server),
            http="h11",
            ws="none",
            log_level="critical",
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=1,
            root_path=address.root_path,
            proxy_headers=bool(address.proxies),
            forwarded_allow_ips=address.proxies,
            ssl_context_factory=None if context is None else lambda config, default: context,
        )
        super().__init__(config)
        self._shared = server
        self._loader = loader
        self._deadline = 0.0
        self._reload = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start the shutdown; a second signal ends the wait for accepted requests."""
        if self._shared.draining:
            if time.monotonic() < self._deadline:
                log("ending now: what still waits is answered with 503")
            self._deadline = time.monotonic()
            return
        self._deadline = time.monotonic() + self._shared.options.drain_seconds
        self._shared.draining = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Treat SIGHUP like SIGTERM, unless the process was started to ignore it, and SIGUSR1 as a reload request."""
        with super().capture_signals():
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                signal.signal(signal.SIGHUP, self.handle_exit)
            if hasattr(signal, "SIGUSR1"):
                signal.signal(signal.SIGUSR1, self._wants_reload)
            yield

    def _wants_reload(self, sig: int, frame: FrameType | None) -> None:
        self._reload = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen with RewardRT's connections."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_loop_failed)
        seconds = self._shared.options.header_seconds if self.config.ssl is not None else None
        self.servers = []
        for listener in sockets or []:
            server = await loop.create_server(
                self._connection,
                sock=listener,
                ssl=self.config.ssl,
                backlog=ACCEPTED_AT_ONCE,
                ssl_handshake_timeout=seconds,
            )
            self.servers.append(server)
            listener.listen(BACKLOG)  # the system's queue; the loop accepts ACCEPTED_AT_ONCE at a time
        self.started = True

    def _connection(self) -> Connection:
        return Connection(
            self._shared.connections, config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    async def main_loop(self) -> None:
        """Run until drained."""
        shared = self._shared
        reloader = Reloader(shared.models, self._loader, shared.metrics.reload)
        shared.reload = reloader.reload
        while not shared.draining:
            if self._reload:
                self._reload = False
                reloader.start()
            if any(served.engine.dead for served in shared.models.each):
                log("error: an engine is dead and cannot be started again; the server ends")
                self.handle_exit(signal.SIGTERM, None)
            await self._tick()
        again = "; another Ctrl+C or SIGTERM ends it now" if shared.in_flight else ""
        log(f"shutting down: {shared.in_flight} requests to answer{again}")
        end = min(self._deadline, time.monotonic() + UNFINISHED_SECONDS)
        while (shared.in_flight or time.monotonic() < end) and time.monotonic() < self._deadline:
            if not shared.in_flight and not self._has_unfinished():
                break
            if time.monotonic() > end:
                shared.connections.close_unfinished()
            await self._tick()
        for served in shared.models.each:
            served.engine.close()  # what still waits is answered with 503
        end = time.monotonic() + UNFINISHED_SECONDS / 2
        while shared.in_flight and time.monotonic() < end:
            await self._tick()
        self._idle_are_closed()
        self.should_exit = True

    def _has_unfinished(self) -> bool:
        return any(each.phase == "body" for each in self._shared.connections.open)

    def _idle_are_closed(self) -> None:
        for connection in list(self._shared.connections.open):
            if connection.phase == "idle":
                connection.shutdown()
        self._shared.connections.abort_all()

    async def _tick(self) -> None:
        await self.on_tick(0)
        planned = time.monotonic() + TICK_SECONDS
        await asyncio.sleep(TICK_SECONDS)
        now = time.monotonic()
        self._shared.metrics.lag(max(0.0, now - planned))
        if now >= self._next_sweep:
            self._next_sweep = now + SWEEP_SECONDS
            self._shared.connections.sweep()

    _next_sweep = 0.0


def _loop_failed(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log asyncio's report of an error, on one line."""
    error = context.get("exception")
    log(f"warning: {context.get('message', '')}: {error!r}"[:500])
