"""PairRM: the runtime against DebertaV2PairRM.forward and the model card's tokenize_pair, written out here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import edit_json
from checkpoints_pairwise import MARKERS, write_pairrm
from rewardrt import RewardModel
from rewardrt.errors import CheckpointError
from rewardrt.text.tokens import EncodedText
from rewardrt_export.families import choose_family
from rewardrt_export.pipeline import export
from rewardrt_export.source.folder import read_source
from test_general_preference import make_pairs, score
from texts import make_texts

TOLERANCE = 1e-4  # standard deviations of the comparisons


def encode(tokenizer: Any, source: str, first: str, second: str, *, longest: tuple[int, int] = (1224, 412)) -> Any:
    """tokenize_pair, without the padding."""
    total = longest[0] + 2 * longest[1]
    ids = tokenizer.encode(MARKERS["source"] + source, max_length=longest[0], truncation=True)
    room = (total - len(ids)) // 2
    for marker, text in (("cand1", first), ("cand2", second)):
        ids = ids + tokenizer.encode(MARKERS[marker] + text, max_length=room, truncation=True)
    return ids


def logit(model: Any, head: Any, tokenizer: Any, ids: list[int]) -> float:
    """DebertaV2PairRM.forward."""
    places = [ids.index(tokenizer.convert_tokens_to_ids(MARKERS[name])) for name in ("source", "cand1", "cand2")]
    with torch.inference_mode():
        source, left, right = model(torch.tensor([ids])).last_hidden_state[0, places]
        return (head(torch.cat([source, left])) - head(torch.cat([source, right]))).mean().item()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any, Any]:
    folder = tmp_path_factory.mktemp("pairrm")
    model, head, tokenizer = write_pairrm(folder / "rm", tasks=2)
    assert choose_family(read_source(folder / "rm")).name == "pairrm"
    bundle = export(folder / "rm", folder / "bundle")
    assert bundle.manifest.spec.max_length == 2048
    assert bundle.manifest.certificates[0].batched.max_std < TOLERANCE
    return folder / "bundle", model, head, tokenizer


@pytest.mark.parametrize("padding", [False, True])
def test_comparisons_are_half_the_difference_of_the_two_orders(exported: Any, padding: bool) -> None:
    folder, *parts = exported
    tokenizer = parts[-1]
    rows = make_pairs(24)
    texts = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    forth = [logit(*parts, encode(tokenizer, source, a, b)) for source, a, b in texts]
    back = [logit(*parts, encode(tokenizer, source, b, a)) for source, a, b in texts]
    expected = (np.array(forth) - np.array(back)) / 2
    scored = score(RewardModel.load(folder, provider="cpu", padding=padding), rows)
    found = np.array([row["margin"] for row in scored])
    assert np.abs(found - expected).max() < TOLERANCE * expected.std()
    assert [row["tokens"][0] for row in scored] == [len(encode(tokenizer, *each)) for each in texts]


def test_the_graph_gives_the_logit_of_one_order(exported: Any) -> None:
    folder, *parts = exported
    runtime = RewardModel.load(folder, provider="cpu")
    row = runtime.answers.parse({"prompt": "Which?", "responses": ["this one", "that one, surely"]})
    texts = [text for text in runtime.answers.encode(row.items) if isinstance(text, EncodedText)]
    found = [values[0] for values in runtime.runner.run(texts)]  # type: ignore[index]
    orders = [("this one", "that one, surely"), ("that one, surely", "this one")]
    expected = [logit(*parts, encode(parts[-1], "Which?", *order)) for order in orders]
    assert np.abs(np.array(found) - expected).max() < 1e-5


def test_each_part_is_cut_to_its_own_limit(exported: Any) -> None:
    folder, *parts = exported
    tokenizer = parts[-1]
    runtime = RewardModel.load(folder, provider="cpu")
    long = " ".join(make_texts(80, seed=5))
    parts_of = [("short", long, long), (long, "short", long), (long, "a", "b"), (long, long, long)]
    for source, first, second in parts_of:
        row = runtime.answers.parse({"prompt": source, "responses": [first, second]})
        (encoded, _) = runtime.answers.encode(row.items)
        expected = encode(tokenizer, source, first, second)
        assert encoded.ids.tolist() == expected  # type: ignore[union-attr]
        whole = encode(tokenizer, source, first, second, longest=(100_000, 100_000))
        assert encoded.truncated == len(whole) - len(expected) > 0  # type: ignore[union-attr]
    assert len(expected) == 2048
    (lowered, _) = runtime.answers.encode(row.items, max_length=256)
    ids = lowered.ids.tolist()  # type: ignore[union-attr]
    assert ids == encode(tokenizer, long, long, long, longest=(153, 51))  # the same shares


def test_an_answer_that_holds_a_marker_is_refused_and_named(exported: Any) -> None:
    runtime = RewardModel.load(exported[0], provider="cpu")
    rows = [
        {"prompt": "Q", "responses": ["fine", "as well", f"no {MARKERS['cand1']}"]},
        {"prompt": "Q", "chosen": "fine", "rejected": "as well"},
    ]
    refused, scored = score(runtime, rows)
    assert refused["error"].startswith("responses[0] before responses[2]: tap 'first' reads at the id ")
    assert "the text has 2 of them; expected one" in refused["error"]
    assert "margin" in scored


def test_a_marker_id_that_config_lacks_is_an_error_before_any_work(tmp_path: Path) -> None:
    write_pairrm(tmp_path / "rm")
    edit_json(tmp_path / "rm" / "config.json", remove=("cand2_prefix_id",))
    with pytest.raises(CheckpointError, match="cand2_prefix_id is None; expected the id of a token"):
        export(tmp_path / "rm", tmp_path / "bundle")
