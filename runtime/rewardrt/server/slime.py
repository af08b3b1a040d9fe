"""slime's remote reward model, `POST /remote_rm`: `--rm-type remote_rm --rm-url URL`, one sample per request.

The answer is the reward itself, a JSON number. A string prompt is a rendered text: with `--apply-chat-template`, slime
has applied the policy's chat template up to where the answer begins, and the response is what the policy wrote there,
including its end token. So prompt and response are joined and scored as sent. Without that option slime sends a list of
messages, which goes through the bundle's own template.
"""

from __future__ import annotations

from typing import Any

from rewardrt.server.call import Call, Dialect, Incoming, Outcome, Scoring
from rewardrt.server.problem import Problem
from rewardrt.server.schema import MESSAGES, NUMBER, STRING, body
from rewardrt.server.vocabulary import answered, reward_of, single_rewards, texts

# `label`, the expected answer, is for rule-based rewards; reward models do not read it.
BODY = body({"prompt": {"anyOf": [STRING, MESSAGES]}, "response": STRING}, label={})


def refusal(status: int, problem: Problem) -> dict[str, Any]:
    """Return the body of a refused request; slime only reads the status."""
    return {"error": problem.message}


def prepare(incoming: Incoming) -> Call:
    """Score the answer of one sample."""
    prompt, response = incoming.body["prompt"], incoming.body["response"]
    served = incoming.models.choose(None)
    single_rewards(served)
    rows = texts(served, [prompt + response]) if isinstance(prompt, str) else answered(served, prompt, response)

    def render(outcome: Outcome) -> float:
        return reward_of(outcome.scores[0])

    return Call(served, rows, render)


# Its clients wait 120 seconds for an answer and try ten times; after the tenth failure the training ends.
REMOTE_RM = Scoring(Dialect("slime", refusal, patience=90.0), BODY, prepare, NUMBER)
