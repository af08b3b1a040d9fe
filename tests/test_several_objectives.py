"""Heads with several outputs: --weights, --objectives, ODIN and URM; the raw reward is always the default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from checkpoints import add_tensors, edit_json, make_tokenizer, write_sequence_classification
from checkpoints_gated import HIDDEN, linear, mlp_head, write_language_model, write_with_head
from commands import run
from parity import assert_parity, hidden_states
from rewardrt import RewardModel, RewardRTError
from rewardrt.cli.app import app
from rewardrt_export.checkpoint import read_checkpoint
from rewardrt_export.families import FAMILIES
from rewardrt_export.pipeline import export
from texts import make_conversations

LABELS = {"0": "helpfulness", "1": "correctness", "2": "verbosity"}
WEIGHTS = (0.5, 0.3, -0.2)
PAIR = {"prompt": "Say hi.", "chosen": "Hi! What can I do?", "rejected": "no"}
RANKING = {"prompt": "Say hi.", "responses": ["Hi!", "no", "the lazy dog"]}


def conversations_of() -> tuple[list[dict[str, Any]], list[list[int]]]:
    tokenizer = make_tokenizer()
    conversations = make_conversations(24, longest=20)
    ids = [tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"] for messages in conversations]
    return [{"messages": messages} for messages in conversations], ids


@pytest.fixture(scope="module")
def vector(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A SteerLM-like reward model: three attributes, a head with bias, weights from the command line."""
    folder = tmp_path_factory.mktemp("vector")
    model = write_sequence_classification(folder / "rm", labels=3, num_hidden_layers=1)
    bias = torch.tensor([0.7, -1.3, 2.1])
    add_tensors(folder / "rm", {"score.bias": bias})
    edit_json(folder / "rm" / "config.json", id2label=LABELS, label2id=None, problem_type="single_label_classification")
    weights = ",".join(map(str, WEIGHTS))
    done = CliRunner().invoke(app, ["export", str(folder / "rm"), str(folder / "bundle"), "--weights", weights])
    assert done.exit_code == 0, done.output
    return folder, model, bias


def test_several_labels_are_weighted_and_a_biased_head_keeps_its_bias(vector: Any) -> None:
    folder, model, bias = vector
    rows, ids = conversations_of()
    with torch.inference_mode():
        values = torch.stack([model.score(hidden_states(model.model, each)[-1]) + bias for each in ids])
    expected = values @ torch.tensor(WEIGHTS)
    runtime = assert_parity(folder / "bundle", rows, expected.tolist())
    assert runtime.spec.output.labels == ("helpfulness", "correctness", "verbosity")
    found = np.array([result.objectives for result in runtime.score_rows(rows)])
    assert np.abs(found - values.numpy()).max() < 1e-5
    # Neither the sigmoid nor the softmax that transformers' pipeline would choose by problem_type and label count.
    assert expected.max() > 1 and expected.min() < 0
    assert runtime.spec.output.function == "identity"


