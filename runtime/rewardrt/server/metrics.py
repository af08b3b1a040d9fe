"""The metrics that Prometheus reads at `/metrics`."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from rewardrt.server.connection import Connections
from rewardrt.server.engine import Turn
from rewardrt.server.log import Record
from rewardrt.server.models import Models

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180)
_LAG = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.3, 1, 5)
_TOKENS = (16, 64, 256, 1024, 4096, 8192, 16384, 32768)


class Metrics:
    """The metrics of one server. Every method may be called from any thread."""

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
        self._failed = Counter("rewardrt_failed_texts", "Texts that got no reward.", ("model",), registry=self.registry)
        self._reloads = Counter("rewardrt_reloads", "Bundles loaded anew, or not.", ("result",), registry=self.registry)
        self._lag = Histogram(
            "rewardrt_loop_lag_seconds",
            "How much later than planned the event loop woke up, looked at 50 times a second.",
            buckets=_LAG,
            registry=self.registry,
        )
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

    def watch(self, models: Models, connections: Connections) -> None:
        """Also report the queues of these models, and the number of connections, at the time of each query."""
        self.registry.register(_State(models, connections))

    def turn(self, model: str, turn: Turn) -> None:
        """Count one turn of an engine."""
        self._texts.labels(model).inc(turn.texts)
        self._failed.labels(model).inc(turn.failed)
        self._tokens.labels(model).inc(turn.tokens)
        self._computed.labels(model).inc(turn.computed)
        self._truncated.labels(model).inc(turn.truncated)
        self._turn.labels(model).observe(turn.tokens)
        self._inference.labels(model).observe(turn.seconds)
        for seconds in turn.waits:
            self._wait.labels(model).observe(seconds)

    def request(self, record: Record, kind: str) -> None:
        """Count one request; `kind` is that of its problem, or "" if it was answered."""
        self._requests.labels(record.protocol, record.status).inc()
        self._seconds.labels(record.protocol).observe(record.seconds)
        if kind == "gone":
            self._gone.inc()
        elif kind:
            self._errors.labels(record.protocol, kind).inc()

    def lag(self, seconds: float) -> None:
        """Record how late the event loop was, in seconds."""
        self._lag.observe(seconds)

    def reload(self, result: str) -> None:
        """Count one reload of a bundle by its result."""
        self._reloads.labels(result).inc()

    def page(self) -> bytes:
        """Return the metrics in Prometheus's text format."""
        return generate_latest(self.registry)


class _State:
    """The state of queues and connections at the time of a query."""

    def __init__(self, models: Models, connections: Connections) -> None:
        self._models = models
        self._connections = connections

    def collect(self) -> Iterator[Metric]:
        waiting = GaugeMetricFamily(
            "rewardrt_queue_tokens", "Tokens accepted and not answered, estimated.", labels=("model",)
        )
        healthy = GaugeMetricFamily("rewardrt_healthy", "1 where the model can score.", labels=("model",))
        for served in self._models.each:
            waiting.add_metric((served.name,), served.engine.waiting_tokens)
            healthy.add_metric((served.name,), float(served.engine.fault is None))
        yield from (waiting, healthy)
        yield GaugeMetricFamily("rewardrt_connections", "Open connections.", value=len(self._connections.open))
        yield CounterMetricFamily(
            "rewardrt_connections_closed_for_others",
            "Connections that were closed because there were too many.",
            value=self._connections.closed_for_others,
        )
