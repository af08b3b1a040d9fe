"""Pooling positions, cuts and batch plans, by hand-made cases."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rewardrt.bundle.spec import Head, Layer, Spec, Tap, TapRule, from_json, to_json
from rewardrt.errors import BundleError, RowError
from rewardrt.scoring.batching import make_batch, plan_batches
from rewardrt.text.taps import tap_positions
from rewardrt.text.tokens import EncodedText


@pytest.mark.parametrize(
    ("rule", "ids", "position"),
    [
        ("last_mask", [5, 6, 0], 2),
        ("last_not_id", [5, 6, 7], 2),
        ("last_not_id", [5, 6, 0], 1),  # pad == eos: the token before the closing EOS
        ("last_not_id", [5, 0, 6, 0, 0], 2),
        ("last_not_id", [0, 0], 0),
        ("before_first_id", [5, 6, 7], 2),
        ("before_first_id", [5, 6, 0], 1),
        ("before_first_id", [5, 0, 6, 0], 0),  # a token of the prompt
        ("before_first_id", [0, 5, 6], 2),  # -1 modulo the length
        ("last_id", [0, 5, 0, 6], 2),
        ("first", [5, 6], 0),
        ("mean", [5, 6, 7], 2),
    ],
)
def test_tap_positions(rule: TapRule, ids: list[int], position: int) -> None:
    tap = Tap("tap", rule, () if rule in ("last_mask", "first", "mean") else (0,))
    assert tap_positions(np.array(ids, dtype=np.int64), [tap]).tolist() == [position]


def test_a_pattern_is_found_where_its_rightmost_run_begins() -> None:
    ids = np.array([1, 2, 3, 1, 2, 9, 1, 2], dtype=np.int64)
    assert tap_positions(ids, [Tap("a", "pattern_start", (1, 2)), Tap("b", "pattern_start", (1, 2, 9))]).tolist() == [
        6,
        3,
    ]
    assert tap_positions(ids, [Tap("a", "all_ids", (2,), offset=-1)]).tolist() == [0, 3, 6]
    for tap in (Tap("a", "pattern_start", (2, 1)), Tap("a", "last_id", (7,)), Tap("a", "last_id", (1,), offset=2)):
        with pytest.raises(RowError, match=r"tap 'a' needs the ids \[.*\], and the text of 8 tokens"):
            tap_positions(ids, [tap])


def test_without_padding_only_texts_of_one_length_share_a_batch() -> None:
    lengths = [3, 5, 3, 1, 5, 3]
    assert plan_batches(lengths, batch_tokens=100, padding=False) == [[1, 4], [0, 2, 5], [3]]
    assert plan_batches(lengths, batch_tokens=6, padding=False) == [[1], [4], [0, 2], [5], [3]]


def test_with_padding_a_batch_is_filled_to_its_budget_counted_with_padding() -> None:
    lengths = [3, 5, 3, 1, 5, 3]
    assert plan_batches(lengths, batch_tokens=15, padding=True) == [[1, 4, 0], [2, 5, 3]]
    assert plan_batches(lengths, batch_tokens=100, padding=True) == [[1, 4, 0, 2, 5, 3]]


@pytest.mark.parametrize("padding", [False, True])
def test_every_text_is_in_one_batch_and_only_a_lone_text_exceeds_the_budget(padding: bool) -> None:
    lengths = np.random.default_rng(0).integers(1, 300, 500).tolist()
    batches = plan_batches(lengths, batch_tokens=256, padding=padding)
    assert sorted(index for batch in batches for index in batch) == list(range(500))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= 256


def test_no_texts_make_no_batches() -> None:
    assert plan_batches([], batch_tokens=256, padding=True) == []


def test_a_batch_is_filled_on_the_right_and_ends_at_the_last_position_that_is_read() -> None:
    texts = [
        EncodedText(np.array([7, 8, 9]), 0, np.array([1])),
        EncodedText(np.array([5]), 0, np.array([0])),
    ]
    batch = make_batch(texts, causal=True, with_positions=False)
    assert (batch.input_ids.tolist(), batch.lengths.tolist(), batch.positions) == ([[7, 8], [5, 0]], [2, 1], None)
    batch = make_batch(texts, causal=False, with_positions=True)
    assert (batch.input_ids.tolist(), batch.lengths.tolist()) == ([[7, 8, 9], [5, 0, 0]], [3, 1])
    assert batch.positions is not None
    assert batch.positions.tolist() == [[1], [0]]
    assert (batch.input_ids.dtype, batch.lengths.dtype) == (np.int64, np.int64)


def test_a_spec_survives_json_and_nothing_else_is_taken_for_one() -> None:
    head = Head((Layer("score.weight"),))
    spec = Spec("openrlhf", "llama", True, (head,), 2048, {"eos_token": "</s>"})
    data = json.loads(json.dumps(to_json(spec)))
    assert from_json(Spec, data) == spec
    for change, message in (
        ({"max_length": 0}, "max_length 0: expected at least 1"),
        ({"max_length": True}, "Spec.max_length: expected int, found bool"),
        ({"special_tokens": {"eos_token": 2}}, r"Spec.special_tokens\['eos_token'\]: expected str, found int"),
        ({"normalise_by_default": True}, "normalise_by_default is set"),
        ({"text": None}, "Spec.text: expected an object, found NoneType"),
        ({"heads": []}, "heads: expected at least one"),
        (
            {"heads": [data["heads"][0] | {"taps": ["none"]}]},
            r"a head reads \['none'\]; expected layers over some of the taps",
        ),
    ):
        with pytest.raises(BundleError, match=message):
            from_json(Spec, data | change)
