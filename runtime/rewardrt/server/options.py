"""What the operator chose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Overflow = Literal["error", "cut"]


@dataclass(frozen=True)
class ServerOptions:
    """Limits and defaults of one server; `api_key` is empty where there is none."""

    api_key: str = ""
    normalize: bool | None = None  # None: as the bundle says
    overflow: Overflow = "cut"  # what becomes of a text over the limit, unless the request says
    max_queue_tokens: int = 262_144  # accepted and not yet answered, estimated; a single request is taken when idle
    max_body_bytes: int = 8 * 2**20
    max_items: int = 1024  # texts in one request
    max_length: int | None = None  # lowers the models' own limits
    prefix_cache_mb: int = 0  # of each model, for beginnings of texts that are kept between turns of its engine
    open_metrics: bool = False
    log_texts: bool = False
    drain_seconds: float = 30.0
