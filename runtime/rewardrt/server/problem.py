"""Why a request gets no rewards. Each protocol decides on the HTTP status and the body of the answer."""

from __future__ import annotations

from typing import Literal

Kind = Literal[
    "unauthorized",
    "forbidden",  # sent by another site's page, or with a Host that is not this server's name
    "not_found",
    "method",  # the path exists, but takes another method
    "media_type",  # the body's content type or encoding is not supported
    "timeout",  # the body did not arrive in time
    "validation",  # the body does not follow the protocol
    "too_many",  # more texts than one request may have; the client can split it
    "empty",  # nothing to score, in a protocol that requires something
    "unknown_model",
    "too_large",  # the body is over its size limit
    "overloaded",  # the queue, or the memory for bodies, is full
    "draining",  # the server is shutting down
    "backend",  # the graph failed, or its reward is not a finite number
]
MESSAGE_CHARACTERS = 1000


class Problem(Exception):
    """A request that was refused or failed. `retry_after` is in seconds."""

    def __init__(self, kind: Kind, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.kind: Kind = kind
        self.message = shortened(message)
        self.retry_after = retry_after


def too_many(found: int, most: int, what: str = "texts in one request") -> Problem:
    """Return the problem of a request with too many texts; the client may split it."""
    return Problem("too_many", f"{found} {what}; expected at most {most}")


def shortened(message: str) -> str:
    """Return a message of bounded length, because it may quote the client's text."""
    return message if len(message) <= MESSAGE_CHARACTERS else message[: MESSAGE_CHARACTERS - 1] + "…"
