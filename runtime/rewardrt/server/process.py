"""The process: its socket, its signals, and the way out."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import uvicorn

from rewardrt.errors import RewardRTError
from rewardrt.providers import ProviderChoice
from rewardrt.server.app import Server, make_app
from rewardrt.server.metrics import Metrics, log
from rewardrt.server.models import load_models
from rewardrt.server.options import ServerOptions

LOOPBACK = ("127.0.0.1", "::1", "localhost")
KEEP_ALIVE_SECONDS = 75


def serve(
    bundles: Sequence[tuple[tuple[str, ...], Path]],
    options: ServerOptions,
    *,
    host: str,
    port: int,
    provider: ProviderChoice = "auto",
    precision: str = "auto",
    threads: int | None = None,
) -> None:
    """Serve bundles, each under its names, until SIGTERM or SIGINT.

    Raises RewardRTError when the address cannot be had, or what loading a bundle raises.
    """
    listener = listen(host, port)  # first: a second server on a port is refused before it loads anything
    with contextlib.closing(listener):
        if host not in LOOPBACK and not options.api_key:
            log(f"warning: {host} can be reached from other machines, and no --api-key guards it")
        metrics = Metrics()
        started = time.perf_counter()
        models = load_models(
            bundles, options, provider=provider, precision=precision, threads=threads, observe=metrics.turn
        )
        metrics.watch(models)
        server = Server(models, options, metrics)
        for served in models.each:
            log(f"{served.name}: {served.model.precision} on {served.model.provider}, sha256 {served.sha256}")
        address = f"{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        log(f"serving {', '.join(models.names)} at http://{address} (loaded in {time.perf_counter() - started:.2f} s)")
        _Process(server).run([listener])
        for served in models.each:
            served.engine.close()
            served.engine.join(5.0)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens, or raise RewardRTError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise RewardRTError(f"--host {host}: {error.strerror or error}; name an address of this machine") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # after a crash the port is free at once
        listener.bind(address)
        listener.listen(2048)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise RewardRTError(
            f"{host}:{port} cannot be had ({error.strerror}); stop what listens there, or choose another --port"
        ) from error
    return listener


class _Process(uvicorn.Server):
    """uvicorn's server, which on SIGTERM first answers what it has accepted, and new requests with 503."""

    def __init__(self, server: Server) -> None:
        config = uvicorn.Config(
            make_app(server),
            log_level="critical",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)
        self._shared = server
        self._deadline = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; a second signal ends the wait."""
        if self._shared.draining:
            self._deadline = time.monotonic()
            return
        self._deadline = time.monotonic() + self._shared.options.drain_seconds
        self._shared.draining = True

    async def main_loop(self) -> None:
        """Run until drained."""
        while not self._shared.draining:
            await self.on_tick(0)
            await asyncio.sleep(0.05)
        log(f"shutting down: {self._shared.in_flight} requests to answer")
        while self._shared.in_flight and time.monotonic() < self._deadline:
            await self.on_tick(0)
            await asyncio.sleep(0.02)
        for served in self._shared.models.each:
            served.engine.close()  # what still waits is answered with 503
        self.should_exit = True
