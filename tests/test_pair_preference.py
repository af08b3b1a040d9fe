"""SliC pair preference models: the runtime against the model card's code, written out here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import CHATML, make_tokenizer
from checkpoints_pairwise import write_pair_preference
from rewardrt import RewardModel
from rewardrt.checks.verify import read_golden
from rewardrt.errors import CheckpointError
from rewardrt_export.families import choose_family
from rewardrt_export.pipeline import export
from rewardrt_export.source.folder import read_source
from test_general_preference import make_pairs, score
from texts import make_texts

TOLERANCE = 1e-4  # standard deviations of the comparisons
PLAIN = (
    "\n{% for message in messages %}{% if loop.index0 % 2 == 0 %}\n\n<turn> user\n {{ message['content'] }}"
    "{% else %}\n\n<turn> assistant\n {{ message['content'] }}{% endif %}{% endfor %}\n\n\n"
)
WITH_BOS = "{{ bos_token }}" + CHATML


def encode(tokenizer: Any, prompt: Any, first: str, second: str) -> list[int]:
    """The pair as one user turn of the model's template, without BOS."""
    before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    context = tokenizer.apply_chat_template(before, chat_template=PLAIN, tokenize=False)
    text = f"[CONTEXT] {context} [RESPONSE A] {first} [RESPONSE B] {second} \n"
    text = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
    ids: list[int] = tokenizer.encode(text.replace(tokenizer.bos_token, ""), add_special_tokens=False)
    return ids


def probability(model: Any, tokenizer: Any, prompt: Any, responses: list[str]) -> tuple[float, float, list[int]]:
    """The card's P(responses[0] is better), the half difference of the two orders' logits, and both lengths."""
    letters = [tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "AB"]
    probabilities, differences, lengths = [], [], []
    for chosen in (0, 1):
        ids = encode(tokenizer, prompt, responses[chosen], responses[1 - chosen])
        with torch.inference_mode():
            a, b = model(torch.tensor([ids])).logits[0, -1, letters]
        probabilities.append(torch.softmax(torch.stack([a, b]), 0)[chosen].item())
        differences.append((a - b).item())
        lengths.append(len(ids))
    return float(np.mean(probabilities)), (differences[0] - differences[1]) / 2, lengths


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    folder = tmp_path_factory.mktemp("pm")
    tokenizer = make_tokenizer(adds_bos=True, template=WITH_BOS)
    model = write_pair_preference(folder / "rm", tokenizer=tokenizer)
    bundle = export(folder / "rm", folder / "bundle", family="pair-preference")
    assert bundle.manifest.certificates[0].single.max_std < TOLERANCE
    return folder / "bundle", model, tokenizer


@pytest.mark.parametrize("padding", [False, True])
def test_comparisons_are_half_the_difference_of_the_two_orders(exported: Any, padding: bool) -> None:
    folder, model, tokenizer = exported
    rows = make_pairs(24, longest=20)
    rows[3]["prompt"] = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"},
                         {"role": "user", "content": "and now?"}]  # fmt: skip
    cards = [probability(model, tokenizer, row["prompt"], [row["chosen"], row["rejected"]]) for row in rows]
    expected = np.array([difference for _, difference, _ in cards])
    scored = score(RewardModel.load(folder, provider="cpu", padding=padding), rows)
    found = np.array([row["margin"] for row in scored])
    assert np.abs(found - expected).max() < TOLERANCE * expected.std()
    assert [row["tokens"] for row in scored] == [lengths for _, _, lengths in cards]
    # The card takes the mean of probabilities: the same answer wins.
    assert [p > 0.5 for p, _, _ in cards] == (found > 0).tolist()


