"""SGLang's scoring routes: `/classify` with `text`, `/v1/rerank` without `model`, and `/v1/embeddings` for verl.

As in SGLang, texts get the tokenizer's special tokens. An embedding has one number, the reward.
"""

from __future__ import annotations

import base64
import struct
from typing import Any

from rewardrt.server.call import Call, Dialect, Incoming, Outcome, Scoring
from rewardrt.server.problem import Problem
from rewardrt.server.schema import BOOLEAN, INTEGER, NUMBER, STRING, STRINGS, array, body, only
from rewardrt.server.vocabulary import INPUT, best_first, cut, ranking, reward_of, single_rewards, text_rows, usage
from rewardrt.server.vocabulary import texts as rows_of

CLASSIFY_BODY = body({"text": {"anyOf": [STRING, STRINGS]}}, model=STRING, rid=STRING)
RERANK_BODY = body(
    {"query": STRING, "documents": STRINGS},
    instruct=STRING,
    top_n=INTEGER | {"minimum": 1},
    return_documents=BOOLEAN,
    rid=STRING,
)
EMBEDDINGS_BODY = body(
    {"input": INPUT},
    model=STRING,
    encoding_format=only("float", "base64"),
    user=STRING,
    rid=STRING,
    priority=INTEGER,
)


def refusal(status: int, problem: Problem) -> dict[str, Any]:
    """Return the body of a refused request."""
    return {"error": {"message": problem.message, "type": "BadRequestError", "param": None, "code": status}}


def classify(incoming: Incoming) -> Call:
    """Return each text's reward as an embedding of one number; a single text gets an object, not a list."""
    wanted = incoming.body
    served = incoming.models.choose(wanted.get("model"))
    single_rewards(served)
    alone = isinstance(wanted["text"], str)
    values = [wanted["text"]] if alone else wanted["text"]

    def render(outcome: Outcome) -> Any:
        found = [
            {"embedding": [reward_of(score)], "meta_info": {"prompt_tokens": score.tokens} | cut(score)}
            for score in outcome.scores
        ]
        return found[0] if alone else found

    return Call(served, rows_of(served, values, special_tokens=True), render)


def rerank(incoming: Incoming) -> Call:
    """Rank documents as answers to the query, best first."""
    wanted = incoming.body
    served = incoming.models.choose(None)
    documents = wanted["documents"]
    shown = wanted.get("return_documents") is not False

    def render(outcome: Outcome) -> Any:
        scores = outcome.scores
        return [
            {"score": reward_of(scores[index])}
            | ({"document": documents[index]} if shown else {})
            | {"index": index}
            | cut(scores[index])
            for index in best_first(scores, wanted.get("top_n"))
        ]

    return Call(served, ranking(served, wanted["query"], documents, wanted.get("instruct")), render)


def embeddings(incoming: Incoming) -> Call:
    """Return each text's reward as an embedding of one number."""
    wanted = incoming.body
    served = incoming.models.choose(wanted.get("model"))
    packed = wanted.get("encoding_format") == "base64"

    def render(outcome: Outcome) -> Any:
        scores = outcome.scores
        data = []
        for index, score in enumerate(scores):
            value: Any = [reward_of(score)]
            if packed:
                value = base64.b64encode(struct.pack("<f", score.reward)).decode()
            data.append({"object": "embedding", "embedding": value, "index": index} | cut(score))
        return {"object": "list", "data": data, "model": served.name, "usage": usage(scores)}

    return Call(served, text_rows(served, wanted["input"], special_tokens=True), render)


DIALECT = Dialect("sglang", refusal)
EMBEDDED = {"type": "object", "properties": {"embedding": array(NUMBER), "meta_info": {"type": "object"}}}
CLASSIFY = Scoring(DIALECT, CLASSIFY_BODY, classify, {"anyOf": [EMBEDDED, array(EMBEDDED)]})
RERANK = Scoring(
    DIALECT, RERANK_BODY, rerank, array({"type": "object", "properties": {"score": NUMBER, "index": INTEGER}})
)
EMBEDDINGS = Scoring(
    DIALECT,
    EMBEDDINGS_BODY,
    embeddings,
    {
        "type": "object",
        "properties": {"object": only("list"), "data": array({"type": "object"}), "model": STRING},
        "required": ["object", "data", "model", "usage"],
    },
)
