"""Tokens that several texts begin with are computed once: which texts follow which, and what is kept between calls.

A token's keys and values depend on the tokens up to it alone, so those of one text serve every text that begins the
same way; so does the state that a layer of linear attention or Mamba has after a token. onnxruntime's kernels give a
token the same bits however many others are computed beside it, with two exceptions: a call of exactly one token takes
other kernels, and so do scores of attention over few tokens where heads are wide (`least_shared`). `legal_cut` is the
one place that keeps clear of both.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

import numpy as np

from rewardrt.graph.session import KeyValues
from rewardrt.text.taps import Ids
from rewardrt.text.tokens import EncodedText

MIN_SHARED = 16  # tokens; for fewer, cutting and copying keys and values costs what it saves
WHOLE_KEY = 128  # numbers of a key that are added up in one go, whatever there is of them
FEW_KEYS = 65  # from so many keys on, longer ones are added up in the same steps
BLOCK = MIN_SHARED  # tokens that the cache keeps or drops together
MAX_STATES = 8  # of one text, that are held for others to go on from
CHUNK = 256  # most tokens of one call: their activations stay in a core's cache, and attention's scores stay small
# Operations that a group must save: one call more, and its keys and values to the host and back, take some 25 ms of an
# H200, in which it does so many. 16 answers after 600 tokens then took 117 ms for 342 with 7.5 billion parameters, and
# 29 ms for 21 with 135 million.
GROUP_OPERATIONS = 15e12


def least_shared(key_size: int) -> int:
    """Return the fewest tokens that may come from another text, with keys of so many numbers a head.

    onnxruntime adds up the product of a query and a key in steps of 128 numbers where there are more than 64 keys, and
    in longer steps where there are fewer: in other bits, for keys of more than 128.
    """
    return MIN_SHARED if key_size <= WHOLE_KEY else -(-FEW_KEYS // BLOCK) * BLOCK


def legal_cut(shared: int, text: EncodedText, least: int) -> int:
    """Return how many of the tokens that a text shares may come from another: 0 where it is fewer than `least`.

    At least two tokens are left to compute, and all that are read lie among them.
    """
    cut = min(shared, text.needed - 2, int(text.positions.min()))
    return cut if cut >= least else 0


def chunk_ends(start: int, text: EncodedText, stops: Sequence[int] = ()) -> list[int]:
    """Return where the calls end that compute a text from token `start` on: parts of equal length, at most CHUNK each.

    Calls end at `stops` as well (`state_stops`). Positions that are read lie in the last part, which may be longer for
    it; no part is a single token.
    """
    ends = [end for first, last in pairwise([start, *stops, text.needed]) for end in _equal_ends(first, last)]
    return [end for end in ends[:-1] if end <= int(text.positions.min())] + [text.needed]


def _equal_ends(first: int, last: int) -> list[int]:
    parts = -(-(last - first) // CHUNK)
    return [first + (last - first) * part // parts for part in range(1, parts + 1)]


def state_stops(start: int, text: EncodedText, wanted: Iterable[int], least: int) -> list[int]:
    """Return after which tokens of a text, computed from `start` on, the states of its layers are to be kept.

    Keys and values are there for every token. A state is there after a call's last token alone, so a call has to end
    where another text goes on: after `wanted` tokens. Stops are MIN_SHARED tokens apart; a text that wants one in
    between goes on from the stop before it. Of more than MAX_STATES the last are taken: a state may take as much memory
    as the keys and values of a thousand tokens.
    """
    legal = legal_cut(text.needed, text, least)
    found: list[int] = []
    for stop in sorted({min(stop, legal) for stop in wanted}):
        if stop >= max(least, (found[-1] if found else start) + MIN_SHARED):
            found.append(stop)
    return found[-MAX_STATES:]


@dataclass(frozen=True)
class Link:
    """One text of a chain, by its index, and how many of its tokens come from the text before it."""

    index: int
    cut: int


def plan_chains(texts: Sequence[EncodedText], least: int) -> list[list[Link]]:
    """Order texts so that each follows the one it shares most with; a chain ends where a text shares nothing.

    In the order of their tokens, no text shares more with any earlier one than with the one right before it. So only
    one text's keys and values are held at a time. `least` is that of `legal_cut`.
    """
    ids = [text.ids[: text.needed] for text in texts]
    order = _token_order(ids)
    chains: list[list[Link]] = []
    held = 0  # tokens whose keys and values the text before was given: taken over as they are where that is enough
    for place, index in enumerate(order):
        cut = legal_cut(shared_tokens(ids[order[place - 1]], ids[index]), texts[index], least) if place else 0
        if held <= cut < held + MIN_SHARED:
            cut = held
        held = cut
        if cut:
            chains[-1].append(Link(index, cut))
        else:
            chains.append([Link(index, 0)])
    return chains


@dataclass(frozen=True)
class Group:
    """Texts, by their indices, that begin with the same `cut` tokens."""

    indices: tuple[int, ...]
    cut: int


def group_worth(weights_bytes: int) -> int:
    """Return how many tokens a group must save with a graph of such weights.

    A token takes two operations for each parameter, which are as many as the bytes of a float16 weight.
    """
    return max(1, int(GROUP_OPERATIONS / max(1, weights_bytes)))


def plan_groups(texts: Sequence[EncodedText], worth: int, least: int) -> list[Group]:
    """Return texts whose common beginning is worth computing once, before the rest of all of them in batches.

    That is a choice of nodes of the tree of all beginnings, none below another: those that save the most tokens
    together, each at least `worth`. No text is in two of them.
    """
    ids = [text.ids[: legal_cut(text.needed, text, least)] for text in texts]  # what may come from elsewhere
    order = _token_order(ids)
    chosen: list[Group] = []
    # The nodes that are still open, each inside the one before it: tokens shared, place of its first text, and the best
    # choice of those that are closed inside it, with what it saves.
    open_nodes: list[tuple[int, int, int, list[Group]]] = []
    for place in range(1, len(order) + 1):
        shared = shared_tokens(ids[order[place - 1]], ids[order[place]]) if place < len(order) else 0
        cut = shared if shared >= least else 0
        first, saved, groups = place - 1, 0, list[Group]()
        while open_nodes and open_nodes[-1][0] > cut:
            tokens, first, inside, inner = open_nodes.pop()
            own = (place - first - 1) * tokens
            if own >= max(inside, worth):
                inside, inner = own, [Group(tuple(order[first:place]), tokens)]
            if open_nodes and open_nodes[-1][0] >= cut:
                outer = open_nodes.pop()
                open_nodes.append((outer[0], outer[1], outer[2] + inside, outer[3] + inner))
            else:
                saved, groups = saved + inside, groups + inner
        if cut and not (open_nodes and open_nodes[-1][0] == cut):
            open_nodes.append((cut, first, saved, groups))
        elif not cut:
            chosen += groups
    return chosen


def _token_order(ids: Sequence[Ids]) -> list[int]:
    """Return the indices of texts in the order of their tokens, the first first."""
    return sorted(range(len(ids)), key=lambda index: ids[index].astype(">i8").tobytes())


def shared_tokens(first: Ids, second: Ids) -> int:
    """Return how many tokens two texts share at their beginning."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if different.size else length


