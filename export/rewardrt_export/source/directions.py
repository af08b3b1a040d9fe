"""Which way a decoder's tokens look: a field of its config that transformers does not know of."""

from __future__ import annotations

from typing import Any

_FIELD = "rewardrt_two_way"


def set_two_way(config: Any) -> None:
    """Say in a decoder's config that its tokens look both ways, as an encoder's do."""
    setattr(config, _FIELD, True)


def is_two_way(config: Any) -> bool:
    """Return whether a decoder's tokens look both ways."""
    return bool(getattr(config, _FIELD, False))
