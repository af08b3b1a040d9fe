"""Fair scheduling: whose texts are scored next, shared among clients, and within a client among its requests.

Every waiting client gets the same number of tokens before one gets more. Of a client's requests, each gets one slice in
turn. So a small request does not wait behind a large one, and a large one always makes progress. This module uses no
threads and no clocks.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from rewardrt.bundle.spec import AggregateRule
from rewardrt.errors import RewardRTError, RowError
from rewardrt.scoring.scored import Scored
from rewardrt.server.options import Overflow
from rewardrt.text.chat_template import TemplateInputs
from rewardrt.text.items import Conversation, Input, Pair, RawText, Steps, TokenIds, as_turns, utf8_bytes
from rewardrt.text.tokens import EncodedText

SLICE_TOKENS = 2048  # tokens that a client gets before the next client
# A text is tokenized when its turn comes. Until then its number of tokens is estimated from its bytes, plus a constant
# for the template.
BYTES_A_TOKEN = 3
LONG_TEXT = 32_768  # characters
TEMPLATE_TOKENS = 16
MESSAGE_CHARACTERS = 48  # characters that each message counts in addition to its text

TokenReward = tuple[str, float]  # a token's piece of the text, and the reward after it


@dataclass(frozen=True)
class Work:
    """What a request wants from an engine. An item that was already refused is its error."""

    items: tuple[Input | RowError, ...]
    normalize: bool | None = None
    aggregate: AggregateRule | None = None
    max_length: int | None = None
    overflow: Overflow = "cut"
    every_token: bool = False

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """The estimated number of tokens of each item."""
        return tuple(map(estimated_tokens, self.items))

    @cached_property
    def long(self) -> tuple[int, ...]:
        """The indices of items that have too many characters to be tokenized on the engine's thread."""
        return tuple(index for index, item in enumerate(self.items) if characters(item) > LONG_TEXT)


@dataclass(eq=False)
class Job:
    """A request's work in the queue, and its results; an engine's thread calls `deliver` once."""

    work: Work
    costs: list[int]  # estimated tokens of each item
    deliver: Callable[[Job], None]
    submitted: float
    client: str = ""
    results: list[Scored | RewardRTError] = field(default_factory=list)
    token_rewards: dict[int, list[TokenReward]] = field(default_factory=dict)
    long: list[int] = field(default_factory=list)  # long items to tokenize before the job's first turn
    encoded: dict[int, EncodedText | RewardRTError] = field(default_factory=dict)  # long items already tokenized
    gone: bool = False  # nobody waits for the results any more, so nothing further is computed
    may_be_refused: bool = False  # the job arrived when the queue was full
    booked: int = 0  # estimated tokens that the job counts in the queue
    left: int = 0  # estimated tokens that no turn has taken yet
    taken: int = 0  # number of items that turns have taken
    queue_seconds: float | None = None
    compute_seconds: float = 0.0
    failure: str = ""
    delivered: bool = False


@dataclass
class Slice:
    """Items of one job that are scored in one turn."""

    job: Job
    start: int
    stop: int


class Turns:
    """The waiting jobs of each client."""

    def __init__(self, slice_tokens: int = SLICE_TOKENS) -> None:
        self._slice_tokens = slice_tokens
        self._clients: OrderedDict[str, deque[Job]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._clients)

    def add(self, job: Job) -> None:
        """Put a job into the queue."""
        self._clients.setdefault(job.client, deque()).append(job)

    def clear(self) -> None:
        """Drop all waiting jobs."""
        self._clients.clear()

    def first(self) -> Job | None:
        """Remove and return the next job as a whole; its client goes behind the others."""
        if not self._clients:
            return None
        client, jobs = self._clients.popitem(last=False)
        job = jobs.popleft()
        if jobs:
            self._clients[client] = jobs
        return job

    def plan(self, tokens: int) -> tuple[list[Slice], list[Job]]:
        """Return the slices to score next, of about `tokens` tokens, and the jobs to drop as nobody waits for them."""
        slices: dict[int, Slice] = {}
        dropped: list[Job] = []
        room = tokens
        while self._clients and room > 0:
            client, jobs = self._clients.popitem(last=False)
            share = min(self._slice_tokens, room)
            room -= share - self._serve(jobs, share, slices, dropped)
            if jobs:
                self._clients[client] = jobs  # this puts the client last
        return list(slices.values()), dropped

    @staticmethod
    def _serve(jobs: deque[Job], share: int, slices: dict[int, Slice], dropped: list[Job]) -> int:
        """Take slices from one client's jobs in turn; return the rest of its share, negative after a long text."""
        while jobs and share > 0:
            job = jobs.popleft()
            if job.gone:
                dropped.append(job)
                continue
            start = job.taken
            while job.taken < len(job.costs) and share > 0:
                share -= job.costs[job.taken]
                job.left -= job.costs[job.taken]
                job.taken += 1
            slices.setdefault(id(job), Slice(job, start, start)).stop = job.taken
            if job.taken < len(job.costs):
                jobs.append(job)
        return share


def characters(item: Input | RowError) -> int:
    """Return the approximate number of characters in an item, without what a template adds."""
    if isinstance(item, RawText):
        return len(item.text)
    return _amount(item, len, MESSAGE_CHARACTERS)


def estimated_tokens(item: Input | RowError) -> int:
    """Return the approximate number of tokens of an item, without tokenizing it."""
    if isinstance(item, RowError):
        return 1
    if isinstance(item, TokenIds):
        return max(1, len(item.ids))
    if isinstance(item, RawText):
        return 1 + utf8_bytes(item.text) // BYTES_A_TOKEN
    if isinstance(item, Pair):
        return estimated_tokens(item.first) + estimated_tokens(item.second)
    return TEMPLATE_TOKENS + _amount(item, utf8_bytes, 0) // BYTES_A_TOKEN


def _amount(item: object, measure: Callable[[str], int], message: int) -> int:
    """Return the sum of the sizes of all strings in an item, plus a constant for each message."""
    if isinstance(item, str):
        return measure(item)
    if isinstance(item, RawText):
        return measure(item.text)
    if isinstance(item, Conversation):
        return _amount((*as_turns(item.prompt), item.answer, *_given(item.inputs)), measure, message)
    if isinstance(item, Pair):
        return _amount(item.first, measure, message) + _amount(item.second, measure, message)
    if isinstance(item, Steps):
        return _amount((*as_turns(item.prompt), *item.steps, *_given(item.inputs)), measure, message)
    if isinstance(item, dict):
        return message + sum(_amount(value, measure, message) for value in item.values())
    if isinstance(item, list | tuple):
        return sum(_amount(value, measure, message) for value in item)
    return 0


def _given(inputs: TemplateInputs) -> tuple[object, ...]:
    return (inputs.tools, inputs.documents, dict(inputs.options))
