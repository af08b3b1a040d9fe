"""LLaMA-Factory's scores, `POST /v1/score/evaluation`, as its API serves them and its PPO trainer reads them.

Texts are scored as sent, without special tokens added, and cut on the right at `max_length` tokens. The trainer
(`reward_model_type: api`) reads `scores` from every answer, whatever its status, and has no time limit. So a refusal
ends the training with a KeyError, and requests should rather wait.
"""

from __future__ import annotations

import math
import secrets
from typing import Any

from rewardrt.server.call import Call, Dialect, Incoming, Outcome, Scoring
from rewardrt.server.problem import Problem
from rewardrt.server.schema import INTEGER, NUMBER, STRING, STRINGS, array, body, only
from rewardrt.server.vocabulary import check_texts, reward_of, single_rewards, texts

TRAINERS_NAME = "model"  # the model name that the trainer always sends
BODY = body({"model": STRING, "messages": STRINGS}, max_length=INTEGER | {"minimum": 1})
ANSWER = {
    "type": "object",
    "properties": {"id": STRING, "object": only("score.evaluation"), "model": STRING, "scores": array(NUMBER)},
    "required": ["id", "object", "model", "scores"],
}


def refusal(status: int, problem: Problem) -> dict[str, Any]:
    """Return the body of a refused request, in FastAPI's format."""
    return {"detail": problem.message}


def prepare(incoming: Incoming) -> Call:
    """Score every text as sent."""
    wanted, models = incoming.body, incoming.models
    unnamed = wanted["model"] == TRAINERS_NAME and TRAINERS_NAME not in models.names
    served = models.for_hosted_name(None if unnamed else wanted["model"])
    single_rewards(served)
    check_texts(served, wanted["messages"])
    if not wanted["messages"]:
        raise Problem("empty", "Invalid request: messages: expected at least one text, found none")
    limit = wanted.get("max_length")

    def render(outcome: Outcome) -> dict[str, Any]:
        return {
            "id": f"scoreval-{secrets.token_hex(16)}",
            "object": "score.evaluation",
            "model": served.name,
            "scores": [reward_of(score) for score in outcome.scores],
        }

    rows = texts(served, wanted["messages"])
    return Call(
        served,
        rows,
        render,
        max_length=None if limit is None else int(limit),
        overflow=None if limit is None else "cut",
    )


# Only the operator's limit applies to how long a request waits for a full queue.
DIALECT = Dialect("llamafactory", refusal, {"validation": 422, "too_many": 422}, patience=math.inf)
SCORE_EVALUATION = Scoring(DIALECT, BODY, prepare, ANSWER)
