"""RewardRT's own protocol, `POST /v1/reward`: rows as `rewardrt score` reads them, answered as it writes them."""

from __future__ import annotations

from typing import Any

from rewardrt.bundle.spec import AGGREGATE_RULES
from rewardrt.errors import RewardRTError, RowError
from rewardrt.scoring.scored import error_row, fill_row, shortest
from rewardrt.server.call import Call, Dialect, Incoming, Outcome, Scoring
from rewardrt.server.problem import Problem, shortened
from rewardrt.server.schema import BOOLEAN, INTEGER, STRING, array, body, only
from rewardrt.server.vocabulary import check_texts
from rewardrt.text.rows import Row

ROW = {"type": "object", "additionalProperties": True}
BODY = body(
    {"rows": array(ROW)},
    model=STRING,
    normalize=BOOLEAN,
    objectives=BOOLEAN,
    aggregate=only(*AGGREGATE_RULES),
    max_length=INTEGER | {"minimum": 1},
    overflow=only("error", "cut"),
    token_rewards=BOOLEAN,
)
ANSWER = {
    "type": "object",
    "properties": {"model": STRING, "rows": array(ROW), "tokens": INTEGER},
    "required": ["model", "rows", "tokens"],
}


def refusal(status: int, problem: Problem) -> dict[str, Any]:
    """Return the body of a refused request."""
    return {"error": {"message": problem.message, "type": problem.kind, "code": status}}


def prepare(incoming: Incoming) -> Call:
    """Parse the rows; a row that is refused has its error in its place."""
    wanted = incoming.body
    served = incoming.models.choose(wanted.get("model"))
    labels = served.model.spec.output.labels if wanted.get("objectives") else ()
    if wanted.get("objectives") and not labels:
        raise Problem("validation", f"objectives: model {served.name!r} has none; its reward is not made of several")
    if wanted.get("token_rewards") and not served.model.session.has_token_rewards:
        raise Problem("validation", f"token_rewards: the bundle of model {served.name!r} has none")
    check_texts(served, wanted["rows"])
    rows: list[Row | RewardRTError] = []
    for row in wanted["rows"]:
        try:
            rows.append(served.model.answers.parse(row))
        except RowError as error:
            rows.append(RowError(shortened(str(error))))

    def render(outcome: Outcome) -> dict[str, Any]:
        filled: list[dict[str, Any]] = []
        tokens = item = 0
        for row, parsed, scores in zip(wanted["rows"], rows, outcome.rows, strict=True):
            if isinstance(parsed, RewardRTError) or isinstance(scores, RewardRTError):
                filled.append(error_row(row, str(parsed if isinstance(parsed, RewardRTError) else scores)))
            else:
                filled.append(fill_row(row, scores, labels))
                tokens += sum(answer.tokens for answer in scores.answers)
                if wanted.get("token_rewards"):
                    every = [outcome.token_rewards.get(item + index, []) for index in range(len(parsed.items))]
                    pieces = [[[text, shortest(reward)] for text, reward in each] for each in every]
                    filled[-1]["token_rewards"] = pieces[0] if parsed.kind == "single" else pieces
            item += len(parsed.items) if isinstance(parsed, Row) else 0
        return {"model": served.name, "rows": filled, "tokens": tokens}

    return Call(
        served,
        tuple(rows),
        render,
        normalize=wanted.get("normalize"),
        aggregate=wanted.get("aggregate"),
        max_length=None if wanted.get("max_length") is None else int(wanted["max_length"]),
        overflow=wanted.get("overflow"),
        every_token=bool(wanted.get("token_rewards")),
    )


DIALECT = Dialect("rewardrt", refusal)
REWARD = Scoring(DIALECT, BODY, prepare, ANSWER)
