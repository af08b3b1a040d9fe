"""Prefix reuse: compute tokens that several texts begin with only once, within a call and between calls.

In a causal model a token's keys and values depend only on the tokens up to it. So those of one text serve every text
with the same prefix. The same is true of the state that a layer of linear attention or Mamba has after a token.
onnxruntime's kernels compute the same bits for a token however many others are computed with it, with two exceptions. A
call of exactly one token uses other kernels. So do attention scores over few tokens, if the heads are wide
(`least_shared`). `legal_cut` avoids both.
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

MIN_SHARED = 16  # tokens; with fewer, slicing and copying keys and values costs as much as it saves
WHOLE_KEY = 128  # head size up to which the dot product of query and key is summed in one go
FEW_KEYS = 65  # number of keys from which the dot products of longer keys are summed in fixed steps
BLOCK = MIN_SHARED  # tokens that the cache keeps or drops together
MAX_STATES = 8  # states of one text that are kept for others to continue from
CHUNK = 256  # most tokens of one call: activations then fit into a core's cache, and attention scores stay small
# Operations that a group must save. The additional call, with the transfer of keys and values to the host and back,
# takes about 25 ms on an H200, in which the GPU does this many operations. For 16 answers to one prompt of 600 tokens,
# a group took 117 ms instead of 342 ms with 7.5 billion parameters, but 29 ms instead of 21 ms with 135 million.
GROUP_OPERATIONS = 15e12


def least_shared(key_size: int) -> int:
    """Return the fewest tokens that may be taken from another text, for attention heads of size `key_size`.

    onnxruntime sums the dot product of a query and a key in steps of 128 numbers if there are more than 64 keys, and in
    longer steps if there are fewer. For heads larger than 128 the two give different bits.
    """
    return MIN_SHARED if key_size <= WHOLE_KEY else -(-FEW_KEYS // BLOCK) * BLOCK


def legal_cut(shared: int, text: EncodedText, least: int) -> int:
    """Return how many of a text's `shared` tokens may be taken from another text: 0 if that is fewer than `least`.

    At least two tokens remain to be computed, and all positions that are read lie among these.
    """
    cut = min(shared, text.needed - 2, int(text.positions.min()))
    return cut if cut >= least else 0


def chunk_ends(start: int, text: EncodedText, stops: Sequence[int] = ()) -> list[int]:
    """Return the ends of the calls that compute a text from token `start` on: equal parts of at most CHUNK tokens.

    Calls also end at `stops` (see `state_stops`). All positions that are read lie in the last part, which may therefore
    be longer. No part is a single token.
    """
    ends = [end for first, last in pairwise([start, *stops, text.needed]) for end in _equal_ends(first, last)]
    return [end for end in ends[:-1] if end <= int(text.positions.min())] + [text.needed]


def _equal_ends(first: int, last: int) -> list[int]:
    parts = -(-(last - first) // CHUNK)
    return [first + (last - first) * part // parts for part in range(1, parts + 1)]


def state_stops(start: int, text: EncodedText, wanted: Iterable[int], least: int) -> list[int]:
    """Return the numbers of tokens of a text, computed from `start` on, after which its layers' states are kept.

    Keys and values exist for every token, but a state exists only after the last token of a call. So a call has to end
    where another text branches off: after one of the `wanted` numbers of tokens. Stops are at least MIN_SHARED tokens
    apart; a text that branches off between two stops continues from the earlier one. Only the last MAX_STATES stops are
    used, because a state may take as much memory as the keys and values of a thousand tokens.
    """
    legal = legal_cut(text.needed, text, least)
    found: list[int] = []
    for stop in sorted({min(stop, legal) for stop in wanted}):
        if stop >= max(least, (found[-1] if found else start) + MIN_SHARED):
            found.append(stop)
    return found[-MAX_STATES:]


@dataclass(frozen=True)
class Link:
    """One text of a chain, by its index; its first `cut` tokens are taken from the text before it."""

    index: int
    cut: int


def plan_chains(texts: Sequence[EncodedText], least: int) -> list[list[Link]]:
    """Order texts so that each follows the text with which it shares the longest prefix.

    Sorted by their tokens, each text shares most with the one right before it. So only one text's keys and values have
    to be kept at a time. A text that shares nothing starts a new chain. `least` is that of `legal_cut`.
    """
    ids = [text.ids[: text.needed] for text in texts]
    order = _token_order(ids)
    chains: list[list[Link]] = []
    held = 0  # tokens that the previous text took over; taking over exactly as many again avoids a copy
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
    """Return how many tokens a group must save with a graph whose weights have this size in bytes.

    A token takes two operations per parameter, and a float16 parameter has two bytes: one operation per byte.
    """
    return max(1, int(GROUP_OPERATIONS / max(1, weights_bytes)))


def plan_groups(texts: Sequence[EncodedText], worth: int, least: int) -> list[Group]:
    """Return groups of texts whose common prefix is worth computing once, before the rest of each text in batches.

    In the prefix tree of the texts, these are non-overlapping nodes that maximise the tokens saved, (texts - 1) x
    depth, and that save at least `worth` tokens each. No text is in two groups.
    """
    ids = [text.ids[: legal_cut(text.needed, text, least)] for text in texts]  # the part that can be shared
    order = _token_order(ids)
    chosen: list[Group] = []
    # The open nodes of the tree, each inside the one before it: depth in tokens, position of its first text in `order`,
    # tokens saved by the best groups among its closed descendants, and these groups.
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
    """Return the indices of texts sorted by their token ids."""
    return sorted(range(len(ids)), key=lambda index: ids[index].astype(">i8").tobytes())


def shared_tokens(first: Ids, second: Ids) -> int:
    """Return the length of the common prefix of two texts in tokens."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if different.size else length


