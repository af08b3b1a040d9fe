"""The servers of one bundle: which one is asked, what is retried, and whether it serves the expected bundle.

A request that a server did not answer, or answered with 429, 502, 503 or 504, is sent to the next server that is up,
or, after a wait, to one that was not. Scoring changes nothing on a server, so a request may be sent twice. Other
refusals (4xx) are not retried; a failure of the server itself (500) is retried twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rewardrt.client.wire import Options, decode_answer, encode_request
from rewardrt.errors import MissingExtraError, RowError, ServerError
from rewardrt.scoring.scored import ScoredRow

try:
    import httpx2
except ImportError as error:
    raise MissingExtraError(f"RewardClient needs httpx2 ({error}): pip install 'rewardrt[client]'") from error

BUSY = (429, 502, 503, 504)  # HTTP statuses that are retried
FIRST_WAIT, LONGEST_WAIT = 0.1, 5.0  # seconds to wait for a server that did not answer
FAILURES = 2  # how often a request that failed with 500 is retried


@dataclass(frozen=True)
class Access:
    """How servers are reached, and what is expected of them. `timeout` and `patience` are in seconds."""

    urls: tuple[str, ...]
    api_key: str | None = None
    timeout: float = 180.0
    patience: float = 300.0
    tls_ca: str | None = None
    expect_sha256: str | None = None
    require_certificate: bool = False


class TooManyError(Exception):
    """A request has more rows, or more bytes, than the server accepts."""


@dataclass
class _Server:
    """One address and its state."""

    url: str
    http: httpx2.AsyncClient
    base: str
    under_way: int = 0
    failures: int = 0
    up_again: float = 0.0  # time before which the server is not asked, unless all others are down too
    about: dict[str, Any] | None = None
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)


class Servers:
    """The servers of a client, for one event loop."""

    def __init__(self, access: Access) -> None:
        """Prepare the clients of all addresses; nothing is sent yet."""
        self._access = access
        self._sha256 = access.expect_sha256
        self._servers = [self._server(url) for url in access.urls]

    def _server(self, url: str) -> _Server:
        access = self._access
        headers = {"authorization": f"Bearer {access.api_key}"} if access.api_key else {}
        verify: Any = True if access.tls_ca is None else ssl.create_default_context(cafile=access.tls_ca)
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=30.0)
        options: dict[str, Any] = {"headers": headers, "timeout": access.timeout}
        if url.startswith("unix:"):
            socket = "/" + url.removeprefix("unix:").lstrip("/")
            transport = httpx2.AsyncHTTPTransport(uds=socket, limits=limits)
            return _Server(url, httpx2.AsyncClient(transport=transport, **options), "http://localhost")
        return _Server(url, httpx2.AsyncClient(verify=verify, limits=limits, **options), url)

    async def close(self) -> None:
        """Close all connections."""
        for server in self._servers:
            await server.http.aclose()

    async def describe(self, model: str | None) -> dict[str, Any]:
        """Return a server's description of the model. Raises ServerError."""
        about: dict[str, Any] = await self._try(lambda server: self._about(server, model))
        return about

    async def score(self, rows: Sequence[bytes], options: Options) -> list[ScoredRow | RowError]:
        """Return the results of rows.

        Raises ServerError, and TooManyError if several rows are too many for one request.
        """
        found: list[ScoredRow | RowError] = await self._try(lambda server: self._score(server, rows, options))
        return found

    async def _try(self, work: Any) -> Any:
        """Do some work with one server after another, until one has done it or the patience is used up."""
        began = time.monotonic()
        faults = 0
        while True:
            server = self._choose()
            if (wait := server.up_again - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            server.under_way += 1
            try:
                done = await work(server)
                server.failures, server.up_again = 0, 0.0
                return done
            except _AgainError as error:
                faults += error.fault
                server.failures += 1
                wait = error.after or min(LONGEST_WAIT, FIRST_WAIT * 2 ** min(server.failures - 1, 10))
                now = time.monotonic()
                server.up_again = now + wait * random.uniform(0.75, 1.25)  # clients retry at different times
                rest = max(0.0, self._choose().up_again - now)
                if faults > FAILURES or now - began + rest > self._access.patience:
                    others = f" (and {len(self._servers) - 1} more)" if len(self._servers) > 1 else ""
                    tried = f"; tried for {now - began:.0f} s" if now - began > 1 else ""
                    raise ServerError(f"{server.url}{others}: {error}{tried}") from error
            finally:
                server.under_way -= 1

    def _choose(self) -> _Server:
        """Return the least busy server that is up, or else the one that will be asked again first."""
        now = time.monotonic()
        return min(self._servers, key=lambda server: (max(0.0, server.up_again - now), server.under_way))

    async def _score(self, server: _Server, rows: Sequence[bytes], options: Options) -> list[ScoredRow | RowError]:
        labels = (await self._about(server, options.model))["objectives"]
        response = await self._send(
            server, "POST", "/v1/reward", encode_request(rows, options, objectives=bool(labels))
        )
        if response.status_code == 413 or _kind(response) == "too_many":
            if len(rows) > 1:
                raise TooManyError
            return [RowError(f"{server.url}: {_message(response)}")]
        self._check(server, response)
        if sha256 := response.headers.get("x-rewardrt-bundle"):  # the server may have reloaded or restarted
            self._expect(server, sha256)
        return decode_answer(response.content, len(rows), labels, server.url)

    async def _about(self, server: _Server, model: str | None) -> dict[str, Any]:
        """Return a server's description of its model, requested only once; refuse any other bundle than expected."""
        async with server.asking:
            if server.about is None:
                server.about = await self._ask(server, model)
        return server.about

    async def _ask(self, server: _Server, model: str | None) -> dict[str, Any]:
        response = await self._send(server, "GET", "/info")
        self._check(server, response)
        with contextlib.suppress(ValueError):
            info = response.json()
            if isinstance(info, dict) and info.get("server") == "rewardrt":
                known = {each["name"]: each for each in info["models"]}
                if model is not None and model not in known:
                    response = await self._send(server, "GET", f"/v1/models/{model}")  # an alias of the model
                    self._check(server, response)
                    model = response.json()["root"]
                about: dict[str, Any] = known[model] if model is not None else info["models"][0]
                self._expect(server, about["sha256"])
                if self._access.require_certificate and about["certificate"] is None:
                    raise ServerError(f"{server.url}: serves a bundle without a certificate ({about['precision']})")
                return about
        raise ServerError(f"{server.url}: expected a RewardRT server, found another (GET /info is not one's)")

    def _expect(self, server: _Server, sha256: str | None) -> None:
        """Raise ServerError unless a server serves the same bundle as all others: rewards of two must not be mixed."""
        if self._sha256 is None:
            self._sha256 = sha256
        if sha256 == self._sha256:
            return
        was = "was expected" if self._access.expect_sha256 else "it, or another of the servers, had before"
        raise ServerError(
            f"{server.url}: serves the bundle with the manifest SHA-256 {sha256}, and not {self._sha256}, which {was}; "
            "make a new client if that is right"
        )

    async def _send(self, server: _Server, method: str, path: str, body: bytes | None = None) -> httpx2.Response:
        headers = {"content-type": "application/json"} if body is not None else {}
        try:
            response = await server.http.request(method, f"{server.base}{path}", content=body, headers=headers)
        except httpx2.TransportError as error:
            server.about = None
            if cause := _tls_fault(error):
                raise ServerError(f"{server.url}: TLS: {cause}; name the CA's file by tls_ca") from error
            raise _AgainError(f"no answer ({_words(error)})") from error
        if response.status_code in BUSY:
            raise _AgainError(_message(response), after=_retry_after(response))
        if response.status_code == 500:
            raise _AgainError(_message(response), fault=True)
        return response

    def _check(self, server: _Server, response: httpx2.Response) -> None:
        """Raise ServerError if the status is not 200."""
        status = response.status_code
        if status == 200:
            return
        if status == 401:
            found = "is not the server's" if self._access.api_key else "is wanted"
            raise ServerError(f"{server.url}: 401, an API key {found}; give api_key, or set REWARDRT_API_KEY")
        if status == 404 and _kind(response) != "unknown_model":
            raise ServerError(f"{server.url}: 404; expected the address of a RewardRT server alone, without a route")
        raise ServerError(f"{server.url}: {_message(response)}")


class _AgainError(Exception):
    """A request that can be retried, after `after` seconds if the server says so.

    `fault` is set if the server itself failed.
    """

    def __init__(self, message: str, *, after: float | None = None, fault: bool = False) -> None:
        super().__init__(message)
        self.after = after
        self.fault = fault


def _tls_fault(error: BaseException | None) -> str:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error.verify_message or str(error)
        error = error.__cause__ or error.__context__
    return ""


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _error(response: httpx2.Response) -> dict[str, Any]:
    try:
        found = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _kind(response: httpx2.Response) -> str:
    return str(_error(response).get("type", "")) if response.status_code != 200 else ""


def _message(response: httpx2.Response) -> str:
    said = _error(response).get("message") or response.reason_phrase
    return f"{response.status_code}, {' '.join(str(said).split())[:500]}"


def _retry_after(response: httpx2.Response) -> float | None:
    value = response.headers.get("retry-after", "")
    return min(60.0, float(value)) if value.isdigit() and len(value) < 6 else None
