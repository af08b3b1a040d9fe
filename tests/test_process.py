"""Process reward models: every step's reward against the reference of its family, written out here."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForTokenClassification

from checkpoints import make_tokenizer
from checkpoints_process import (
    make_metaspace_tokenizer,
    write_language_model,
    write_qwen_prm,
    write_skywork_prm,
    write_trl_prm,
)
from commands import run
from page_browser import assert_accessible, chromium, fill, opened, press_score, shown, wait_for
from rewardrt import RewardModel, RewardRTError, RowError, Scored, TruncationWarning
from rewardrt.bundle.spec import Spec, Tap, from_json, to_json
from rewardrt.checks.verify import verify
from rewardrt.errors import BundleError, CheckpointError
from rewardrt.evaluate.sources import Options
from rewardrt.scoring.scored import fill_row
from rewardrt.text.items import Steps
from rewardrt.text.rows import parse_row
from rewardrt_export.checkpoint import read_checkpoint
from rewardrt_export.pipeline import export
from saying_model import by_hand, numbers, score
from server_process import serving
from texts import make_texts

TOLERANCE = 1e-4  # standard deviations of the rewards
MAX_LENGTH = 512
DETECTED = {"qwen-prm", "trl-prm", "skywork-prm"}

Row = dict[str, Any]
Reference = Callable[[str, list[str]], list[float]]  # the rewards of the steps


def make_rows(count: int = 28) -> list[Row]:
    """Return problems and their steps, with line ends and plus signs inside of both."""
    rng = random.Random(7)
    rows = []
    for index in range(count):
        prompt, *steps = make_texts(1 + rng.randint(1, 5), longest=7, seed=index)
        if index % 3 == 0:
            prompt, steps[0] = f"{prompt}\nWhat is 2+3?", f"{steps[0]} 2+3 = +5,\nand 1 + 1 = 2."
        rows.append({"prompt": prompt.strip() + "?", "steps": [step.strip() + "." for step in steps]})
    return rows


ROWS = make_rows()


def qwen(folder: Path) -> Reference:
    model, score = write_qwen_prm(folder)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<extra_0>"])

    def reference(prompt: str, steps: list[str]) -> list[float]:
        """The model card: steps joined by <extra_0> and one at the end; softmax, label 1."""
        answer = "<extra_0>".join(steps) + "<extra_0>"
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        ids = torch.tensor([tokenizer.encode(tokenizer.apply_chat_template(messages, tokenize=False))])
        probabilities = torch.softmax(score(model(ids).last_hidden_state), -1)
        return probabilities[ids == tokenizer.convert_tokens_to_ids("<extra_0>")][:, 1].tolist()

    return reference


def trl(folder: Path) -> Reference:
    model = write_trl_prm(folder)
    tokenizer = make_tokenizer()

    def reference(prompt: str, steps: list[str]) -> list[float]:
        """PRMTrainer.tokenize_row: everything apart, the label on the last token of the separator."""
        ids, labelled = [tokenizer.bos_token_id], [False]
        for text, has_label in [(prompt, False), *((step, True) for step in steps)]:
            more = tokenizer(text, add_special_tokens=False)["input_ids"]
            more = more + tokenizer.encode("\n", add_special_tokens=False) if has_label else more
            ids += more
            labelled += [False] * (len(more) - 1) + [has_label]
        logits = model(torch.tensor([ids])).logits[0]
        return torch.softmax(logits, -1)[torch.tensor(labelled)][:, 1].tolist()

    return reference


def shepherd(folder: Path) -> Reference:
    tokenizer = make_metaspace_tokenizer()
    model = write_language_model(folder, "mistral", tokenizer)

    def reference(prompt: str, steps: list[str]) -> list[float]:
        """The model card: question and lines that end with ки; the logits of + and - there."""
        candidates = tokenizer.encode("+ -")[1:]
        ids = torch.tensor([tokenizer.encode(f"{prompt} " + "\n".join(f"{step} ки" for step in steps))])
        assert ids[0, 0] == tokenizer.bos_token_id
        scores = model(ids).logits[:, :, candidates].softmax(dim=-1)[:, :, 0]
        return scores[ids == tokenizer.encode("ки")[-1]].tolist()

    return reference


def rlhflow(folder: Path) -> Reference:
    tokenizer = make_tokenizer()
    model = write_language_model(folder, "llama", tokenizer)

    def reference(prompt: str, steps: list[str]) -> list[float]:
        """prm_evaluate.py: a conversation that grows by a step and its +, scored where the last + is predicted."""
        candidates = [tokenizer.encode("+")[-1], tokenizer.encode("-")[-1]]
        conversation, scores = [], []
        for index, step in enumerate(steps):
            conversation.append({"role": "user", "content": f"{prompt} {step}" if index == 0 else step})
            conversation.append({"role": "assistant", "content": "+"})
            ids = tokenizer.apply_chat_template(conversation, tokenize=True)["input_ids"]
            assert tokenizer.decode(ids[-3:]) == "+<|im_end|>\n"  # so + is predicted by the fourth from the end
            logits = model(torch.tensor([ids])).logits[:, -4, candidates]
            scores.append(logits.softmax(dim=-1)[0, 0].item())
        return scores

    return reference


def skywork(folder: Path) -> Reference:
    model, summary = write_skywork_prm(folder)
    tokenizer = make_tokenizer()

    def reference(prompt: str, steps: list[str]) -> list[float]:
        """prepare_input and PRM_MODEL: BOS, problem and line end; steps and line ends apart; sigmoid of the value."""
        ids = tokenizer.encode(tokenizer.bos_token + prompt + "\n")
        flags = [0] * len(ids)
        for step in steps:
            step_ids = [*tokenizer.encode(step), tokenizer.encode("\n")[-1]]
            ids += step_ids
            flags += [0] * (len(step_ids) - 1) + [1]
        value = summary(model.model(torch.tensor([ids])).last_hidden_state)[0, :, 0]
        return torch.sigmoid(value)[torch.tensor(flags) == 1].tolist()

    return reference


WRITERS: dict[str, Callable[[Path], Reference]] = {
    "qwen-prm": qwen,
    "trl-prm": trl,
    "math-shepherd": shepherd,
    "rlhflow-prm": rlhflow,
    "skywork-prm": skywork,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Reference]]:
    """Write and export a checkpoint of a family, once for all tests."""
    done: dict[str, tuple[Path, Reference]] = {}

    def make(name: str) -> tuple[Path, Reference]:
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            reference = WRITERS[name](folder / "rm")
            # What the folder says by itself is not said again.
            bundle = export(folder / "rm", folder / "bundle", family=None if name in DETECTED else name)
            assert bundle.manifest.spec.family == name
            done[name] = folder, reference
        return done[name]

    return make


@pytest.fixture(scope="module")
def qwen_folder(made: Any) -> Path:
    folder: Path = made("qwen-prm")[0]
    return folder


@pytest.fixture(scope="module")
def qwen_model(qwen_folder: Path) -> RewardModel:
    return RewardModel.load(qwen_folder / "bundle", provider="cpu")


def steps_of(results: list[Scored | RewardRTError]) -> np.ndarray:
    for result in results:
        assert isinstance(result, Scored), result
        assert np.isnan(result.reward)
    return np.concatenate([result.steps for result in results if isinstance(result, Scored)])


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_every_step_is_rewarded_as_in_the_reference(made: Any, name: str) -> None:
    folder, reference = made(name)
    with torch.inference_mode():
        by_row = [reference(row["prompt"], row["steps"]) for row in ROWS]
    assert [len(rewards) for rewards in by_row] == [len(row["steps"]) for row in ROWS]
    expected = np.concatenate(by_row)
    assert expected.std() > 0.05  # the rewards tell the steps apart
    runtime = RewardModel.load(folder / "bundle", provider="cpu")
    single = steps_of([result for row in ROWS for result in runtime.score_rows([row])])
    together = steps_of(runtime.score_rows(ROWS))
    padded = steps_of(RewardModel.load(folder / "bundle", provider="cpu", padding=True).score_rows(ROWS))
    worst = max(np.abs(found - expected).max() for found in (single, padded)) / expected.std()
    assert worst < TOLERANCE
    assert (together == single).all()  # bit for bit, in any company


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_the_certificate_compares_every_step(made: Any, name: str) -> None:
    folder, _ = made(name)
    golden = [json.loads(line) for line in (folder / "bundle" / "golden.jsonl").read_text().splitlines()]
    assert len(golden) >= 20
    for text in golden:
        assert len(text["rewards"]) == len(text["positions"]) >= 1
        assert len(text["rewards"]) == len(text["row"].get("steps", text["rewards"]))
    assert max(len(text["rewards"]) for text in golden) >= 4
    # Raw texts with step tokens, one of them cut; probes may hold some too.
    texts = [text for text in golden if "text" in text["row"]]
    raw = [text for text in texts if not any(probe in text["row"]["text"] for probe in ("<unk>", "ＡＢＣ"))]
    assert len(raw) == 3
    assert sum(text["truncated"] > 0 for text in golden) == 1


def test_verification_fails_on_one_step_of_one_text(tmp_path: Path, qwen_folder: Path) -> None:
    copied = Path(shutil.copytree(qwen_folder / "bundle", tmp_path / "copied"))
    assert verify(RewardModel.load(copied, provider="cpu")).passed
    lines = (copied / "golden.jsonl").read_text().splitlines()
    index = next(number for number, line in enumerate(lines) if len(json.loads(line)["rewards"]) >= 3)
    changed = json.loads(lines[index])
    changed["rewards"][1] += 0.01
    lines[index] = json.dumps(changed)
    (copied / "golden.jsonl").write_text("\n".join(lines) + "\n")
    manifest = json.loads((copied / "reward.json").read_text())
    (record,) = [record for record in manifest["files"] if record["path"] == "golden.jsonl"]
    record["bytes"] = (copied / "golden.jsonl").stat().st_size
    (copied / "reward.json").write_text(json.dumps(manifest))
    found = verify(RewardModel.load(copied, provider="cpu", check_hashes=False))
    assert not found.passed
    assert found.single.max_absolute == pytest.approx(0.01, rel=0.01)


def test_the_graph_gives_a_reward_at_every_token_and_the_last_ones_beside(qwen_model: RewardModel) -> None:
    ids = np.array([[5, 6, 300, 7, 300], [300, 8, 9, 0, 0]], dtype=np.int64)
    lengths = np.array([5, 3], dtype=np.int64)
    every = qwen_model.session.run(ids, lengths, output="token_rewards")
    assert (every.shape, every.dtype) == ((2, 5, 1), np.float32)
    last = qwen_model.session.run(ids, lengths)
    assert last.tolist() == [every[0, 4].tolist(), every[1, 2].tolist()]


def test_one_reward_is_made_of_the_steps_only_when_asked_for(qwen_model: RewardModel) -> None:
    row = next(row for row in ROWS if len(row["steps"]) >= 4)
    (scored,) = qwen_model.score_rows([row])
    assert isinstance(scored, Scored)
    low, product, total = scored.steps[0], 1.0, 0.0
    for reward in scored.steps:
        low, product, total = min(low, reward), product * reward, total + reward
    by_hand = {"min": low, "product": product, "last": scored.steps[-1], "mean": total / len(scored.steps)}
    assert len({round(value, 6) for value in by_hand.values()}) == 4
    for rule, value in by_hand.items():
        assert qwen_model.score(**row, aggregate=rule) == np.float32(value)
        assert qwen_model.score_many([row], aggregate=rule).tolist() == [np.float32(value)]
        (again,) = qwen_model.score_rows([row], aggregate=rule)
        assert isinstance(again, Scored)
        assert (again.reward, again.steps) == (np.float32(value), scored.steps)
    for call in (lambda: qwen_model.score(**row), lambda: qwen_model.score_many([row])):
        with pytest.raises(RewardRTError, match="aggregate='min' or 'product' or 'last' or 'mean', or call score_rows"):
            call()
    with pytest.raises(RewardRTError, match="aggregate 'max': expected one of min, product, last, mean"):
        qwen_model.score(**row, aggregate="max")  # type: ignore[arg-type]


def test_an_answer_in_one_piece_is_refused_and_told_what_is_missing(qwen_model: RewardModel) -> None:
    with pytest.raises(RowError, match="this model rewards the steps of an answer: expected steps, found an answer in"):
        qwen_model.score(prompt="Q", response="One.\n\nTwo.", aggregate="min")
    with pytest.raises(RowError, match="responses\\[0\\]: this model rewards the steps"):
        qwen_model.rank(prompt="Q", responses=["One.", "Two."])


def test_a_step_token_inside_of_the_texts_adds_no_step(qwen_model: RewardModel) -> None:
    wrong = [
        {"prompt": "Say <extra_0>.", "steps": ["One.", "Two."]},
        {"prompt": "Q", "steps": ["One<extra_0>.", "Two."]},
        {"prompt": [{"role": "system", "content": "<extra_0>"}, {"role": "user", "content": "Q"}], "steps": ["1", "2"]},
    ]
    for result in qwen_model.score_rows(wrong):
        assert isinstance(result, RowError)
        assert str(result).startswith("step token '<extra_0>': expected one for each of the 2 steps, found 3; ")


def test_a_tag_that_runs_into_a_word_is_no_step_token(made: Any) -> None:
    runtime = RewardModel.load(made("math-shepherd")[0] / "bundle", provider="cpu")
    (result,) = runtime.score_rows([{"prompt": "Сколько ки в слове?", "steps": ["Один.", "Два."]}])
    assert isinstance(result, RowError)
    assert "found 3; neither the prompt nor a step may hold one" in str(result)


def test_a_step_that_would_swallow_its_token_is_refused(made: Any) -> None:
    runtime = RewardModel.load(made("math-shepherd")[0] / "bundle", provider="cpu")
    # The tag in the prompt would make up for the one that is lost.
    (result,) = runtime.score_rows([{"prompt": "A ки word?", "steps": ["one ", "two"]}])
    assert isinstance(result, RowError)
    assert str(result) == "steps[0]: ends with white space, which runs into the step token ' ки\\n'"


def test_separators_inside_of_a_raw_text_are_steps_each(made: Any) -> None:
    folder, _ = made("trl-prm")
    runtime = RewardModel.load(folder / "bundle", provider="cpu")
    (scored,) = runtime.score_rows([{"text": "a\nb c\nd"}])
    assert isinstance(scored, Scored)
    assert len(scored.steps) == 2  # nothing is appended: what follows the last separator has no reward
    (none,) = runtime.score_rows([{"text": "no line ends"}])
    assert isinstance(none, RowError)
    assert str(none).startswith("step token '\\n': expected at least one, found 0; ")


def test_a_raw_text_with_step_tokens_is_scored_as_sent(qwen_model: RewardModel) -> None:
    steps = ["One.", "Two."]
    text = qwen_model.answers.renderer.render(Steps("Q", tuple(steps))).text
    raw, row = qwen_model.score_rows([{"text": text}, {"prompt": "Q", "steps": steps}])
    assert isinstance(raw, Scored) and isinstance(row, Scored)
    assert (raw.steps, raw.tokens) == (row.steps, row.tokens)


def test_a_text_whose_cut_would_lose_a_step_is_refused_and_another_is_cut(qwen_model: RewardModel) -> None:
    fill = "word " * 200
    lost, kept = qwen_model.score_rows(
        [{"prompt": "Q", "steps": ["One.", fill, "Three."]}, {"text": f"Q One.<extra_0> {fill}"}]
    )
    assert isinstance(lost, RowError)
    assert str(lost).startswith(f"2 of 3 steps lie beyond {MAX_LENGTH} tokens, where the text is cut; ")
    assert isinstance(kept, Scored)
    assert (len(kept.steps), kept.tokens) == (1, MAX_LENGTH)
    assert kept.truncated > 0
    with pytest.warns(TruncationWarning, match="1 of 1 texts were cut at 512 tokens"):
        qwen_model.score(text=f"Q One.<extra_0> {fill}", aggregate="min")


def test_a_graph_without_token_rewards_is_refused(tmp_path: Path, qwen_folder: Path, tiny_bundle: Path) -> None:
    copied = Path(shutil.copytree(tiny_bundle, tmp_path / "copied"))
    manifest = json.loads((copied / "reward.json").read_text())
    stepwise = json.loads((qwen_folder / "bundle" / "reward.json").read_text())["spec"]
    manifest["spec"] |= {name: stepwise[name] for name in ("input", "text", "taps", "heads")}
    (copied / "reward.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="rewards steps, and its graph has no output token_rewards"):
        RewardModel.load(copied, provider="cpu", check_hashes=False)


def test_a_model_of_one_reward_scores_the_response_beside_steps_and_aggregates_nothing(tiny_bundle: Path) -> None:
    runtime = RewardModel.load(tiny_bundle, provider="cpu")
    whole = runtime.score(prompt="Q", response="One. Two.")
    assert runtime.score(prompt="Q", response="One. Two.", steps=["One.", "Two."]) == whole
    with pytest.raises(RowError, match="gives one reward to an answer: expected response, found steps"):
        runtime.score(prompt="Q", steps=["One.", "Two."])
    with pytest.raises(RewardRTError, match="aggregate 'min': this model gives one reward to a text"):
        runtime.score(prompt="Q", response="One. Two.", aggregate="min")


def test_rows_with_steps_come_out_with_a_reward_for_each(tmp_path: Path, qwen_folder: Path) -> None:
    rows: list[Row] = [
        {"id": 1, "prompt": "Q", "steps": ["One.", "Two."], "response": "One. Two.", "reward": 9},
        {"id": 2, "text": "Q One.<extra_0>"},
        {"id": 3, "prompt": "Q", "response": "One. Two."},
        {"id": 4, "prompt": "Q", "steps": []},
        {"id": 5, "messages": [{"role": "user", "content": "Q"}], "steps": ["One.", "Two."]},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("score", qwen_folder / "bundle", tmp_path / "in.jsonl", "--provider", "cpu")
    assert result.returncode == 1
    plain = [json.loads(line) for line in result.stdout.splitlines()]
    assert [len(row.get("step_rewards", ())) for row in plain] == [2, 1, 0, 0, 2]
    assert list(plain[0]) == ["id", "prompt", "steps", "response", "step_rewards", "tokens", "truncated"]
    assert plain[0]["step_rewards"] == plain[4]["step_rewards"]
    assert [row.get("error", "")[:40] for row in plain[2:4]] == [
        "this model rewards the steps of an answe",
        "steps: expected a list of at least one s",
    ]
    result = run("score", qwen_folder / "bundle", tmp_path / "in.jsonl", "--aggregate", "product", "--provider", "cpu")
    products = [json.loads(line) for line in result.stdout.splitlines()]
    for row, before in zip(products, plain, strict=True):
        if "step_rewards" in before:
            assert row == before | {"reward": row["reward"]}
            assert row["reward"] == pytest.approx(float(np.prod(before["step_rewards"])), rel=1e-6)
        else:
            assert row == before
    table = run("score", qwen_folder / "bundle", tmp_path / "in.jsonl", "--table", "--provider", "cpu").stdout
    first = [f"{reward:9.4f}  {step}" for reward, step in zip(plain[0]["step_rewards"], rows[0]["steps"], strict=True)]
    assert table.splitlines()[:4] == ["Q", *first, ""]


def test_the_command_says_what_goes_together(qwen_folder: Path, tiny_bundle: Path) -> None:
    result = run("score", qwen_folder / "bundle", "--prompt", "Q", "--response", "A", "--aggregate", "min")
    assert (result.returncode, "--aggregate is for rows with steps" in result.stderr) == (2, True)
    result = run("score", tiny_bundle, "-", "--aggregate", "min", stdin=b'{"text": "a"}\n')
    assert (result.returncode, "this model gives one reward to a text" in result.stderr) == (2, True)
    shown = run("inspect", qwen_folder / "bundle").stdout
    assert "  text       chat template -> '<extra_0>' after every step -> no special tokens added" in shown
    assert "  pooling    all_ids [300]" in shown


def test_steps_are_parsed_from_every_shape_of_a_row() -> None:
    user, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "One. Two."}
    steps = ["One.", "Two."]
    assert parse_row({"prompt": "Q", "steps": steps}).items == (Steps("Q", ("One.", "Two.")),)
    assert parse_row({"messages": [user], "steps": steps}).items == (Steps((user,), ("One.", "Two.")),)
    whole = Steps("Q", ("One.", "Two."), "One. Two.")
    assert parse_row({"prompt": "Q", "steps": steps, "response": "One. Two."}).items == (whole,)
    whole = Steps((user,), ("One.", "Two."), "One. Two.")
    assert parse_row({"messages": [user, answer], "steps": tuple(steps)}).items == (whole,)
    # Where another field says what is scored, `steps` is the user's own.
    assert parse_row({"prompt": "Q", "response": "A", "steps": 3}) == parse_row({"prompt": "Q", "response": "A"})
    assert parse_row({"text": "A", "steps": steps}) == parse_row({"text": "A"})
    for wrong, message in (
        ({"prompt": "Q", "steps": "One."}, "steps: expected a list of at least one string, found str"),
        ({"prompt": "Q", "steps": []}, "steps: expected a list of at least one string, found an empty list"),
        ({"prompt": "Q", "steps": ["One.", 2]}, "steps[1]: expected a string, found int"),
        ({"prompt": "Q", "steps": ["One.", ""]}, "steps[1]: expected at least one character, found an empty string"),
        ({"prompt": "", "steps": steps}, "prompt: expected at least one character, found an empty string"),
    ):
        with pytest.raises(RowError, match=f"^{re.escape(message)}$"):
            parse_row(wrong)


def test_step_rewards_are_the_shortest_decimals_of_their_float32() -> None:
    steps = tuple(float(np.float32(value)) for value in (0.1, 1 / 3))
    filled = fill_row({"reward": 4}, Scored(float("nan"), 5, 0, steps=steps))
    assert filled == {"step_rewards": [0.1, 0.33333334], "tokens": 5, "truncated": 0}
    filled = fill_row({}, Scored(steps[0], 5, 0, steps=steps))
    assert list(filled.items())[:2] == [("step_rewards", [0.1, 0.33333334]), ("reward", 0.1)]


def test_only_a_classifier_of_two_labels_is_taken_for_a_process_model(tmp_path: Path) -> None:
    write_trl_prm(tmp_path / "ner", labels=9)
    with pytest.raises(CheckpointError, match="LlamaForTokenClassification is not a reward model of a known family"):
        read_checkpoint(tmp_path / "ner")


def test_a_language_model_is_a_process_model_only_by_name(tmp_path: Path) -> None:
    write_language_model(tmp_path / "rm", "llama", make_tokenizer())
    with pytest.raises(CheckpointError, match="LlamaForCausalLM is not a reward model of a known family"):
        read_checkpoint(tmp_path / "rm")
    checkpoint = read_checkpoint(tmp_path / "rm", family="rlhflow-prm")
    (layer,) = checkpoint.spec.heads[0].layers
    assert layer.weight == "lm_head.weight"
    add = load_file(tmp_path / "rm" / "model.safetensors") | {"value.weight": torch.ones(1, 32)}
    save_file(add, tmp_path / "rm" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 tensors are left over, .*: value.weight; a reward would ignore them"):
        read_checkpoint(tmp_path / "rm", family="rlhflow-prm")


def test_a_tied_head_is_read_off_the_embedding_which_the_backbone_keeps(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    model = write_language_model(tmp_path / "rm", "llama", tokenizer, tied=True)
    assert "lm_head.weight" not in load_file(tmp_path / "rm" / "model.safetensors")
    checkpoint = read_checkpoint(tmp_path / "rm", family="rlhflow-prm")
    plus, minus = tokenizer.encode("+")[-1], tokenizer.encode("-")[-1]
    (read,) = checkpoint.head().sources.values()
    assert torch.equal(read(), model.lm_head.weight[[plus, minus]])
    assert torch.equal(checkpoint.backbone.sources["embed_tokens.weight"].read(), model.lm_head.weight)


def test_a_tokenizer_that_cannot_hold_the_steps_is_refused(tmp_path: Path) -> None:
    write_language_model(tmp_path / "rm", "llama", make_tokenizer(template=None))
    with pytest.raises(CheckpointError, match="no chat template; RLHFlow's steps are turns of a conversation"):
        read_checkpoint(tmp_path / "rm", family="rlhflow-prm")
    write_qwen_prm(tmp_path / "qwen")
    make_tokenizer().save_pretrained(tmp_path / "qwen")
    with pytest.raises(CheckpointError, match="the tokenizer has no token '<extra_0>'"):
        read_checkpoint(tmp_path / "qwen")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("score.2.weight", "score.2.bias"), "no reward head: the qwen-prm spec needs score.2.weight"),
        (("score.0.bias",), "no reward head: the qwen-prm spec needs score.0.bias"),
    ],
)
def test_a_lost_head_stops_the_export(tmp_path: Path, names: tuple[str, ...], message: str) -> None:
    write_qwen_prm(tmp_path / "rm")
    state = load_file(tmp_path / "rm" / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if name not in names}
    save_file(kept, tmp_path / "rm" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "rm")


def test_a_head_of_three_labels_is_no_qwen_prm(tmp_path: Path) -> None:
    write_qwen_prm(tmp_path / "rm")
    state = load_file(tmp_path / "rm" / "model.safetensors")
    state |= {"score.2.weight": torch.ones(3, 32), "score.2.bias": torch.ones(3)}
    save_file(state, tmp_path / "rm" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"score.2.weight: expected two labels, wrong and right, found .*\[3, 32\]"
    ):
        read_checkpoint(tmp_path / "rm")


def test_a_spec_of_steps_is_whole_or_refused(qwen_model: RewardModel) -> None:
    data = json.loads(json.dumps(to_json(qwen_model.spec)))
    assert from_json(Spec, data) == qwen_model.spec
    text, tap = data["text"], data["taps"][0]
    for change, message in (
        ({"text": text | {"step_token": ""}}, "input 'steps' with step_token ''"),
        ({"input": "single", "taps": [to_json(Tap("step"))]}, "input 'single' with step_token '<extra_0>'"),
        ({"taps": [tap, to_json(Tap())]}, "input 'steps': expected one tap and no labels"),
        ({"text": text | {"step_layout": "apart"}}, "step_layout 'apart' needs the source concatenate, or a format"),
        ({"text": text | {"step_layout": "turns", "source": "concatenate"}}, "step_layout 'turns' needs the source"),
    ):
        with pytest.raises(BundleError, match=message):
            from_json(Spec, data | json.loads(json.dumps(change)))


def test_an_encoder_that_labels_tokens_is_no_process_model(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    BertForTokenClassification(config).save_pretrained(tmp_path / "tagger")
    make_tokenizer().save_pretrained(tmp_path / "tagger")
    with pytest.raises(CheckpointError, match="BertForTokenClassification is not a reward model of a known family"):
        read_checkpoint(tmp_path / "tagger")


def test_processbench_is_what_its_own_code_makes_of_the_step_rewards(tmp_path: Path, qwen_model: RewardModel) -> None:
    rows: list[dict[str, Any]] = []
    for at in range(40):
        problem, *steps = make_texts(4, longest=8, seed=500 + at)
        name = f"{('gsm8k', 'olympiadbench')[at % 2]}-{at}"
        rows.append(
            {"id": name, "generator": "g", "problem": f"{problem}?", "steps": [f"{step}." for step in steps],
             "final_answer_correct": True, "label": at // 2 % 4 - 1}
        )  # fmt: skip
    rows.append(rows[0] | {"id": "gsm8k-99", "steps": ["a", ""]})  # fails
    for subset in ("gsm8k", "olympiadbench"):
        of = [row for row in rows if row["id"].startswith(subset)]
        (tmp_path / f"{subset}.json").write_text(json.dumps(of, indent=2))
    rewards = [qwen_model.score_rows([{"prompt": row["problem"], "steps": row["steps"]}])[0] for row in rows[:-1]]
    steps = [getattr(each, "steps", ()) for each in rewards]
    threshold = float(np.median([reward for each in steps for reward in each]))
    options = Options(threshold=threshold)
    files = (tmp_path / "gsm8k.json", tmp_path / "olympiadbench.json")
    found = by_hand(qwen_model, *files, options=options)
    f1 = {}
    for subset in ("gsm8k", "olympiadbench"):
        matches: dict[bool, list[bool]] = {True: [], False: []}
        for row, each in zip(rows, steps, strict=False):
            if row["id"].startswith(subset):
                prediction = next((index for index, reward in enumerate(each) if reward < threshold), -1)
                matches[row["label"] == -1].append(prediction == row["label"])
        correct, error = (float(np.mean(matches[kind])) for kind in (True, False))
        assert correct + error > 0
        f1[subset] = 2 * correct * error / (correct + error)
        assert numbers(found)[f"{subset}: error accuracy"] == error
        assert numbers(found)[f"{subset}: correct accuracy"] == correct
    assert {name: numbers(found)[name] for name in f1} == pytest.approx(f1)
    assert found.score.value == pytest.approx(np.mean(list(f1.values())))
    assert (found.rows, found.failed) == (41, 1)
    scores = score(qwen_model, *files, options=options)
    assert scores.results.rewards.tolist() == [
        reward for order in (0, 1) for each in steps[order::2] for reward in each
    ], "the rewards are those of score_rows, bit for bit"


def test_the_page_shows_the_reward_of_each_step(qwen_folder: Path, qwen_model: RewardModel) -> None:
    prompt = "What is 2 + 3?"
    answers = ["2 + 3 is 5.\n\nSo it is 5.\n", "It is 7.\nSo it is 7.\nDone.", "It is <extra_0>."]
    steps = [[step for step in answer.split("\n") if step] for answer in answers]
    scored = qwen_model.score_rows([{"prompt": prompt, "steps": each} for each in steps[:2]], aggregate="min")
    expected = [(float(str(np.float32(one.reward))), one) for one in scored if isinstance(one, Scored)]
    order = sorted(range(2), key=lambda index: -expected[index][0])
    with serving(qwen_folder / "bundle") as server, chromium() as browser, opened(browser, server.url) as page:
        fill(page, answers, prompt)
        press_score(page)
        wait_for(page, "#ranking > li", "Not scored: step token '<extra_0>': expected one for each of the 1 steps")
        page.get_by_role("button", name="Remove answer 3").click()
        press_score(page)
        assert [reward for _, reward in shown(page)] == [expected[index][0] for index in order]
        for item, index in zip(page.locator("#ranking > li").all(), order, strict=True):
            assert item.locator(".step > span:first-of-type").all_text_contents() == steps[index]
            values = [
                float(value) for value in item.locator(".step data").evaluate_all("all => all.map(each => each.value)")
            ]
            assert values == [float(str(np.float32(reward))) for reward in expected[index][1].steps]
            least = item.locator(".step").filter(has_text="least")
            assert float(least.locator("data").get_attribute("value")) == min(values)
        assert_accessible(page)
