"""The one internal call: every protocol turns its body into a Call, and the Outcome into its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rewardrt.bundle.spec import AggregateRule
from rewardrt.errors import InferenceError, RewardRTError, RowError
from rewardrt.scoring.answers import flatten, regroup
from rewardrt.scoring.scored import Scored, ScoredRow
from rewardrt.server.models import Models, Served
from rewardrt.server.options import Overflow, ServerOptions
from rewardrt.server.problem import Kind, Problem, shortened, too_many
from rewardrt.server.schema import Schema
from rewardrt.server.turns import Job, TokenReward, Work, characters
from rewardrt.text.items import Input
from rewardrt.text.rows import Row

# Token rewards make long answers, so a request for them may have this many times fewer texts.
TOKEN_REWARDS = 16


@dataclass(frozen=True)
class Outcome:
    """The result of a call: for each row the scores of its answers, or its error."""

    rows: tuple[ScoredRow | RewardRTError, ...]
    token_rewards: Mapping[int, list[TokenReward]]  # by item

    @property
    def scores(self) -> list[Scored]:
        """The scores of all rows in order; raises Problem for the first row that has none."""
        found: list[Scored] = []
        for index, row in enumerate(self.rows):
            if isinstance(row, RewardRTError):
                kind: Kind = "backend" if isinstance(row, InferenceError) else "validation"
                raise Problem(kind, f"item {index}: {row}")
            found += row.answers
        return found


@dataclass(frozen=True)
class Reply:
    """An answer whose body is not simply a value as JSON: the bytes, their content type, and headers."""

    body: bytes
    content_type: str
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Call:
    """What a request wants scored, and how its answer is written. A row that was already refused is its error."""

    served: Served
    rows: tuple[Row | RewardRTError, ...]
    render: Callable[[Outcome], Any]
    normalize: bool | None = None
    aggregate: AggregateRule | None = None
    max_length: int | None = None
    overflow: Overflow | None = None
    every_token: bool = False

    def work(self, options: ServerOptions) -> Work:
        """Return the items of all rows with their options; the server's defaults apply if the request says nothing."""
        items = [self._bounded(item, options) for item in flatten(self.rows)]
        if len(items) > options.max_items:
            raise too_many(len(items), options.max_items)
        if self.every_token and len(items) > options.max_items // TOKEN_REWARDS:
            most = max(1, options.max_items // TOKEN_REWARDS)
            raise too_many(len(items), most, "texts with rewards of tokens")
        limits = [limit for limit in (self.max_length, options.max_length) if limit is not None]
        normalize = options.normalize if self.normalize is None else self.normalize
        try:
            self.served.model.answers.check_options(normalize=normalize, aggregate=self.aggregate)
        except RewardRTError as error:
            raise Problem("validation", str(error)) from error
        return Work(
            tuple(items),
            normalize=normalize,
            aggregate=self.aggregate,
            max_length=min(limits, default=None),
            overflow=self.overflow or options.overflow,
            every_token=self.every_token,
        )

    def _bounded(self, item: Input, options: ServerOptions) -> Input | RowError:
        """Return the item, or an error if it has so many characters that reading it would take too long."""
        limit, found = options.characters(self.served.model.spec.max_length), characters(item)
        if found <= limit:
            return item
        return RowError(f"the text has {found} characters; expected at most {limit}: shorten it")

    def outcome(self, job: Job | None) -> Outcome:
        """Put the engine's results back into rows; `job` is None if there was nothing to score."""
        rows = regroup(self.rows, job.results if job is not None else ())
        short = [type(row)(shortened(str(row))) if isinstance(row, RewardRTError) else row for row in rows]
        return Outcome(tuple(short), job.token_rewards if job is not None else {})


@dataclass(frozen=True)
class Incoming:
    """One request: its decoded body, and what else a protocol reads."""

    body: Any
    models: Models
    path: Mapping[str, str] = field(default_factory=dict)
    route: str = ""
    binary: bytes = b""  # the bytes after the JSON, in KServe's protocol
    options: ServerOptions = ServerOptions()


@dataclass(frozen=True)
class Dialect:
    """How a protocol refuses requests: the body, and the status of each kind of problem if it is not the common one.

    `patience` is the time in seconds for which its clients should wait for a full queue rather than be refused.
    """

    name: str
    body: Callable[[int, Problem], Any]
    statuses: Mapping[Kind, int] = field(default_factory=dict)
    patience: float = 30.0

    def status(self, problem: Problem) -> int:
        """Return the HTTP status of a problem."""
        return self.statuses.get(problem.kind, COMMON_STATUS[problem.kind])


@dataclass(frozen=True)
class Scoring:
    """One operation of a route: the body it takes, and how the body becomes a Call."""

    dialect: Dialect
    body: Schema
    prepare: Callable[[Incoming], Call]
    answer: Schema  # schema of the JSON answer with status 200


COMMON_STATUS: dict[Kind, int] = {
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "method": 405,
    "timeout": 408,
    "media_type": 415,
    "validation": 400,
    "too_many": 400,
    "empty": 400,
    "unknown_model": 404,
    "too_large": 413,
    "overloaded": 503,
    "draining": 503,
    "backend": 500,
}
