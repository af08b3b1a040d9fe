"""slime's remote reward model, `POST /remote_rm`: `--rm-type remote_rm --rm-url URL`, one sample a request.

The answer is the reward itself, a JSON number. A prompt that is a string is text already: with `--apply-chat-template`
slime has put it through the policy's chat template, up to where the answer begins, and the answer is what the policy
wrote there, its end token included. So prompt and response are scored as they are sent, one after the other. A prompt
that is a list of messages, as slime sends it without that option, goes through the bundle's own template.
"""

from __future__ import annotations

from typing import Any

from rewardrt.server.call import Call, Dialect, Incoming, Outcome, Scoring
from rewardrt.server.problem import Problem
from rewardrt.server.schema import MESSAGES, NUMBER, STRING, body
from rewardrt.server.vocabulary import answered, reward_of, single_rewards, texts

# What the answer should be is for rewards by rules; no reward model reads it.
BODY = body({"prompt": {"anyOf": [STRING, MESSAGES]}, "response": STRING}, label={})


def refusal(status: int, problem: Problem) -> dict[str, Any]:
    """Return the body of a request that is not answered; slime looks at the status alone."""
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


# Its clients wait 120 seconds for an answer, ten times, and the training ends with the tenth failure.
REMOTE_RM = Scoring(Dialect("slime", refusal, patience=90.0), BODY, prepare, NUMBER)