def test_every_ordered_pair_of_the_responses_is_read(exported: Any) -> None:
    folder, model, tokenizer = exported
    responses = make_texts(4, longest=12, seed=4)
    responses.append(responses[0])
    (row,) = score(RewardModel.load(folder, provider="cpu"), [{"prompt": "Say something.", "responses": responses}])
    expected = np.zeros((5, 5))
    for i in range(4):
        for j in range(i):
            expected[i, j] = probability(model, tokenizer, "Say something.", [responses[i], responses[j]])[1]
            expected[j, i] = -expected[i, j]
    expected[4], expected[:, 4] = expected[0], expected[:, 0]
    found = np.array(row["comparisons"])
    assert np.abs(found - expected).max() < TOLERANCE * expected.std()
    assert (found == -found.T).all()
    assert found[0, 4] == 0.0
    assert row["rewards"][0] == row["rewards"][4]
    assert np.abs(np.array(row["rewards"]) - expected.mean(axis=1)).max() < TOLERANCE * expected.std()
    lengths = [
        [len(encode(tokenizer, "Say something.", a, b)) for j, b in enumerate(responses) if i != j]
        for i, a in enumerate(responses)
    ]
    assert row["tokens"] == [sum(each) for each in lengths]


def test_swapped_answers_give_exactly_the_negative(exported: Any) -> None:
    runtime = RewardModel.load(exported[0], provider="cpu")
    rows = make_pairs(8, longest=20)
    swapped = [{"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    forth, back = (np.array([row["margin"] for row in score(runtime, each)]) for each in (rows, swapped))
    assert (forth == -back).all()
    assert np.count_nonzero(forth) == len(rows)


def test_the_golden_texts_are_pairs_in_both_orders(exported: Any) -> None:
    texts = read_golden(exported[0] / "golden.jsonl")
    pairs = [(text.row["prompt"], *text.row["responses"]) for text in texts if text.max_length is None]
    assert len(pairs) >= 40
    assert pairs[0] == (pairs[1][0], pairs[1][2], pairs[1][1])
    assert len({text.rewards for text in texts}) == len(texts)
    assert any(text.truncated for text in texts)


def test_a_tied_head_reads_the_embedding(tmp_path: Path) -> None:
    model = write_pair_preference(tmp_path / "rm", tied=True)
    assert "lm_head.weight" not in read_source(tmp_path / "rm").stored
    export(tmp_path / "rm", tmp_path / "bundle", family="pair-preference")
    runtime = RewardModel.load(tmp_path / "bundle", provider="cpu")
    rows = make_pairs(8, longest=10)
    expected = np.array(
        [probability(model, make_tokenizer(), row["prompt"], [row["chosen"], row["rejected"]])[1] for row in rows]
    )
    found = np.array([row["margin"] for row in score(runtime, rows)])
    assert np.abs(found - expected).max() < TOLERANCE * expected.std()


def test_a_plain_language_model_is_not_taken_for_a_pair_preference_model(tmp_path: Path) -> None:
    write_pair_preference(tmp_path / "rm")
    with pytest.raises(CheckpointError, match="is not a reward model of a known family"):
        choose_family(read_source(tmp_path / "rm"))


def test_capped_logits_are_capped(tmp_path: Path) -> None:
    model = write_pair_preference(tmp_path / "rm", "gemma2")  # whose class caps its logits, in torch too
    export(tmp_path / "rm", tmp_path / "bundle", family="pair-preference")
    runtime = RewardModel.load(tmp_path / "bundle", provider="cpu")
    assert runtime.spec.heads[0].softcap == 30.0
    rows = make_pairs(8, longest=10)
    expected = np.array(
        [probability(model, make_tokenizer(), row["prompt"], [row["chosen"], row["rejected"]])[1] for row in rows]
    )
    found = np.array([row["margin"] for row in score(runtime, rows)])
    assert np.abs(found - expected).max() < TOLERANCE * expected.std()


def test_a_missing_template_is_refused(tmp_path: Path) -> None:
    write_pair_preference(tmp_path / "bare", tokenizer=make_tokenizer(template=None))
    with pytest.raises(CheckpointError, match="the tokenizer has no chat template"):
        export(tmp_path / "bare", tmp_path / "bundle", family="pair-preference")
