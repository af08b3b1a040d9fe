"""Which texts go through the graph together.

A batch is a list of indices; its texts are padded on the right to the longest of them. Batches with the longest texts
come first, so that a machine with too little memory fails at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rewardrt.text.taps import Ids
from rewardrt.text.tokens import EncodedText

BATCH_TOKENS = 16_384  # default budget of one batch, padding included


def plan_batches(lengths: Sequence[int], *, batch_tokens: int, padding: bool) -> list[list[int]]:
    """Group texts of `lengths` tokens into batches of at most `batch_tokens` tokens, each text in exactly one.

    With `padding`, texts of similar length share a batch. Without it, only texts of equal length do: on a CPU padding
    is wasted work, and a text that is never padded gets the same arithmetic whatever is scored with it. A text longer
    than the budget is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches: list[list[int]] = []
    for index in order:
        width = lengths[batches[-1][0]] if batches else 0  # the longest text of the current batch
        fits = batches and (len(batches[-1]) + 1) * width <= batch_tokens
        if fits and (padding or lengths[index] == width):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@dataclass(frozen=True)
class Batch:
    """The graph's inputs: texts padded on the right with 0.

    The padding id does not matter: a causal model never looks to the right, an encoder's mask follows `lengths`, and
    the graph does not search the ids for anything.
    """

    input_ids: Ids  # [batch, tokens] int64
    lengths: Ids  # [batch] int64
    positions: Ids | None = None  # [batch, taps] int64
    type_ids: Ids | None = None  # [batch, tokens] int64


def make_batch(texts: Sequence[EncodedText], *, causal: bool, with_positions: bool, start: int = 0) -> Batch:
    """Put texts into one batch, from token `start` on; positions are counted from there.

    For a causal model, the tokens after the last position that is read are left out.
    """
    ids = [text.ids[start : text.needed] if causal else text.ids for text in texts]
    lengths = np.array([len(each) for each in ids], dtype=np.int64)
    type_ids = [text.type_ids for text in texts if text.type_ids is not None]
    return Batch(
        _pad(ids, int(lengths.max())),
        lengths,
        np.stack([text.positions - start for text in texts]) if with_positions else None,
        _pad(type_ids, int(lengths.max())) if type_ids else None,
    )


def _pad(rows: Sequence[Ids], width: int) -> Ids:
    padded = np.zeros((len(rows), width), dtype=np.int64)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    return padded
