"""The options of a server, as its operator sets them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Overflow = Literal["error", "cut"]

MIN_TEXT_CHARACTERS = 262_144  # one text may always have this many characters
CHARACTERS_OF_A_TOKEN = 8  # or this many for each token of the model's limit, if that is more


@dataclass(frozen=True)
class ServerOptions:
    """Limits and defaults of one server. Times are in seconds."""

    api_keys: tuple[str, ...] = ()  # each of them gives access; if there are none, no key is needed
    normalize: bool | None = None  # None: the bundle's default
    overflow: Overflow = "cut"  # what happens to a text over the limit, unless the request says it
    max_queue_tokens: int = 262_144  # estimated tokens of accepted, unanswered requests; more may be refused
    max_wait_seconds: float = 120.0  # how long a request may wait that arrived when the queue was full
    max_body_bytes: int = 8 * 2**20
    max_items: int = 1024  # texts in one request
    max_text_characters: int | None = None  # of one text; None: derived from the model's limit
    max_length: int | None = None  # in tokens; lowers the models' own limits
    prefix_cache_mb: int = 0  # MiB for each model's prefix cache, which is kept between turns of its engine
    max_connections: int = 1024
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    write_seconds: float = 30.0  # without any progress
    open_metrics: bool = False
    log_texts: bool = False
    drain_seconds: float = 30.0
    hosts: tuple[str, ...] = ()  # host names of the server, in addition to IP addresses and this machine's own name
    # Whether the operator named the models. If not, rerank and chat-completion requests may use any model name.
    named: bool = False

    def characters(self, max_length: int) -> int:
        """Return how many characters one text may have, for a model with this limit in tokens."""
        return self.max_text_characters or max(MIN_TEXT_CHARACTERS, CHARACTERS_OF_A_TOKEN * max_length)
