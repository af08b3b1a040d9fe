"""What the operator chose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Overflow = Literal["error", "cut"]

MIN_TEXT_CHARACTERS = 262_144  # what one text may have, whatever the model's limit
CHARACTERS_OF_A_TOKEN = 8  # and more for models of longer texts: so many times their limit


@dataclass(frozen=True)
class ServerOptions:
    """Limits and defaults of one server. Times are in seconds."""

    api_keys: tuple[str, ...] = ()  # any of them opens what is guarded; none: nothing is guarded
    normalize: bool | None = None  # None: as the bundle says
    overflow: Overflow = "cut"  # what becomes of a text over the limit, unless the request says
    max_queue_tokens: int = 262_144  # accepted and not yet answered, estimated: what is over it may be refused
    max_wait_seconds: float = 120.0  # at most so long a request waits that came when the queue was full
    max_body_bytes: int = 8 * 2**20
    max_items: int = 1024  # texts in one request
    max_text_characters: int | None = None  # of one text; None: by the model's limit
    max_length: int | None = None  # lowers the models' own limits
    prefix_cache_mb: int = 0  # of each model, for beginnings of texts that are kept between turns of its engine
    max_connections: int = 1024
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    write_seconds: float = 30.0  # without any progress
    open_metrics: bool = False
    log_texts: bool = False
    drain_seconds: float = 30.0
    hosts: tuple[str, ...] = ()  # names under which the server is reached, beside addresses and this machine's own
    # Whether the operator named the models; else a hosted model's name will do for reranking and chat completions.
    named: bool = False

    def characters(self, max_length: int) -> int:
        """Return how many characters one text may have for a model of this limit in tokens."""
        return self.max_text_characters or max(MIN_TEXT_CHARACTERS, CHARACTERS_OF_A_TOKEN * max_length)
