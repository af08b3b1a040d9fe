"""text-embeddings-inference: `/predict`, and `/rerank` with `texts`.

A list of two strings is one pair, a prompt and its answer; a list of lists is a batch. Rewards are raw, unless
`raw_scores` is false, which applies a sigmoid. Its clients expect status 429 for a full queue.
"""

from __future__ import annotations

from typing import Any

from rewardrt.server.call import Call, Dialect, Incoming, Outcome, Scoring
from rewardrt.server.models import Served
from rewardrt.server.problem import Kind, Problem
from rewardrt.server.schema import BOOLEAN, INTEGER, NUMBER, STRING, STRINGS, array, body, only
from rewardrt.server.vocabulary import answers, best_first, cut, ranking, reward_of, single_rewards, texts
from rewardrt.text.rows import Row

SHARED: dict[str, Any] = {"truncate": BOOLEAN, "truncation_direction": only("right", "Right"), "raw_scores": BOOLEAN}
PREDICT_BODY = body(
    {"inputs": {"anyOf": [STRING, STRINGS, array({"anyOf": [STRING, STRINGS]})]}},
    # Parameters that huggingface_hub's text_classification sends with the text.
    parameters=body(function_to_apply=only("none", "sigmoid"), top_k=INTEGER | {"minimum": 1}),
    instruction=STRING,  # for pairs only
    **SHARED,
)
RERANK_BODY = body({"query": STRING, "texts": STRINGS}, return_text=BOOLEAN, instruction=STRING, **SHARED)
TYPES = {
    "empty": "Empty",
    "overloaded": "Overloaded",
    "backend": "Backend",
    "draining": "Unhealthy",
    "unauthorized": "Unauthorized",
}


def refusal(status: int, problem: Problem) -> dict[str, Any]:
    """Return the body of a refused request."""
    return {"error": problem.message, "error_type": TYPES.get(problem.kind, "Validation")}


def predict(incoming: Incoming) -> Call:
    """Return each text's or pair's reward as the score of a single label."""
    wanted = incoming.body
    served = incoming.models.choose(None)
    single_rewards(served)
    inputs = wanted["inputs"]
    batch = isinstance(inputs, list) and any(isinstance(each, list) for each in inputs)
    if inputs in ("", []):
        raise Problem("empty", "`inputs` cannot be empty")
    rows = tuple(_row(served, each, wanted.get("instruction")) for each in (inputs if batch else [inputs]))
    squash = _sigmoid(wanted)

    def render(outcome: Outcome) -> Any:
        found = [
            [{"score": reward_of(score, sigmoid=squash), "label": "LABEL_0"} | cut(score)] for score in outcome.scores
        ]
        return found if batch else found[0]

    return Call(served, rows, render, **_limits(wanted))


def _row(served: Served, value: Any, instruction: str | None) -> Row:
    parts = [value] if isinstance(value, str) else value
    if not parts or "" in parts:
        raise Problem("empty", "`inputs` cannot be empty")
    if len(parts) > 2:
        raise Problem("validation", f"inputs: expected a text, or a pair of two; found {len(parts)}")
    if len(parts) == 2:
        return answers(served, [(parts[0], parts[1])], instruction)[0]
    if instruction is not None:
        raise Problem("validation", "instruction: expected it only with pairs; a text is scored as it stands")
    return texts(served, parts, special_tokens=True)[0]


def _sigmoid(wanted: dict[str, Any]) -> bool:
    function = (wanted.get("parameters") or {}).get("function_to_apply")
    return wanted.get("raw_scores") is False or function == "sigmoid"


def _limits(wanted: dict[str, Any]) -> dict[str, Any]:
    truncate = wanted.get("truncate")
    return {} if truncate is None else {"overflow": "cut" if truncate else "error"}


def rerank(incoming: Incoming) -> Call:
    """Rank texts as answers to the query, best first."""
    wanted = incoming.body
    served = incoming.models.choose(None)
    if not wanted["texts"]:
        raise Problem("empty", "`texts` cannot be empty")
    squash, shown = _sigmoid(wanted), bool(wanted.get("return_text"))

    def render(outcome: Outcome) -> Any:
        scores = outcome.scores
        return [
            {"index": index}
            | ({"text": wanted["texts"][index]} if shown else {})
            | {"score": reward_of(scores[index], sigmoid=squash)}
            | cut(scores[index])
            for index in best_first(scores, None)
        ]

    rows = ranking(served, wanted["query"], wanted["texts"], wanted.get("instruction"))
    return Call(served, rows, render, **_limits(wanted))


STATUSES: dict[Kind, int] = {
    "validation": 422,
    "too_many": 422,
    "empty": 400,
    "overloaded": 429,
    "backend": 424,
    "draining": 503,
}
DIALECT = Dialect("tei", refusal, STATUSES)
PREDICTION = array({"type": "object", "properties": {"score": NUMBER, "label": STRING}, "required": ["score", "label"]})
PREDICT = Scoring(DIALECT, PREDICT_BODY, predict, {"anyOf": [PREDICTION, array(PREDICTION)]})
RERANK = Scoring(
    DIALECT, RERANK_BODY, rerank, array({"type": "object", "properties": {"index": INTEGER, "score": NUMBER}})
)
