"""Why a request is not answered with rewards. Which status and body that is, the protocol says."""

from __future__ import annotations

from typing import Literal

Kind = Literal[
    "unauthorized",
    "forbidden",  # another site's page asks, or a name that is not this server's
    "not_found",
    "method",  # a path that takes another method
    "media_type",  # the body is of another kind than is understood
    "timeout",  # the body did not come in time
    "validation",  # the body is not one of the protocol
    "too_many",  # more texts than a request may have: fewer at a time will do
    "empty",  # nothing to score where the protocol wants something
    "unknown_model",
    "too_large",  # over the body limit
    "overloaded",  # the queue is full, or the memory for bodies
    "draining",  # the server is going away
    "backend",  # the graph failed, or gave no number
]
MESSAGE_CHARACTERS = 1000


class Problem(Exception):
    """A request that is refused or failed. `retry_after` is in seconds."""

    def __init__(self, kind: Kind, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.kind: Kind = kind
        self.message = shortened(message)
        self.retry_after = retry_after


def too_many(found: int, most: int, what: str = "texts in one request") -> Problem:
    """Return why a request with so many texts is not answered; a client may split it."""
    return Problem("too_many", f"{found} {what}; expected at most {most}")


def shortened(message: str) -> str:
    """Return a message of bounded length: what it quotes is the client's."""
    return message if len(message) <= MESSAGE_CHARACTERS else message[: MESSAGE_CHARACTERS - 1] + "…"
