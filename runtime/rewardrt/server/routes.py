"""Which route does what: the table that the server, its OpenAPI document and the tests go by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rewardrt.server import openrlhf, own
from rewardrt.server.call import Scoring


@dataclass(frozen=True)
class ScoringRoute:
    """A path that takes POST, and what it does; `pick` chooses by the body where protocols share a path."""

    path: str
    scorings: tuple[Scoring, ...]
    summary: str
    pick: Callable[[Any], int] = lambda body: 0

    def choose(self, body: Any) -> Scoring:
        """Return what this body asks for."""
        return self.scorings[self.pick(body) if isinstance(body, dict) else 0]


ROUTES: tuple[ScoringRoute, ...] = (
    ScoringRoute("/v1/reward", (own.REWARD,), "Score rows as `rewardrt score` does."),
    ScoringRoute("/get_reward", (openrlhf.GET_REWARD,), "OpenRLHF's remote reward model."),
)
