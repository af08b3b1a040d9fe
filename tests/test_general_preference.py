"""General preference models: the runtime against the published code's maths, written out here."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import CHATML, add_tensors, edit_json, make_tokenizer, write_openrlhf
from checkpoints_pairwise import write_general_preference
from page_browser import ANSWERS, PROMPT, assert_accessible, chromium, fill, opened, press_score, shown, table, wait_for
from rewardrt import RewardModel, RowError
from rewardrt.data.files import score_file
from rewardrt.data.lines import read_lines
from rewardrt.errors import CheckpointError
from rewardrt_export.families import choose_family
from rewardrt_export.pipeline import export
from rewardrt_export.source.folder import read_source
from server_process import serving
from texts import make_texts

TOLERANCE = 1e-4  # standard deviations of the comparisons
MAX_LENGTH = 200


def score(runtime: RewardModel, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Score rows as `rewardrt score` does."""
    data = io.BytesIO(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    out: list[bytes] = []
    score_file(runtime.answers.prepare, runtime.score_prepared, read_lines(data), out.append)
    return [json.loads(line) for line in out]


def make_pairs(count: int, *, longest: int = 25) -> list[dict[str, Any]]:
    texts = make_texts(3 * count, longest=longest)
    names = ("prompt", "chosen", "rejected")
    return [dict(zip(names, texts[3 * i : 3 * i + 3], strict=True)) for i in range(count)]


def states(model: Any, texts: list[list[int]], pad: int = 3) -> list[torch.Tensor]:
    """The hidden states [tokens, hidden] of each text, from one left-padded batch."""
    width = max(map(len, texts))
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in texts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in texts])
    position_ids = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    with torch.inference_mode():
        hidden = model.model(input_ids, attention_mask=mask, position_ids=position_ids).last_hidden_state
    return [hidden[i, width - len(ids) :] for i, ids in enumerate(texts)]


def compare(
    first: torch.Tensor, second: torch.Tensor, prompt: int, head: torch.Tensor, gate: torch.Tensor | None
) -> float:
    """chosen R^T rejected, with R block-diagonal [[0, -g], [g, 0]]; `prompt` counts the first message's tokens."""
    chosen = torch.nn.functional.normalize(head @ first[-1], dim=-1)
    rejected = torch.nn.functional.normalize(head @ second[-1], dim=-1)
    weights = torch.ones(len(head) // 2) if gate is None else torch.softmax(gate @ first[prompt - 1], -1)
    matrix = torch.zeros(len(head), len(head))
    for k, weight in enumerate(weights):
        matrix[2 * k, 2 * k + 1], matrix[2 * k + 1, 2 * k] = -weight, weight
    return (chosen @ matrix.T @ rejected).item()


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, torch.Tensor, torch.Tensor, Any]:
    folder = tmp_path_factory.mktemp("gpm")
    # As Llama 3's: the template writes a BOS, and the tokenizer adds one more.
    tokenizer = make_tokenizer(adds_bos=True, template="{{ bos_token }}" + CHATML)
    model, head, gate = write_general_preference(folder / "rm", tokenizer=tokenizer)
    bundle = export(folder / "rm", folder / "bundle", max_length=MAX_LENGTH)
    assert bundle.manifest.spec.family == "general-preference"
    return folder / "bundle", model, head, gate, tokenizer


