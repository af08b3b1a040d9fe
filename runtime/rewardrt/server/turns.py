"""Whose texts are scored next: shares by client, and of a client's share by request.

Each client that waits gets as many tokens as any other before one gets more, and each of a client's requests a slice in
its turn: a small request is not behind a large one, and a large one is never left out. No threads and no clocks here.
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

SLICE_TOKENS = 2048  # what a client gets before the next one
# A text's tokens are counted when its turn comes; until then it is taken for so many bytes a token, and some more for
# the template.
BYTES_A_TOKEN = 3
LONG_TEXT = 32_768  # characters
TEMPLATE_TOKENS = 16
MESSAGE_CHARACTERS = 48  # what a message costs beside its text

TokenReward = tuple[str, float]  # the part of the text that a token ends, and the reward after it


@dataclass(frozen=True)
class Work:
    """What a request wants of an engine. An item that was refused already is its error."""

    items: tuple[Input | RowError, ...]
    normalize: bool | None = None
    aggregate: AggregateRule | None = None
    max_length: int | None = None
    overflow: Overflow = "cut"
    every_token: bool = False

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """About how many tokens each item has."""
        return tuple(map(estimated_tokens, self.items))

    @cached_property
    def long(self) -> tuple[int, ...]:
        """The items, by index, that have too many characters to be tokenized on the engine's thread."""
        return tuple(index for index, item in enumerate(self.items) if characters(item) > LONG_TEXT)


@dataclass(eq=False)
class Job:
    """A request's work in the queue, and what became of it; `deliver` is called once, by an engine's thread."""

    work: Work
    costs: list[int]  # estimated tokens of each item
    deliver: Callable[[Job], None]
    submitted: float
    client: str = ""
    results: list[Scored | RewardRTError] = field(default_factory=list)
    token_rewards: dict[int, list[TokenReward]] = field(default_factory=dict)
    long: list[int] = field(default_factory=list)  # items that are tokenized before the job's first turn
    encoded: dict[int, EncodedText | RewardRTError] = field(default_factory=dict)  # what was
    gone: bool = False  # set when nobody waits for it any more: what is not computed yet never is
    may_be_refused: bool = False  # it came when the queue was full
    booked: int = 0  # what it counts for in the queue
    left: int = 0  # estimated tokens that no turn has taken
    taken: int = 0  # items that a turn has taken
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
    """The jobs that wait, by client."""

    def __init__(self, slice_tokens: int = SLICE_TOKENS) -> None:
        self._slice_tokens = slice_tokens
        self._clients: OrderedDict[str, deque[Job]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._clients)

    def add(self, job: Job) -> None:
        """Let a job wait for its first turn."""
        self._clients.setdefault(job.client, deque()).append(job)

    def clear(self) -> None:
        """Forget all that waits."""
        self._clients.clear()

    def first(self) -> Job | None:
        """Take the job whose turn it is out of what waits, whole; its client is then behind the others."""
        if not self._clients:
            return None
        client, jobs = self._clients.popitem(last=False)
        job = jobs.popleft()
        if jobs:
            self._clients[client] = jobs
        return job

    def plan(self, tokens: int) -> tuple[list[Slice], list[Job]]:
        """Return what is scored next, of about so many tokens; and jobs that nobody waits for, which are dropped."""
        slices: dict[int, Slice] = {}
        dropped: list[Job] = []
        room = tokens
        while self._clients and room > 0:
            client, jobs = self._clients.popitem(last=False)
            share = min(self._slice_tokens, room)
            room -= share - self._serve(jobs, share, slices, dropped)
            if jobs:
                self._clients[client] = jobs  # behind the others
        return list(slices.values()), dropped

    @staticmethod
    def _serve(jobs: deque[Job], share: int, slices: dict[int, Slice], dropped: list[Job]) -> int:
        """Take from one client's jobs, each in its turn; returns what is left of its share, below 0 for a long text."""
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
    """Return about how many characters there are to read of an item, before a template adds its own."""
    if isinstance(item, RawText):
        return len(item.text)
    return _amount(item, len, MESSAGE_CHARACTERS)


def estimated_tokens(item: Input | RowError) -> int:
    """Return about how many tokens an item has, without reading it."""
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
    """Add up all the strings of an item, and something for every message."""
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
