"""The direction of attention in a decoder, stored in a config field that transformers does not know."""

from __future__ import annotations

from typing import Any

_FIELD = "rewardrt_two_way"


def set_two_way(config: Any) -> None:
    """Record in a decoder's config that its tokens attend in both directions, as an encoder's do."""
    setattr(config, _FIELD, True)


def is_two_way(config: Any) -> bool:
    """Return whether a decoder's tokens attend in both directions."""
    return bool(getattr(config, _FIELD, False))