def encode(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """The template's text through the tokenizer as any other text, cut on the right, the last id forced to EOS."""
    ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"][:MAX_LENGTH]
    return [*ids[:-1], tokenizer.eos_token_id]


@pytest.mark.parametrize("padding", [False, True])
def test_comparisons_are_the_published_codes(gated: Any, padding: bool) -> None:
    folder, model, head, gate, tokenizer = gated
    runtime = RewardModel.load(folder, provider="cpu", padding=padding)
    rows = make_pairs(32)
    rows[5]["prompt"] = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"},
                         {"role": "user", "content": "and now?"}]  # fmt: skip
    expected, lengths = [], []
    for row in rows:
        before = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
        first, second = (
            encode(tokenizer, [*before, {"role": "assistant", "content": row[side]}]) for side in ("chosen", "rejected")
        )
        assert first[:2] == [1, 1]
        prompt = len(tokenizer(tokenizer.apply_chat_template(before[:1], tokenize=False))["input_ids"])
        expected.append(compare(*states(model, [first, second]), prompt, head, gate))
        lengths.append([len(first), len(second)])
    assert max(map(max, lengths)) == MAX_LENGTH  # some are cut
    scored = score(runtime, rows)
    found = np.array([row["margin"] for row in scored])
    assert [row["tokens"] for row in scored] == lengths
    assert np.abs(found - expected).max() < TOLERANCE * np.std(expected)
    # One answer at a time is the same model: rank() of two is the pair.
    alone = [runtime.rank(prompt=row["prompt"], responses=[row["chosen"], row["rejected"]]) for row in rows[:4]]
    margins = [next(a for a in two if a.index == 0).comparisons[1] for two in alone]
    assert np.abs(np.array(margins) - expected[:4]).max() < TOLERANCE * np.std(expected)


def test_responses_get_every_comparison_and_its_mean(gated: Any) -> None:
    folder, model, head, gate, tokenizer = gated
    runtime = RewardModel.load(folder, provider="cpu")
    responses = make_texts(5, longest=20, seed=3)
    (row,) = score(runtime, [{"prompt": "Say something.", "responses": responses}])
    user = {"role": "user", "content": "Say something."}
    prompt = len(tokenizer(tokenizer.apply_chat_template([user], tokenize=False))["input_ids"])
    ids = [encode(tokenizer, [user, {"role": "assistant", "content": text}]) for text in responses]
    hidden = states(model, ids)
    expected = np.array([[compare(a, b, prompt, head, gate) for b in hidden] for a in hidden])
    found = np.array(row["comparisons"])
    assert np.abs(found - expected).max() < TOLERANCE * expected.std()
    assert (found == -found.T).all()
    assert np.abs(np.array(row["rewards"]) - expected.mean(axis=1)).max() < TOLERANCE * expected.std()
    assert row["best"] == int(np.argmax(expected.mean(axis=1)))
    assert row["tokens"] == [len(each) for each in ids]
    ranked = runtime.rank(prompt="Say something.", responses=responses)
    assert [answer.index for answer in ranked] == np.argsort(-expected.mean(axis=1)).tolist()
    assert ranked[0].comparisons == tuple(np.float32(found[ranked[0].index]).tolist())