def test_rows_come_out_with_their_objectives_only_when_asked_for(vector: Any, tmp_path: Path) -> None:
    folder, *_ = vector
    rows = [{"text": "the lazy dog"}, RANKING, PAIR, {"text": ""}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = run("score", folder / "bundle", tmp_path / "in.jsonl", "--objectives")
    plain = run("score", folder / "bundle", tmp_path / "in.jsonl")
    assert asked.returncode == plain.returncode == 1  # the last row is empty
    named, bare = ([json.loads(line) for line in done.stdout.splitlines()] for done in (asked, plain))
    assert not any("objectives" in row for row in bare)
    assert [{name: value for name, value in row.items() if name != "objectives"} for row in named] == bare
    assert list(named[0]["objectives"]) == ["helpfulness", "correctness", "verbosity"]
    assert "objectives" not in named[3]
    for row, rewards in (
        (named[0], [named[0]["reward"]]),
        (named[1], named[1]["rewards"]),
        (named[2], [named[2]["chosen_reward"], named[2]["rejected_reward"]]),
    ):
        objectives = row["objectives"] if isinstance(row["objectives"], list) else [row["objectives"]]
        assert len(objectives) == len(rewards)
        for values, reward in zip(objectives, rewards, strict=True):
            assert np.dot(list(values.values()), WEIGHTS) == pytest.approx(reward, abs=1e-5)


def test_people_see_the_objectives_under_each_answer(vector: Any, tmp_path: Path) -> None:
    folder, *_ = vector
    command = ["score", str(folder / "bundle"), "--objectives"]
    one = CliRunner().invoke(app, [*command, "--prompt", "Say hi.", "--response", "Hi!"])
    lines = one.stdout.splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["helpfulness", "correctness", "verbosity"]
    values = [float(line.split()[0]) for line in lines[1:]]
    assert np.dot(values, WEIGHTS) == pytest.approx(float(lines[0]), abs=2e-4)
    two = CliRunner().invoke(app, [*command, "--prompt", "Say hi.", "--response", "Hi!", "--response", "no"])
    assert two.stdout.count("helpfulness") == 2
    (tmp_path / "in.jsonl").write_text(json.dumps(PAIR) + "\n" + json.dumps({"text": "a", "objectives": "mine"}) + "\n")
    table = CliRunner().invoke(app, [*command, str(tmp_path / "in.jsonl"), "--table"])
    assert table.stdout.count("verbosity") == 3
    plain = CliRunner().invoke(app, ["score", str(folder / "bundle"), str(tmp_path / "in.jsonl"), "--table"])
    assert plain.exit_code == 0 and "verbosity" not in plain.stdout


def test_weights_that_are_missing_or_of_another_count_are_refused_by_name(vector: Any, tmp_path: Path) -> None:
    folder, *_ = vector
    names = r"\(helpfulness, correctness, verbosity\)"
    with pytest.raises(RewardRTError, match=f"expected a reward model with one, or --weights for each {names}"):
        export(folder / "rm", tmp_path / "bundle")
    with pytest.raises(RewardRTError, match=f"3 outputs, but 2 weights; expected one for each {names}"):
        export(folder / "rm", tmp_path / "bundle", weights=(0.5, 0.5))
    with pytest.raises(RewardRTError, match="expected finite numbers"):
        export(folder / "rm", tmp_path / "bundle", weights=(0.5, float("nan"), 1.0))
    done = CliRunner().invoke(app, ["export", "rm", "bundle", "--weights", "0.5;0.3"])
    assert done.exit_code == 2 and "is not a list of numbers such as 0.5,0.3,-0.2" in done.output
    write_sequence_classification(tmp_path / "one", num_hidden_layers=1)
    with pytest.raises(RewardRTError, match=r"score.weight: 1 outputs, but 2 weights"):
        export(tmp_path / "one", tmp_path / "bundle", weights=(0.5, 0.5))
    assert not (tmp_path / "bundle").exists()


def test_two_objectives_may_not_share_a_name(tmp_path: Path) -> None:
    write_sequence_classification(tmp_path / "rm", labels=2, num_hidden_layers=1)
    edit_json(tmp_path / "rm" / "config.json", id2label={"0": "good", "1": "good"}, label2id={"good": 0})
    with pytest.raises(RewardRTError, match=r"labels .* expected names that all differ"):
        export(tmp_path / "rm", tmp_path / "bundle", weights=(1.0, 1.0))


def test_odin_takes_the_quality_head_and_only_by_name(tmp_path: Path) -> None:
    model = write_sequence_classification(tmp_path / "rm", "gemma2", labels=2, num_hidden_layers=1)
    with pytest.raises(RewardRTError, match="2 outputs"):
        read_checkpoint(tmp_path / "rm")
    export(tmp_path / "rm", tmp_path / "bundle", family="odin")
    rows, ids = conversations_of()
    with torch.inference_mode():
        expected = [float(model.score(hidden_states(model.model, each)[-1])[1]) for each in ids]
    runtime = assert_parity(tmp_path / "bundle", rows, expected)
    assert runtime.spec.output.labels == ("length", "quality")


@pytest.mark.parametrize("is_gated", [False, True])
def test_urm_takes_the_means_alone(tmp_path: Path, is_gated: bool) -> None:
    torch.manual_seed(5)
    tensors = linear("score", 10, HIDDEN, bias=False)
    if is_gated:
        for number, rows in ((0, HIDDEN), (2, HIDDEN), (4, 5)):
            tensors |= linear(f"weights.fc.{number}", rows, HIDDEN)
    architecture = f"LlamaForSequenceClassificationWithNormal{'_Weights' if is_gated else ''}"
    config = {"id2label": {str(index): f"LABEL_{index}" for index in range(10)}}
    model = write_with_head(tmp_path / "rm", tensors, architecture=architecture, config=config)
    export(tmp_path / "rm", tmp_path / "bundle")
    rows, ids = conversations_of()
    expected = []
    for each in ids:
        state = hidden_states(model, each)[-1]  # no pad in the texts
        means = (tensors["score.weight"] @ state).view(5, 2)[:, 0]
        weights = torch.tensor([0.3, 0.74, 0.46, 0.47, -0.33])
        if is_gated:
            weights = state
            for number in (0, 2, 4):
                weights = tensors[f"weights.fc.{number}.weight"] @ weights + tensors[f"weights.fc.{number}.bias"]
                weights = torch.nn.functional.selu(weights) if number < 4 else weights
        expected.append(float(means @ weights))
    runtime = assert_parity(tmp_path / "bundle", rows, expected)
    assert runtime.spec.family == "urm"
    assert runtime.spec.output.labels == tuple(
        f"helpsteer-{name}" for name in ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    )


def test_trap_7_no_family_with_a_reward_of_its_own_hides_a_sigmoid_or_a_softmax(tmp_path: Path) -> None:
    """Large heads make rewards outside [0, 1]: what is certified against the formulas elsewhere is raw by spec, too."""
    normal = "LlamaForSequenceClassificationWithNormal"
    written = {
        "sequence-classification": lambda folder: write_sequence_classification(folder, num_hidden_layers=1),
        "mlp-head": lambda folder: write_with_head(folder, mlp_head(), architecture="Qwen2ForRewardModel"),
        "urm": lambda folder: write_with_head(folder, linear("score", 10, HIDDEN, bias=False), architecture=normal),
        "nemotron-lm-row": lambda folder: write_language_model(folder, tied=False),
    }
    for name, write in written.items():
        write(tmp_path / name)
        edit_json(tmp_path / name / "config.json", problem_type="multi_label_classification")
        by_name = None if FAMILIES[name].matches is not FAMILIES["nemotron-lm-row"].matches else name
        spec = read_checkpoint(tmp_path / name, family=by_name).spec
        assert (spec.family, spec.output.function, spec.normalise_by_default) == (name, "identity", False)


def test_a_reward_far_outside_0_to_1_comes_out_as_it_is(tmp_path: Path) -> None:
    model = write_sequence_classification(tmp_path / "rm", num_hidden_layers=1)
    with torch.no_grad():
        model.score.weight.mul_(40)
    model.save_pretrained(tmp_path / "rm")
    edit_json(tmp_path / "rm" / "config.json", problem_type="multi_label_classification")
    export(tmp_path / "rm", tmp_path / "bundle")
    ids = make_tokenizer()("the lazy dog", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        raw = float(model.score(hidden_states(model.model, ids)[-1]))
    assert abs(raw) > 2
    found = RewardModel.load(tmp_path / "bundle", provider="cpu").score(text="the lazy dog")
    assert found == pytest.approx(raw, abs=1e-4)
    assert abs(found - float(torch.sigmoid(torch.tensor(raw)))) > 1
    done = run("score", tmp_path / "bundle", "--prompt", "a", "--response", "b", "--objectives")
    assert done.returncode == 2
    assert "error: --objectives: " in done.stderr and "its reward is not made of several values" in done.stderr
