"""Where a server listens: its socket, its TLS certificate, and the number of connections."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rewardrt.errors import RewardRTError
from rewardrt.server.access import LOOPBACK

BACKLOG = 2048
ACCEPTED_AT_ONCE = 4  # connections accepted in one turn of the event loop; excess ones are closed two turns later
SPARE_FILES = 8  # file descriptors reserved for files opened now and then, such as a bundle's


@dataclass(frozen=True)
class Address:
    """Where a server listens, and the proxies in front of it."""

    host: str = "127.0.0.1"
    port: int = 5000
    uds: Path | None = None  # a unix socket, in place of host and port
    certificate: Path | None = None
    key: Path | None = None
    root_path: str = ""  # path prefix that a proxy removes
    proxies: str = ""  # addresses whose X-Forwarded-For header is trusted

    @property
    def is_local(self) -> bool:
        """Whether the server listens only on a loopback name or address."""
        return self.uds is None and self.host in LOOPBACK


@contextlib.contextmanager
def listening(address: Address) -> Iterator[socket.socket]:
    """Yield a listening socket and close it after the block. Raises RewardRTError if the address cannot be used."""
    listener = listen(address.host, address.port) if address.uds is None else listen_at_path(address.uds)
    try:
        yield listener
    finally:
        listener.close()
        if address.uds is not None:
            with contextlib.suppress(OSError):
                address.uds.unlink()


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket for a host and port, or raise RewardRTError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise RewardRTError(f"--host {host}: {error.strerror or error}; name an address of this machine") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the port can be reused at once after a crash
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
    """Return a listening Unix socket at a path, replacing a stale one, or raise RewardRTError."""
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
    """Return the TLS context, or None without TLS.

    Raises RewardRTError unless the files are a certificate and its key.
    """
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
    """Return the number of connections: as many as wanted, or fewer if this process may not open so many files."""
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
    """Return the server's address as text, for people and for tests."""
    if address.uds is not None:
        return f"unix:{address.uds}"
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"{'http' if address.certificate is None else 'https'}://{host}:{listener.getsockname()[1]}"
