"""The client of reward servers: the calls of a loaded bundle, over HTTP.

with RewardClient("http://127.0.0.1:8000") as client:
    client.score(prompt="Name a colour.", response="Blue.")
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rewardrt.bundle.spec import AggregateRule
from rewardrt.client.address import address
from rewardrt.errors import ServerError
from rewardrt.forks import after_fork
from rewardrt.scoring.source import Results, RewardSource

if TYPE_CHECKING:
    from rewardrt.client.batches import Connection


class RewardClient(RewardSource):
    """Rewards from one server run by `rewardrt serve`, or from several that serve the same bundle.

    The calls are those of `RewardModel`: `score`, `score_many`, `score_rows`, `rank`, and the coroutines `ascore` and
    so on. Rows of all threads and coroutines that call at the same time are sent together. If a server does not answer
    or is busy, the request is retried, and meanwhile other servers are used. Rewards are bit for bit those of the
    server's model.

    A client can be pickled (with its API key) and used in a forked process: it makes new connections there.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        model: str | None = None,
        api_key: str | None = None,
        expect_sha256: str | None = None,
        require_certificate: bool = False,
        batch_rows: int = 64,
        batch_seconds: float = 0.002,
        concurrency: int = 8,
        timeout: float = 180.0,
        patience: float = 300.0,
        tls_ca: str | Path | None = None,
    ) -> None:
        """Name the servers; nothing is sent before the first call. All times are in seconds.

        `urls`             addresses without a route, such as http://10.0.0.5:8000 or unix:/run/reward.sock
        `model`            the name of one of the server's bundles; None: its first bundle
        `api_key`          None: the environment variable REWARDRT_API_KEY
        `expect_sha256`    the SHA-256 of the bundle's reward.json, which covers all its files; None: that of the first
                           answer. Any other bundle, from any server at any time, is an error
        `require_certificate` whether a graph that was never compared with torch is an error
        `batch_rows`       the most rows of one request
        `batch_seconds`    how long rows wait for others to be sent with
        `concurrency`      the most requests at once
        `timeout`          time limit of one answer
        `patience`         how long a request is retried before the call fails
        `tls_ca`           a file with the CA that signed the server's certificate; None: the system's CAs

        Raises ServerError for invalid addresses and options, and MissingExtraError.
        """
        from rewardrt.client.batches import Batching
        from rewardrt.client.servers import Access
        from rewardrt.server.access import KEY_VARIABLE

        given = [urls] if isinstance(urls, str) else list(urls)
        if not given:
            raise ServerError("expected at least one server's address, found none")
        if min(batch_rows, concurrency) < 1 or batch_seconds < 0 or timeout <= 0 or patience < 0:
            raise ServerError("expected batch_rows and concurrency of at least 1, and no negative time")
        if tls_ca is not None and not Path(tls_ca).is_file():
            raise ServerError(f"{tls_ca}: expected the file of a CA, found none")
        if api_key is None:
            api_key = os.environ.get(KEY_VARIABLE)
        self._model = model
        self._access = Access(
            tuple(dict.fromkeys(map(address, given))),
            api_key,
            timeout,
            patience,
            None if tls_ca is None else str(tls_ca),
            expect_sha256,
            require_certificate,
        )
        self._batching = Batching(batch_rows, batch_seconds, concurrency)
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        _CLIENTS.add(self)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy the client as the arguments it was made with."""
        return {"_model": self._model, "_access": self._access, "_batching": self._batching}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the client again from these arguments."""
        self.__dict__.update(state)
        self._start()

    def __repr__(self) -> str:
        name = "" if self._model is None else f", model={self._model!r}"
        return f"RewardClient({', '.join(map(repr, self._access.urls))}{name})"

    @property
    def input(self) -> str:
        """What the server's model reads: "single", "steps" or "pairwise". Raises ServerError."""
        return str(self.describe()["input"])

    def score_rows(
        self,
        items: Iterable[dict[str, Any]],
        *,
        normalize: bool | None = None,
        aggregate: AggregateRule | None = None,
    ) -> Results:
        """Score rows of any shape; see `RewardSource.score_rows`.

        Raises ServerError if no server answers.
        """
        future = self._submit(items, normalize, aggregate)
        try:
            return future.result()
        except BaseException:  # such as Ctrl+C: drop the rows that were not sent
            future.cancel()
            raise

    async def ascore_rows(
        self,
        items: Iterable[dict[str, Any]],
        *,
        normalize: bool | None = None,
        aggregate: AggregateRule | None = None,
    ) -> Results:
        """Do what `score_rows` does without blocking the event loop."""
        import asyncio

        return await asyncio.wrap_future(self._submit(items, normalize, aggregate))

    def describe(self) -> dict[str, Any]:
        """Return a server's description of its model: family, precision, provider, SHA-256, certificate and more.

        Raises ServerError.
        """
        return self._connected().describe(self._model)

    def close(self) -> None:
        """Close the connections; a later call makes new ones."""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def __enter__(self) -> RewardClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(
        self, items: Iterable[dict[str, Any]], normalize: bool | None, aggregate: AggregateRule | None
    ) -> Future[Results]:
        from rewardrt.client.wire import Options

        return self._connected().submit(list(items), Options(self._model, normalize, aggregate))

    def _connected(self) -> Connection:
        from rewardrt.client.batches import Connection

        with self._lock:
            if self._connection is None:
                self._connection = Connection(self._access, self._batching)
            return self._connection


_CLIENTS: weakref.WeakSet[RewardClient] = weakref.WeakSet()


def _forked() -> None:
    """In a forked process, drop the parent's thread, connections and lock."""
    for client in list(_CLIENTS):
        client._start()


after_fork(_forked)
