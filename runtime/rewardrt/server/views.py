"""The answers to GET: health, metrics, the models, the web page, and the documentation of the routes."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewardrt.data.lines import to_line
from rewardrt.server import chat, kserve, metrics, own
from rewardrt.server.call import Dialect
from rewardrt.server.engine import TURN_TOKENS
from rewardrt.server.state import Server

JSON = "application/json"
VERSION = importlib.metadata.version("rewardrt")


@dataclass(frozen=True)
class ViewAnswer:
    """Status, body and headers of one answer."""

    body: bytes
    status: int = 200
    content_type: str | None = JSON
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class View:
    """A path that takes GET. A `guarded` one needs the key; a `quiet` one is not logged."""

    path: str
    answer: Callable[[Server, Mapping[str, str]], ViewAnswer]
    summary: str
    guarded: bool = True
    quiet: bool = False
    dialect: Dialect = own.DIALECT
    statuses: tuple[int, ...] = (200,)
    content_type: str = JSON


def _json(value: Any, status: int = 200) -> ViewAnswer:
    return ViewAnswer(to_line(value), status)


def _health(server: Server, path: Mapping[str, str]) -> ViewAnswer:
    models = [served.describe() for served in server.models.each]
    fault = next((f"{model['name']}: {model['fault']}" for model in models if model["fault"]), None)
    return _json({"status": "ok" if fault is None else fault, "models": models}, 200 if fault is None else 503)


def _ready(server: Server, path: Mapping[str, str]) -> ViewAnswer:
    faults = any(served.engine.fault for served in server.models.each)
    status = "draining" if server.draining else "fault" if faults else "ready"
    return _json({"status": status}, 200 if status == "ready" else 503)


def _ping(server: Server, path: Mapping[str, str]) -> ViewAnswer:
    healthy = all(served.engine.fault is None for served in server.models.each)
    return ViewAnswer(b"", 200 if healthy else 503, content_type=None)


def _info(server: Server, path: Mapping[str, str]) -> ViewAnswer:
    """Answer with text-embeddings-inference's fields for the first model, and RewardRT's for every model."""
    first, options = server.models.each[0], server.options
    return _json(
        {
            "model_id": first.name,
            "model_sha": first.sha256,
            "model_dtype": first.model.precision,
            "model_type": {"classifier": {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}},
            "max_concurrent_requests": max(1, options.max_queue_tokens // first.max_length),
            "max_input_length": first.max_length,
            "max_batch_tokens": TURN_TOKENS,
            "max_batch_requests": None,
            "max_client_batch_size": options.max_items,
            "auto_truncate": options.overflow == "cut",
            "tokenization_workers": 1,
            "version": VERSION,
            "sha": None,
            "docker_label": None,
            "server": "rewardrt",
            "models": [served.describe() for served in server.models.each],
        }
    )


def _models(server: Server, path: Mapping[str, str]) -> ViewAnswer:
    return _json({"object": "list", "data": [_described(server, name) for name in server.models.names]})


def _model(server: Server, path: Mapping[str, str]) -> ViewAnswer:
    return _json(_described(server, path["model"]))


def _described(server: Server, name: str) -> dict[str, Any]:
    served = server.models.choose(name)
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "rewardrt",
        "root": served.name,
        "max_model_len": served.max_length,
    }


def _metrics(server: Server, path: Mapping[str, str]) -> ViewAnswer:
    return ViewAnswer(server.metrics.page(), 200, metrics.CONTENT_TYPE)


def _kserve_live(server: Server, path: Mapping[str, str]) -> ViewAnswer:
    return _json({"live": True})


def _kserve_ready(server: Server, path: Mapping[str, str]) -> ViewAnswer:
    ready = _ready(server, path).status == 200
    return _json({"ready": ready}, 200 if ready else 503)


def _kserve_server(server: Server, path: Mapping[str, str]) -> ViewAnswer:
    return _json({"name": "rewardrt", "version": VERSION, "extensions": ["binary_tensor_data"]})


def _kserve_model(server: Server, path: Mapping[str, str]) -> ViewAnswer:
    served = server.models.choose(path["model"])
    kserve.check_version(path)
    inputs = [
        {"name": name, "datatype": kind, "shape": [-1, -1] if name == "tokens" else [-1]}
        for name, kind in kserve.INPUTS.items()
    ]
    outputs = [{"name": name, "datatype": kind, "shape": [-1, 1]} for name, kind in kserve.OUTPUTS.items()]
    return _json(
        {
            "name": served.name,
            "versions": [kserve.VERSION],
            "platform": "rewardrt",
            "inputs": inputs,
            "outputs": outputs,
        }
    )


def _triton_config(server: Server, path: Mapping[str, str]) -> ViewAnswer:
    """Answer with the model's configuration in Triton's format, whose shapes omit the number of texts."""
    served = server.models.choose(path["model"])
    kserve.check_version(path)
    inputs = [
        {"name": name, "data_type": _triton_type(kind), "dims": [-1 if name == "tokens" else 1], "optional": True}
        for name, kind in kserve.INPUTS.items()
    ]
    outputs = [{"name": name, "data_type": _triton_type(kind), "dims": [1]} for name, kind in kserve.OUTPUTS.items()]
    return _json(
        {
            "name": served.name,
            "backend": "rewardrt",
            "max_batch_size": server.options.max_items,
            "input": inputs,
            "output": outputs,
        }
    )


def _triton_type(kind: str) -> str:
    return "TYPE_STRING" if kind == "BYTES" else f"TYPE_{kind}"


def _kserve_model_ready(server: Server, path: Mapping[str, str]) -> ViewAnswer:
    served = server.models.choose(path["model"])
    kserve.check_version(path)
    ready = served.engine.fault is None and not server.draining
    return _json({"name": served.name, "ready": ready}, 200 if ready else 503)


# The page only sends requests to this server, and the browser enforces that.
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def _page(server: Server, path: Mapping[str, str]) -> ViewAnswer:
    body = Path(__file__).with_name("page.html").read_bytes()
    return ViewAnswer(body, 200, "text/html", (("content-security-policy", PAGE_POLICY),))


KSERVE, SWIFT = kserve.INFER.dialect, chat.SWIFT.dialect
VIEWS: tuple[View, ...] = (
    View("/", _page, "A page for people.", guarded=False, quiet=True, content_type="text/html"),
    View("/health", _health, "Whether the models can score, and what was loaded.", False, True, statuses=(200, 503)),
    View("/ready", _ready, "Whether the server accepts requests.", False, True, statuses=(200, 503)),
    View("/ping", _ping, "As /health, without a body.", False, True, statuses=(200, 503), content_type=""),
    View("/info", _info, "The first model in text-embeddings-inference's format, and every model in RewardRT's."),
    View("/v1/models", _models, "The names that `model` may have."),
    View("/v1/models/{model}", _model, "One model.", statuses=(200, 404)),
    View("/swift/v1/models", _models, "The same for ms-swift's client, below its path.", dialect=SWIFT),
    View("/v2", _kserve_server, "KServe: the server.", dialect=KSERVE),
    View("/v2/health/live", _kserve_live, "KServe.", False, True, KSERVE),
    View("/v2/health/ready", _kserve_ready, "KServe.", False, True, KSERVE, (200, 503)),
    View("/v2/models/{model}", _kserve_model, "KServe: the model's tensors.", dialect=KSERVE, statuses=(200, 404)),
    View("/v2/models/{model}/config", _triton_config, "Triton.", dialect=KSERVE, statuses=(200, 404)),
    View("/v2/models/{model}/ready", _kserve_model_ready, "KServe.", dialect=KSERVE, statuses=(200, 404, 503)),
    View("/v2/models/{model}/versions/{version}", _kserve_model, "KServe.", dialect=KSERVE, statuses=(200, 404)),
    View(
        "/v2/models/{model}/versions/{version}/config", _triton_config, "Triton.", dialect=KSERVE, statuses=(200, 404)
    ),
    View(
        "/v2/models/{model}/versions/{version}/ready",
        _kserve_model_ready,
        "KServe.",
        dialect=KSERVE,
        statuses=(200, 404, 503),
    ),
    View("/metrics", _metrics, "For Prometheus.", quiet=True, content_type="text/plain"),
)
