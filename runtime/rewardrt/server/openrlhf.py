"""OpenRLHF's remote reward model, `POST /get_reward`, from version 0.4 on.

Its trainer retries after every status but 2xx, five times, and then dies. Each text is scored as sent. If the trainer
has several URLs, a server may get empty lists and has to answer them.
"""

from __future__ import annotations

from typing import Any

from rewardrt.server.call import Call, Dialect, Incoming, Outcome, Scoring
from rewardrt.server.problem import Problem
from rewardrt.server.schema import NUMBER, STRINGS, array, body
from rewardrt.server.vocabulary import reward_of, single_rewards, texts

BODY = body(
    {"query": STRINGS},
    prompts=array({}),  # the prompts within the texts, and the expected answers; neither is scored
    labels=array({}),
)
ANSWER = {
    "type": "object",
    "properties": {"rewards": array(NUMBER), "scores": array(NUMBER), "extra_logs": {"type": "object"}},
    "required": ["rewards", "scores", "extra_logs"],
}


def refusal(status: int, problem: Problem) -> dict[str, Any]:
    """Return the body of a refused request."""
    return {"error": problem.message}


def prepare(incoming: Incoming) -> Call:
    """Score every text of `query` as sent."""
    served = incoming.models.choose(None)
    single_rewards(served)

    def render(outcome: Outcome) -> dict[str, Any]:
        scores = outcome.scores
        rewards = [reward_of(score) for score in scores]
        logs = {"dummy_scores": rewards, "truncated": [score.truncated for score in scores]}
        return {"rewards": rewards, "scores": rewards, "extra_logs": logs}

    return Call(served, texts(served, incoming.body["query"]), render)


# Its clients wait 180 seconds for an answer, but give up after five refusals within 5 seconds.
GET_REWARD = Scoring(Dialect("openrlhf", refusal, patience=120.0), BODY, prepare, ANSWER)