_Blocks = OrderedDict[bytes, KeyValues]  # block name -> keys and values; the least recently used first


class PrefixCache:
    """A cache of keys and values between calls, up to `budget` bytes; the least recently used are dropped first.

    It stores blocks of BLOCK tokens, each under a digest of all tokens up to its end. So a prefix of several texts is
    stored once, and many texts may continue from it. A block always counts as used more recently than the blocks that
    continue it, so texts lose their ends first. If the graph has states (`with_states`), a text can only continue from
    a block that has the states after it; see `find` and `keep`. Thread-safe.
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
        """The size of the stored blocks in bytes."""
        with self._lock:
            return self._bytes

    def find(self, text: EncodedText) -> tuple[KeyValues | None, int]:
        """Return the keys and values of the longest cached prefix that the text may use, or None, and the known tokens.

        With states, more tokens may be known than are returned, because some blocks have no state after them. A text
        that computes these tokens again keeps the state there (`state_stops`), for the next text.
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
        """Store the keys and values just computed for a text, unless it is too short to be shared."""
        if len(ids) < self._least:
            return
        names = _block_names(ids)
        with self._lock:
            missing = [place for place, name in enumerate(names) if self._lacks(name, (place + 1) * BLOCK, values)]
        made = {names[place]: values.block(place * BLOCK, BLOCK) for place in missing}
        with self._lock:
            for name, block in made.items():
                # Another thread may have stored the block meanwhile, with a state that this one lacks.
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
        for name in reversed(names):  # earlier blocks of the text become the most recently used
            self._blocks.move_to_end(name)


def _block_names(ids: Ids) -> list[bytes]:
    """Return a name for each whole block of a text: the digest of all tokens up to its end."""
    names, digest = [], hashlib.sha256()
    for end in range(BLOCK, len(ids) + 1, BLOCK):
        digest.update(ids[end - BLOCK : end].astype("<i8").tobytes())
        names.append(digest.digest())
    return names


@dataclass(frozen=True)
class Statistics:
    """Token counts since the model was loaded: `given` in all texts, and `computed` by the graph for them."""

    given: int = 0
    computed: int = 0

    @property
    def shared(self) -> float:
        """The share of the tokens that did not have to be computed, 0..1."""
        return 1 - self.computed / self.given if self.given else 0.0
