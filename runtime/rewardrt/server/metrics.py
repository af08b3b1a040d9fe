"""What Prometheus reads at `/metrics`, and the one line that the log has for a request."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from rewardrt.server.engine import Turn
from rewardrt.server.models import Models

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180)
_TOKENS = (16, 64, 256, 1024, 4096, 8192, 16384, 32768)


@dataclass
class Record:
    """One request, for its line in the log."""

    method: str
    path: str
    client: str
    protocol: str = "-"
    model: str = "-"
    status: int = 0
    texts: int = 0
    tokens: int = 0
    truncated: int = 0
    queue_seconds: float = 0.0
    compute_seconds: float = 0.0
    seconds: float = 0.0
    error: str = ""

    def line(self) -> str:
        """Return the line; it holds nothing of what was scored, but the error may name a field."""
        error = f" error={self.error!r}" if self.error else ""
        return (
            f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {self.method} {self.path} {self.status} "
            f"protocol={self.protocol} model={self.model} texts={self.texts} tokens={self.tokens} "
            f"truncated={self.truncated} queue_ms={self.queue_seconds * 1e3:.1f} "
            f"compute_ms={self.compute_seconds * 1e3:.1f} total_ms={self.seconds * 1e3:.1f} client={self.client}{error}"
        )


class Metrics:
    """The counters of one server. Every method may be called from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self._requests = Counter(
            "rewardrt_requests",
            "Requests answered, by protocol and HTTP status.",
            ("protocol", "status"),
            registry=self.registry,
        )
        self._errors = Counter(
            "rewardrt_errors", "Requests refused or failed.", ("protocol", "kind"), registry=self.registry
        )
        self._seconds = Histogram(
            "rewardrt_request_seconds",
            "From the first byte to the answer.",
            ("protocol",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._gone = Counter("rewardrt_clients_gone", "Requests whose client did not wait.", registry=self.registry)
        self._texts = Counter("rewardrt_texts", "Texts scored.", ("model",), registry=self.registry)
        self._tokens = Counter("rewardrt_tokens", "Tokens scored.", ("model",), registry=self.registry)
        self._computed = Counter(
            "rewardrt_computed_tokens",
            "Tokens that the graph computed; the others of rewardrt_tokens were shared.",
            ("model",),
            registry=self.registry,
        )
        self._truncated = Counter(
            "rewardrt_truncated_texts", "Texts that were cut.", ("model",), registry=self.registry
        )
        self._wait = Histogram(
            "rewardrt_queue_seconds",
            "Wait of a request in the queue.",
            ("model",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._turn = Histogram(
            "rewardrt_batch_tokens", "Tokens scored together.", ("model",), buckets=_TOKENS, registry=self.registry
        )
        self._inference = Histogram(
            "rewardrt_inference_seconds",
            "Time of one turn of the engine.",
            ("model",),
            buckets=_SECONDS,
            registry=self.registry,
        )

    def watch(self, models: Models) -> None:
        """Read the queues of these models whenever the metrics are asked for."""
        self.registry.register(_Queues(models))

    def turn(self, model: str, turn: Turn) -> None:
        """Count one turn of an engine."""
        self._texts.labels(model).inc(turn.texts)
        self._tokens.labels(model).inc(turn.tokens)
        self._computed.labels(model).inc(turn.computed)
        self._truncated.labels(model).inc(turn.truncated)
        self._turn.labels(model).observe(turn.tokens)
        self._inference.labels(model).observe(turn.seconds)
        for seconds in turn.waits:
            self._wait.labels(model).observe(seconds)

    def request(self, record: Record, kind: str) -> None:
        """Count one request; `kind` is that of its problem, or "" where it was answered."""
        self._requests.labels(record.protocol, record.status).inc()
        self._seconds.labels(record.protocol).observe(record.seconds)
        if kind == "gone":
            self._gone.inc()
        elif kind:
            self._errors.labels(record.protocol, kind).inc()

    def page(self) -> bytes:
        """Return what Prometheus reads."""
        return generate_latest(self.registry)


class _Queues:
    """The queues' state at the moment of asking."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        waiting = GaugeMetricFamily(
            "rewardrt_queue_tokens", "Tokens accepted and not answered, estimated.", labels=("model",)
        )
        healthy = GaugeMetricFamily("rewardrt_healthy", "1 where the model can score.", labels=("model",))
        for served in self._models.each:
            waiting.add_metric((served.name,), served.engine.waiting_tokens)
            healthy.add_metric((served.name,), float(served.engine.fault is None))
        yield from (waiting, healthy)


def log(line: str) -> None:
    """Write one line to standard error."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201
