"""Reward models behind a chat-completions API: NVIDIA NIM's, and those of ms-swift's `swift deploy`.

`messages` end with the assistant's answer, and the content of the completion is its reward. NIM writes the text
`reward:1.23`; ms-swift's client and engine expect a regression head's value as the JSON number 1.23. The requests are
the same, so each protocol has its own path: `/v1/chat/completions` is NIM's, and `/swift/v1/chat/completions` is
ms-swift's.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any

from rewardrt.server import vocabulary
from rewardrt.server.call import Call, Dialect, Incoming, Outcome, Scoring
from rewardrt.server.problem import Problem
from rewardrt.server.schema import (
    BOOLEAN,
    INTEGER,
    NUMBER,
    OBJECT,
    STRING,
    STRINGS,
    Schema,
    array,
    body,
    only,
)

# Fields about text generation and the user, which do not affect scores.
NEUTRAL: dict[str, Schema] = {
    "temperature": NUMBER,
    "top_p": NUMBER,
    "top_k": INTEGER,
    "min_p": NUMBER,
    "max_tokens": INTEGER,
    "max_completion_tokens": INTEGER,
    "presence_penalty": NUMBER,
    "frequency_penalty": NUMBER,
    "repetition_penalty": NUMBER,
    "length_penalty": NUMBER,
    "stop": {"anyOf": [STRING, STRINGS]},
    "seed": INTEGER,
    "user": STRING,
    "metadata": OBJECT,
    "service_tier": STRING,
    "safety_identifier": STRING,
    "prompt_cache_key": STRING,
    "parallel_tool_calls": BOOLEAN,
    "n": only(1),
    "stream": only(False),
    "logprobs": only(False),
    "store": only(False),
    "tool_choice": only("auto"),
}
BODY = body(
    {"messages": vocabulary.CHAT["messages"]},
    model=STRING,
    **{name: schema for name, schema in vocabulary.CHAT.items() if name != "messages"},
    **NEUTRAL,
)


def prepare(incoming: Incoming, content: Callable[[float], Any]) -> Call:
    """Score the answer at the end of a conversation; `content` turns the reward into the completion's content."""
    wanted = incoming.body
    served = incoming.models.for_hosted_name(wanted.get("model"))
    vocabulary.single_rewards(served)

    def render(outcome: Outcome) -> dict[str, Any]:
        scores = outcome.scores
        message = {"role": "assistant", "content": content(vocabulary.reward_of(scores[0]))}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        return {
            "id": f"chatcmpl-{secrets.token_hex(16)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": served.name,
            "choices": [choice | vocabulary.cut(scores[0])],
            "usage": vocabulary.usage(scores),
        }

    return Call(served, vocabulary.conversation(served, wanted), render)


def nim(incoming: Incoming) -> Call:
    """Answer as NVIDIA NIM does for a reward model."""
    return prepare(incoming, lambda reward: f"reward:{reward}")


def swift(incoming: Incoming) -> Call:
    """Answer as `swift deploy` does for a reward model."""
    return prepare(incoming, lambda reward: reward)


def swift_refusal(status: int, problem: Problem) -> dict[str, Any]:
    """Return the body of a refused request; ms-swift's client recognises it by `object`, not by the status."""
    return {"object": "error", "message": problem.message}


def _answer(content: Schema) -> Schema:
    message = {"type": "object", "properties": {"role": only("assistant"), "content": content}}
    choice = {"type": "object", "properties": {"index": INTEGER, "message": message}, "required": ["index", "message"]}
    return {
        "type": "object",
        "properties": {
            "id": STRING,
            "object": only("chat.completion"),
            "created": INTEGER,
            "model": STRING,
            "choices": array(choice),
            "usage": vocabulary.USAGE,
        },
        "required": ["id", "object", "created", "model", "choices", "usage"],
    }


# OpenAI's client waits 600 seconds for an answer; after a refusal it retries twice, within a few seconds.
NIM = Scoring(Dialect("nim", vocabulary.openai_refusal, patience=120.0), BODY, nim, _answer(STRING))
SWIFT = Scoring(Dialect("ms-swift", swift_refusal, patience=120.0), BODY, swift, _answer(NUMBER))