_Blocks = OrderedDict[bytes, KeyValues]  # an alias: in the class, `bytes` is a property


class PrefixCache:
    """Keys and values that stay between calls, up to `budget` bytes; the least recently used go first.

    They are kept in blocks of BLOCK tokens, each known by all tokens up to its end. So what several texts begin with is
    held once, and many texts may go on from it. A block is never older than those that follow it: texts lose their
    ends first. Of a graph `with_states` a text goes on from a block that has the states after it; `find` and `keep` say
    where those come from. Safe to use from several threads.
    """

    def __init__(self, budget: int, least: int, *, with_states: bool = False) -> None:
        self._budget = budget
        self._least = least
        self._with_states = with_states
        self._blocks: _Blocks = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """What is held."""
        with self._lock:
            return self._bytes

    def find(self, text: EncodedText) -> tuple[KeyValues | None, int]:
        """Return what is kept of the longest beginning that may be used, or None; and how many tokens are known.

        More tokens are known than are given where blocks have no state after them: a text that computes them again
        stops there (`state_stops`), for the next.
        """
        names = _block_names(text.ids[: legal_cut(text.needed, text, self._least)])
        with self._lock:
            known = list(takewhile(self._blocks.__contains__, names))
            blocks = [self._blocks[name] for name in known]
            self._touch(known)
        tokens = len(blocks) * BLOCK
        while self._with_states and blocks and not blocks[-1].states:
            blocks.pop()
        if len(blocks) * BLOCK < self._least:
            return None, tokens
        arrays = tuple(np.concatenate(parts, axis=2) for parts in zip(*(b.arrays for b in blocks), strict=True))
        return KeyValues(arrays, blocks[-1].states), tokens

    def keep(self, ids: Ids, values: KeyValues) -> None:
        """Keep what was just computed of a text, unless it is too short for others to use it."""
        if len(ids) < self._least:
            return
        names = _block_names(ids)
        with self._lock:
            missing = [place for place, name in enumerate(names) if self._lacks(name, (place + 1) * BLOCK, values)]
        made = {names[place]: values.block(place * BLOCK, BLOCK) for place in missing}
        with self._lock:
            for name, block in made.items():
                # Another thread may have been faster, and have kept a state that this one has not.
                held = self._blocks.get(name)
                if held is None or (block.states and not held.states):
                    self._blocks[name] = block
                    self._bytes += block.bytes - (held.bytes if held is not None else 0)
            self._touch([name for name in names if name in self._blocks])
            while self._bytes > self._budget:
                self._bytes -= self._blocks.popitem(last=False)[1].bytes

    def _lacks(self, name: bytes, end: int, values: KeyValues) -> bool:
        held = self._blocks.get(name)
        return held is None or (end in values.states and not held.states)

    def _touch(self, names: Sequence[bytes]) -> None:
        for name in reversed(names):  # what follows is older than what it follows
            self._blocks.move_to_end(name)


def _block_names(ids: Ids) -> list[bytes]:
    """Return a name for each whole block of a text: a digest of all tokens up to its end."""
    names, digest = [], hashlib.sha256()
    for end in range(BLOCK, len(ids) + 1, BLOCK):
        digest.update(ids[end - BLOCK : end].astype("<i8").tobytes())
        names.append(digest.digest())
    return names


@dataclass(frozen=True)
class Statistics:
    """Tokens since the model was loaded: of the texts as they are, and of those the graph computed for them."""

    given: int = 0
    computed: int = 0

    @property
    def shared(self) -> float:
        """Share of the tokens that were not computed, 0..1."""
        return 1 - self.computed / self.given if self.given else 0.0
