"""The address of a server, as users write it."""

from __future__ import annotations

from rewardrt.errors import ServerError

SCHEMES = ("http://", "https://", "unix:")


def address(url: str) -> str:
    """Return a server's address without white space and a final slash, or raise ServerError."""
    text = url.strip().rstrip("/")
    if text.startswith("unix:") and len(text) > len("unix:"):
        return text
    scheme, found, rest = text.partition("://")
    if scheme not in ("http", "https") or not found or not rest or rest.startswith("/") or "?" in rest or "#" in rest:
        raise ServerError(
            f"{text!r}: expected a server's address, such as http://127.0.0.1:8000 or unix:/run/reward.sock"
        )
    return text
