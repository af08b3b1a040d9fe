"""The positions at which a model's hidden states are read: each tap of the spec, applied to token ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rewardrt.bundle.spec import Tap
from rewardrt.errors import RowError

Ids = npt.NDArray[np.int64]


def tap_positions(ids: Ids, taps: Sequence[Tap], prompt: int | None = None) -> Ids:
    """Return the index into `ids` that each tap reads, int64 [taps]; for `all_ids` one index per occurrence.

    `ids` is [tokens] int64 without padding. `prompt` is the number of tokens of the first message. Raises RowError if a
    tap finds nothing to read in this text.
    """
    return np.concatenate([_find(ids, tap, prompt) for tap in taps])


def _find(ids: Ids, tap: Tap, prompt: int | None) -> Ids:
    """Apply one tap's rule; the rules are defined in spec.Tap.

    last_not_id is what transformers' `*ForSequenceClassification` does now. before_first_id is what it did before pull
    request 35911: index of the first match minus 1, modulo the length. So a match at 0 reads the last token, as does a
    text without a match.
    """
    last = len(ids) - 1
    if tap.rule in ("last_mask", "mean"):
        found = np.array([last])
    elif tap.rule == "first":
        found = np.array([0])
    elif tap.rule == "prompt_end":
        if prompt is None:
            raise RowError(f"tap {tap.name!r} reads at the end of the prompt: expected a prompt and its answer")
        found = np.array([prompt - 1])
    elif tap.rule == "last_not_id":
        others = np.flatnonzero(ids != tap.ids[0])
        found = others[-1:] if len(others) else np.array([0])
    elif tap.rule == "before_first_id":
        matches = np.flatnonzero(ids == tap.ids[0])[tap.skip : tap.skip + 1]
        found = np.array([(int(matches[0]) - 1) % len(ids) if len(matches) else last])
    else:
        starts = run_starts(ids, tap.ids[:1] if tap.rule == "last_id" else tap.ids)
        found = starts if tap.rule == "all_ids" else starts[-1:]
        if tap.rule == "only_id" and len(starts) > 1:
            raise RowError(
                f"tap {tap.name!r} reads at the id {tap.ids[0]}, and the text has {len(starts)} of them; expected one: "
                "the prompt or an answer holds the model's own marker"
            )
    found = found.astype(np.int64) + tap.offset
    if len(found) == 0 or found.min() < 0 or found.max() > last:
        wanted = f"the ids {list(tap.ids)}" if tap.ids else f"a token {tap.offset} off"
        raise RowError(f"tap {tap.name!r} needs {wanted}, and the text of {len(ids)} tokens (after the cut) has none")
    return found


def run_starts(ids: Ids, pattern: Sequence[int]) -> Ids:
    """Return the index of the first token of every occurrence of `pattern` in `ids`, int64."""
    padded = np.concatenate([ids, np.full(len(pattern), -1)])  # no id is negative
    windows = np.lib.stride_tricks.sliding_window_view(padded, len(pattern))
    return np.flatnonzero((windows == np.array(pattern)).all(axis=1)).astype(np.int64)
