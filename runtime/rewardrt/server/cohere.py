"""Cohere's and Jina's rerank: `/v1/rerank` and `/v2/rerank` with `model`; vLLM's clients use the same paths.

The answer has the fields of all three.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from rewardrt.server import vocabulary
from rewardrt.server.call import Call, Dialect, Incoming, Outcome, Scoring
from rewardrt.server.problem import Problem
from rewardrt.server.schema import INTEGER, STRING, array, nullable, only

DOCUMENT = {"type": "object", "properties": {"text": STRING}, "required": ["text"], "additionalProperties": True}
RERANK_BODY = vocabulary.RERANK_BODY | {
    "properties": vocabulary.RERANK_BODY["properties"]
    | {
        "documents": array({"anyOf": [STRING, DOCUMENT]}),  # other fields are ignored, and returned
        "rank_fields": nullable({"type": "array", "items": only("text"), "minItems": 1}),
        "max_tokens_per_doc": nullable(INTEGER | {"minimum": 1}),
        "max_chunks_per_doc": nullable(INTEGER | {"minimum": 1}),  # a document is one chunk here
        "truncation": nullable(only(True)),
    }
}


def refusal(status: int, problem: Problem) -> dict[str, Any]:
    """Return the body of a refused request."""
    return {"message": problem.message} | vocabulary.openai_refusal(status, problem)


def rerank(incoming: Incoming) -> Call:
    """Rank documents as answers to the query, best first."""
    wanted = incoming.body
    call = vocabulary.rank(incoming.models.for_hosted_name(wanted.get("model")), wanted)
    limit, least = wanted.get("max_tokens_per_doc"), call.served.model.spec.max_length
    if limit is not None and limit < least:
        # The model cuts the whole text; a document is never cut separately.
        raise Problem("validation", f"max_tokens_per_doc: expected at least the model's limit of {least}, or none")
    version = incoming.route[2:3]  # of /v1/rerank or /v2/rerank

    def render(outcome: Outcome) -> Any:
        meta = {"api_version": {"version": version}, "billed_units": {"search_units": 1}}
        return call.render(outcome) | {"meta": meta}

    return dataclasses.replace(call, render=render)


DIALECT = Dialect("cohere", refusal)
RERANK = Scoring(DIALECT, RERANK_BODY, rerank, vocabulary.RANKED)
