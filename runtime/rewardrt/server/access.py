"""Who may send requests: API keys, the host names of this server, and protection from other sites' pages."""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from rewardrt.errors import RewardRTError
from rewardrt.server.options import ServerOptions
from rewardrt.server.problem import Problem

LOOPBACK = ("127.0.0.1", "::1", "localhost")
KEY_VARIABLE = "REWARDRT_API_KEY"
UNAUTHORIZED = "Unauthorized: send this server's key as `Authorization: Bearer KEY` or `X-API-Key: KEY`"
KEY_FILE_BYTES = 65_536
# Content types that a form on any page can post without a CORS preflight request of the browser.
FORM_TYPES = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data")


class Access:
    """Checks of every request. `local` says that the server listens only on an address of this machine."""

    def __init__(self, options: ServerOptions, *, local: bool = False) -> None:
        self._keys = [key.encode() for key in options.api_keys]
        self._hosts = {_name(host) for host in options.hosts}
        self._own = {"localhost", socket.gethostname().lower()}
        self._local = local

    def check_key(self, headers: Mapping[str, str]) -> int:
        """Return the index of the request's key, or raise Problem("unauthorized"); 0 if the server has no keys."""
        if not self._keys:
            return 0
        bearer = headers.get("authorization", "")
        given = bearer[7:].strip() if bearer[:7].lower() == "bearer " else headers.get("x-api-key", "")
        found = [hmac.compare_digest(given.encode("utf-8", "surrogateescape"), key) for key in self._keys]
        if not any(found):
            sent = "another one was sent" if given else "none was sent"
            raise Problem("unauthorized", f"{UNAUTHORIZED}; {sent}")
        return found.index(True)

    def check_names(self, method: str, headers: Mapping[str, str]) -> None:
        """Raise Problem("forbidden") for a request that another site's page makes a browser send.

        Such a page either sends its own name as Origin, or it has pointed its name at an address of this machine (DNS
        rebinding); then Host is a name that is not this server's. If the server has keys, Host is not checked, because
        such a page has no key.
        """
        host, origin = headers.get("host", ""), headers.get("origin")
        posts = method not in ("GET", "HEAD")
        if (
            origin is not None
            and posts
            and origin.partition("://")[2].lower() != host.lower()
            and _name(origin.partition("://")[2]) not in self._hosts
        ):
            raise Problem("forbidden", f"Origin {origin[:80]!r} is not this server; {_ADVICE}")
        if posts and headers.get("sec-fetch-site") == "cross-site" and origin is None:
            raise Problem("forbidden", f"a page of another site asks; {_ADVICE}")
        if self._keys or not host:
            return
        if (self._local or self._hosts or (origin is not None and posts)) and not self._is_ours(_name(host)):
            raise Problem("forbidden", f"Host {host[:80]!r} is not a name of this server; {_ADVICE}")

    def _is_ours(self, name: str) -> bool:
        return name in self._own or name in self._hosts or name.endswith(".localhost") or _is_address(name)


_ADVICE = "the operator can name it by --allow-host"


def check_media_type(headers: Mapping[str, str]) -> None:
    """Raise Problem("media_type") for a content type that a form on any page could send."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in FORM_TYPES:
        raise Problem("media_type", f"content-type: expected application/json, found {kind}")


def client_of(address: str, key: int, keys: int) -> str:
    """Return whose share of the queue a request uses: its key's if there are several keys, else its address's."""
    return f"key {key}" if keys > 1 else _network(address)


@lru_cache(maxsize=4096)
def _network(address: str) -> str:
    """Return an address; for IPv6 the /64 network, which usually belongs to one client."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    return str(ipaddress.ip_network((found, 64), strict=False)) if found.version == 6 else address


def api_keys(key: str | None, file: Path | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the operator's keys, from the option, the file or REWARDRT_API_KEY. Raises RewardRTError."""
    if key is not None and file is not None:
        raise RewardRTError("--api-key and --api-key-file: expected one of them")
    if file is not None:
        return read_api_keys(file)
    if key is not None:
        return (check_api_key(key, "--api-key"),)
    if KEY_VARIABLE in environment:
        return (check_api_key(environment[KEY_VARIABLE], KEY_VARIABLE),)
    return ()


def check_api_key(key: str, source: str) -> str:
    """Return a valid key; raise RewardRTError for one that is empty or that no client could send."""
    if not key:
        raise RewardRTError(f"{source}: expected a key, found an empty one, which would guard nothing")
    if key != key.strip():
        raise RewardRTError(f"{source}: the key begins or ends with white space, which no client sends; take it off")
    if not (key.isascii() and key.isprintable()):
        raise RewardRTError(f"{source}: expected printable ASCII characters, which are what a header can carry")
    return key


def read_api_keys(path: Path) -> tuple[str, ...]:
    """Return the keys of a file with one key per line: one for all clients, or one for each. Raises RewardRTError."""
    try:
        with path.open("rb") as file:
            data = file.read(KEY_FILE_BYTES + 1)
    except OSError as error:
        raise RewardRTError(f"--api-key-file {path}: cannot be read ({error.strerror})") from error
    if len(data) > KEY_FILE_BYTES:
        raise RewardRTError(f"--api-key-file {path}: expected at most {KEY_FILE_BYTES} bytes, one key a line")
    lines = data.decode("latin-1").splitlines()
    if not lines:
        raise RewardRTError(f"--api-key-file {path}: expected a key, found an empty file, which would guard nothing")
    keys = [check_api_key(line, f"--api-key-file {path}, line {number}") for number, line in enumerate(lines, 1)]
    if len(set(keys)) < len(keys):
        raise RewardRTError(f"--api-key-file {path}: a key is there twice")
    return tuple(keys)


def _name(host: str) -> str:
    """Return the host name in a Host header or an option, without its port."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0] if host.count(":") <= 1 else host


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
