"""The state that all requests of a server share."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rewardrt.server.access import Access
from rewardrt.server.body import BUDGET_BODIES, Budget
from rewardrt.server.connection import Connections
from rewardrt.server.log import Record, log
from rewardrt.server.metrics import Metrics
from rewardrt.server.models import Models
from rewardrt.server.options import ServerOptions

BODY_THREADS = 2


class Server:
    """What all requests share: the models, the options, and whether the server is shutting down."""

    def __init__(self, models: Models, options: ServerOptions, metrics: Metrics, *, local: bool = False) -> None:
        self.models = models
        self.options = options
        self.metrics = metrics
        self.access = Access(options, local=local)
        self.connections = Connections(options, self.refused)
        self.budget = Budget(BUDGET_BODIES * options.max_body_bytes)
        self.threads = ThreadPoolExecutor(BODY_THREADS, "bodies")
        self.reload: Callable[[], Awaitable[list[dict[str, Any]]]] | None = None
        self.draining = False
        self.in_flight = 0  # requests whose body has been read and that are not answered yet
        self.instance = secrets.token_hex(4)

    def refused(self, client: str, status: int, reason: str) -> None:
        """Count and log a connection that sent no complete request."""
        self.finish(Record("-", "-", client, status=status, error=reason), "timeout" if status == 408 else "validation")

    def finish(self, record: Record, kind: str, more: str = "", *, quiet: bool = False) -> None:
        """Count and log one request; `kind` is that of its problem, or "" if it was answered."""
        self.metrics.request(record, kind)
        if not quiet:
            log(record.line() + more)
