"""Which way a decoder's tokens look: a field of its config that transformers does not know of."""

from __future__ import annotations

from typing import Any

_FIELD = "rewardrt_two_way"


def look_both_ways(config: Any) -> None:
    """Say in a decoder's config that its tokens look both ways, as an encoder's do."""
    setattr(config, _FIELD, True)


def looks_both_ways(config: Any) -> bool:
    """Return whether a decoder's tokens look both ways."""
    return bool(getattr(config, _FIELD, False))
