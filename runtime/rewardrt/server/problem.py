"""Why a request is not answered with rewards. Which status and body that is, the protocol says."""

from __future__ import annotations

from typing import Literal

Kind = Literal[
    "unauthorized",
    "validation",  # the body is not one of the protocol
    "empty",  # nothing to score where the protocol wants something
    "unknown_model",
    "too_large",  # over the body limit
    "overloaded",  # the queue is full
    "draining",  # the server is going away
    "backend",  # the graph failed, or gave no number
]


class Problem(Exception):
    """A request that is refused or failed. `retry_after` is in seconds."""

    def __init__(self, kind: Kind, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.kind: Kind = kind
        self.message = message
        self.retry_after = retry_after
