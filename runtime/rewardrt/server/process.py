"""The process: its socket, its signals, and the way out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from rewardrt.errors import RewardRTError
from rewardrt.machine.providers import ProviderChoice
from rewardrt.server.access import LOOPBACK
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
BACKLOG = 2048
ACCEPTED_AT_ONCE = 4  # connections taken in one turn of the event loop; what is too many is closed two turns later
SPARE_FILES = 8  # descriptors for what is opened now and then, such as a bundle's files
TICK_SECONDS = 0.02
SWEEP_SECONDS = 0.5
UNFINISHED_SECONDS = 1.0  # for requests that are not whole when the server begins to drain
SWITCH_SECONDS = 0.001  # Python's threads take turns: the event loop waits for others at most about so long


@dataclass(frozen=True)
class Address:
    """Where a server listens, and what a proxy before it does."""

    host: str = "127.0.0.1"
    port: int = 5000
    uds: Path | None = None  # a unix socket, in place of host and port
    certificate: Path | None = None
    key: Path | None = None
    root_path: str = ""  # what a proxy has taken off the path
    proxies: str = ""  # addresses whose X-Forwarded-For is believed

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it, by a name or an address."""
        return self.uds is None and self.host in LOOPBACK


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

    Raises RewardRTError when the address cannot be had, what loading a bundle raises, or when an engine died for good.
    """
    context = tls_context(address)
    with listening(address) as listener:  # first: a second server on a port is refused before it loads anything
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
        document()  # made once, before anybody waits for it
        for served in models.each:
            log(f"{served.name}: {served.model.precision} on {served.model.session.runs_on}, sha256 {served.sha256}")
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


@contextlib.contextmanager
def listening(address: Address) -> Iterator[socket.socket]:
    """Listen until the block ends; raises RewardRTError where that cannot be."""
    listener = listen(address.host, address.port) if address.uds is None else listen_at_path(address.uds)
    try:
        yield listener
    finally:
        listener.close()
        if address.uds is not None:
            with contextlib.suppress(OSError):
                address.uds.unlink()


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
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise RewardRTError(
            f"{host}:{port} cannot be had ({error.strerror}); stop what listens there, or choose another --port"
        ) from error
    return listener


def listen_at_path(path: Path) -> socket.socket:
    """Return a unix socket that listens, in the place of one that nobody listens at, or raise RewardRTError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
                if other.connect_ex(str(path)) == 0:
                    raise RewardRTError(f"--uds {path}: another server listens there; stop it, or choose another path")
            path.unlink()
        before = os.umask(0o117)  # for the owner and the group
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise RewardRTError(
            f"--uds {path}: cannot be had ({error.strerror or error}); name a free path in a writable folder"
        ) from error
    except RewardRTError:
        listener.close()
        raise
    return listener


def tls_context(address: Address) -> ssl.SSLContext | None:
    """Return what TLS needs, or None without it. Raises RewardRTError for files that are no certificate and its key."""
    if address.certificate is None:
        return None
    for option, path in (("--tls-cert", address.certificate), ("--tls-key", address.key)):
        if path is not None and not path.is_file():
            raise RewardRTError(f"{option} {path}: no such file")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(address.certificate, address.key, password=lambda: "")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise RewardRTError(
            f"--tls-cert {address.certificate}: not a certificate with its key in PEM, unencrypted ({reason})"
        ) from error
    return context


def connection_limit(wanted: int) -> int:
    """Return how many connections there may be: as many as wanted, where this process may open so many files."""
    try:
        import resource
    except ImportError:  # Windows
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    if soft == resource.RLIM_INFINITY:
        return wanted
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:
        used = 64
    return max(1, min(wanted, soft - used - 3 * ACCEPTED_AT_ONCE - SPARE_FILES))


def shown(address: Address, listener: socket.socket) -> str:
    """Return the address for people, and for the tests that read it."""
    if address.uds is not None:
        return f"unix:{address.uds}"
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"{'http' if address.certificate is None else 'https'}://{host}:{listener.getsockname()[1]}"


class _Process(uvicorn.Server):
    """uvicorn's server with our connections.

    On a signal it first answers what it has accepted, and new requests with 503.
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
        """Begin to drain; a second signal ends the wait."""
        if self._shared.draining:
            self._deadline = time.monotonic()
            return
        self._deadline = time.monotonic() + self._shared.options.drain_seconds
        self._shared.draining = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGHUP as SIGTERM, unless the process was started to survive it, and SIGUSR1 as a wish to reload."""
        with super().capture_signals():
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                signal.signal(signal.SIGHUP, self.handle_exit)
            if hasattr(signal, "SIGUSR1"):
                signal.signal(signal.SIGUSR1, self._wants_reload)
            yield

    def _wants_reload(self, sig: int, frame: FrameType | None) -> None:
        self._reload = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen with our connections."""
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
            listener.listen(BACKLOG)  # what the system holds for us; the loop takes ACCEPTED_AT_ONCE at a time
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
        log(f"shutting down: {shared.in_flight} requests to answer")
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
    """Write what asyncio has to say into the log, in one line."""
    error = context.get("exception")
    log(f"warning: {context.get('message', '')}: {error!r}"[:500])