def test_swapped_answers_give_exactly_the_negative(gated: Any) -> None:
    runtime = RewardModel.load(gated[0], provider="cpu")
    rows = make_pairs(16)
    swapped = [{"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    forth, back = (np.array([row["margin"] for row in score(runtime, each)]) for each in (rows, swapped))
    assert (forth == -back).all()
    assert np.count_nonzero(forth) == len(rows)


def test_chosen_and_rejected_rewards_are_as_far_apart_as_the_margin(gated: Any) -> None:
    runtime = RewardModel.load(gated[0], provider="cpu")
    for row in score(runtime, make_pairs(4)):
        assert row["chosen_reward"] == -row["rejected_reward"] == row["margin"] / 2
        assert "comparisons" not in row


@pytest.mark.parametrize(
    "row", [{"text": "alone"}, {"prompt": "Q", "response": "A"}, {"prompt": "Q", "responses": ["A"]}]
)
def test_one_answer_cannot_be_compared(gated: Any, row: dict[str, Any]) -> None:
    runtime = RewardModel.load(gated[0], provider="cpu")
    expected = "compares answers: expected two or more responses, or chosen and rejected; found one"
    assert expected in score(runtime, [row])[0]["error"]
    with pytest.raises(RowError, match="item 0: this model compares answers"):
        runtime.score_many([row])


def test_answers_to_different_prompts_cannot_be_compared(gated: Any) -> None:
    runtime = RewardModel.load(gated[0], provider="cpu")
    sides = {
        side: [{"role": "user", "content": side}, {"role": "assistant", "content": "A"}]
        for side in ("chosen", "rejected")
    }
    assert "answer different ones" in score(runtime, [sides])[0]["error"]


def test_without_a_gate_and_a_template_all_pairs_of_values_weigh_the_same(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(template=None)
    model, head, _ = write_general_preference(tmp_path / "rm", values=2, gated=False, tokenizer=tokenizer)
    bundle = export(tmp_path / "rm", tmp_path / "bundle")
    assert bundle.manifest.spec.family == "general-preference"
    runtime = RewardModel.load(tmp_path / "bundle", provider="cpu", padding=True)
    rows = make_pairs(24)
    expected = []
    for row in rows:
        ids = [tokenizer(f"{row['prompt']} {row[side]} </s>")["input_ids"] for side in ("chosen", "rejected")]
        assert ids[0][-1] == ids[1][-1] == 2
        expected.append(compare(*states(model, ids), 1, head, None))
    found = np.array([row["margin"] for row in score(runtime, rows)])
    assert np.abs(found - expected).max() < TOLERANCE * np.std(expected)


def test_a_value_head_with_one_output_is_openrlhfs_where_its_files_say_so_and_else_a_question(tmp_path: Path) -> None:
    write_openrlhf(tmp_path / "rm", prefix=None, head_name="value_head")
    assert choose_family(read_source(tmp_path / "rm")).name == "openrlhf"
    for architecture in ("LlamaForCausalLM", "CustomRewardModel"):
        edit_json(tmp_path / "rm" / "config.json", architectures=[architecture])
        with pytest.raises(CheckpointError, match=r"matches 2 families \(openrlhf: .*; general-preference: .*--family"):
            choose_family(read_source(tmp_path / "rm"))
    with pytest.raises(CheckpointError, match=r"value_head.weight: one output, which compares nothing"):
        export(tmp_path / "rm", tmp_path / "bundle", family="general-preference")
    add_tensors(tmp_path / "rm", {"value_head.weight": torch.randn(6, 32)})
    assert choose_family(read_source(tmp_path / "rm")).name == "general-preference"


@pytest.mark.parametrize("halves", [1, 3])
def test_a_gate_of_another_size_than_half_the_vector_is_refused(tmp_path: Path, halves: int) -> None:
    write_general_preference(tmp_path / "rm", values=4, tokenizer=make_tokenizer())
    add_tensors(tmp_path / "rm", {"prompt_head.weight": torch.randn(halves, 32)})
    with pytest.raises(CheckpointError, match="4 outputs; expected an even number for a skew product, and half as"):
        export(tmp_path / "rm", tmp_path / "bundle")


def test_the_page_shows_every_comparison(gated: Any) -> None:
    ranked = RewardModel.load(gated[0]).rank(prompt=PROMPT, responses=ANSWERS)
    with serving(gated[0]) as server, chromium() as browser, opened(browser, server.url) as page:
        fill(page, [ANSWERS[0], ""])
        page.get_by_role("button", name="Score").click()
        wait_for(page, "#status.bad", "This model compares answers: write at least two.")
        fill(page, ["", *ANSWERS])  # an empty one before them moves no comparison
        press_score(page)
        assert shown(page) == [(answer.response, float(str(np.float32(answer.reward)))) for answer in ranked]
        names = [f"answer {answer.index + 2}" for answer in ranked]
        heads, *lines = table(page, "By how much an answer (line) is better than another (column)")
        assert heads == ["", *names]
        assert [line[0] for line in lines] == names
        expected = [[answer.comparisons[other.index] for other in ranked] for answer in ranked]
        assert np.float32([line[1:] for line in lines]).tolist() == np.float32(expected).tolist()
        assert_accessible(page)
