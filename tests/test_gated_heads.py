"""ArmoRM, QRM and LDL-Reward: several objectives under a gate, their maths written out from the published classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import add_tensors, edit_json, read_tensors
from checkpoints_gated import (
    GEMMA,
    GEMMA_MARKS,
    armorm_head,
    make_marked_tokenizer,
    qrm_head,
    write_ldl,
    write_with_head,
)
from page_browser import ANSWERS, PROMPT, assert_accessible, chromium, fill, opened, press_score, shown, table
from parity import assert_parity, hidden_states
from rewardrt import RewardModel, RewardRTError, RowError
from rewardrt.bundle.spec import Tap
from rewardrt_export.checkpoint import read_checkpoint
from rewardrt_export.pipeline import export
from server_process import serving
from texts import make_conversations

PAD = 3
MAX_LENGTH = 200


def before_first_pad(ids: list[int]) -> int:
    """transformers before its pull request 35911, which the three classes copied."""
    return (int(torch.eq(torch.tensor(ids), PAD).int().argmax(-1)) - 1) % len(ids)


def header_start(ids: list[int], pattern: list[int]) -> int:
    """Where the last occurrence of the pattern begins."""
    for start in range(len(ids) - len(pattern), -1, -1):
        if ids[start : start + len(pattern)] == pattern:
            return start
    raise AssertionError("no header in the text")


def conversations_of(tokenizer: Any) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Rows and their ids, some of them cut at MAX_LENGTH."""
    conversations = make_conversations(24, longest=25)
    rows = [{"messages": messages} for messages in conversations]
    ids = [tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"] for messages in conversations]
    assert any(len(each) > MAX_LENGTH for each in ids) and any(len(each) < MAX_LENGTH for each in ids)
    return rows, [each[:MAX_LENGTH] for each in ids]


def relu_network(tensors: dict[str, torch.Tensor], state: torch.Tensor) -> torch.Tensor:
    """ArmoRM's gating network up to the logits."""
    for number in range(4):
        state = state @ tensors[f"gating.layers.{number}.weight"].T + tensors[f"gating.layers.{number}.bias"]
        state = torch.relu(state) if number < 3 else state
    return state


def batch_norm_network(tensors: dict[str, torch.Tensor], state: torch.Tensor, step: int) -> torch.Tensor:
    """QRM's gating network up to the logits: torch's own modules, in evaluation."""
    for number in (0, step, 2 * step):
        norm = torch.nn.BatchNorm1d(len(tensors[f"gating.layers.{number + 2}.weight"])).eval()
        prefix = f"gating.layers.{number + 2}."
        norm.load_state_dict({name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)})
        with torch.inference_mode():
            state = norm(torch.relu(tensors[f"gating.layers.{number}.weight"] @ state).unsqueeze(0))[0]
    last = f"gating.layers.{2 * step + 3}"
    return tensors[f"{last}.weight"] @ state + tensors[f"{last}.bias"]


@pytest.fixture(scope="module")
def armorm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("armorm")
    tokenizer, tensors = make_marked_tokenizer(), armorm_head()
    config = {"num_objectives": 19, "gating_temperature": 10, "gating_hidden_dim": 48, "gating_n_hidden": 3}
    model = write_with_head(
        folder / "rm", tensors, architecture="LlamaForRewardModelWithGating", config=config, tokenizer=tokenizer
    )
    export(folder / "rm", folder / "bundle", max_length=MAX_LENGTH)
    return folder, model, tensors, tokenizer


def armorm_values(model: Any, tensors: dict[str, torch.Tensor], ids: list[int], header: list[int]) -> Any:
    """LlamaForRewardModelWithGating.forward on one text: score and the 19 rewards."""
    hidden = hidden_states(model, ids)
    rewards = tensors["regression_layer.weight"] @ hidden[before_first_pad(ids)]
    gate = torch.softmax(relu_network(tensors, hidden[header_start(ids, header)]) / 10, -1) * 1.7
    return float((gate * (rewards @ tensors["reward_transform_matrix"])).sum()), rewards.numpy()


def test_armorm_scores_as_its_published_class(armorm: Any) -> None:
    folder, model, tensors, tokenizer = armorm
    header = tokenizer("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", add_special_tokens=False)
    rows, ids = conversations_of(tokenizer)
    values = [armorm_values(model, tensors, each, header["input_ids"]) for each in ids]
    runtime = assert_parity(folder / "bundle", rows, [score for score, _ in values])
    assert runtime.spec.family == "armorm"
    found = np.array([result.objectives for result in runtime.score_rows(rows)])
    expected = np.array([rewards for _, rewards in values])
    assert runtime.spec.output.labels[:2] == ("helpsteer-helpfulness", "helpsteer-correctness")
    assert runtime.spec.output.labels[-1] == "code-readability"
    assert (np.abs(found - expected).max(axis=0) < 1e-4 * expected.std(axis=0)).all()


def test_the_gate_reads_the_prompt_alone(armorm: Any) -> None:
    """With one answer's text changed, the reward changes by the objectives only: the gate is the same."""
    folder, model, tensors, tokenizer = armorm
    header = tokenizer("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", add_special_tokens=False)
    prompt = {"role": "user", "content": "the quick brown fox"}
    gates = []
    for answer in ("jumps over", "the lazy dog asks for more"):
        messages = [prompt, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
        hidden = hidden_states(model, ids)
        gates.append(
            torch.softmax(relu_network(tensors, hidden[header_start(ids, header["input_ids"])]) / 10, -1) * 1.7
        )
        runtime = RewardModel.load(folder / "bundle", provider="cpu")
        result = runtime.score_rows([{"messages": messages}])[0]
        mixed = torch.tensor(result.objectives) @ tensors["reward_transform_matrix"]
        assert result.reward == pytest.approx(float((gates[0] * mixed).sum()), abs=1e-4)
    assert torch.allclose(gates[0], gates[1], atol=1e-6)


def test_a_cut_that_takes_the_gates_header_is_an_error_of_the_row_alone(armorm: Any) -> None:
    folder, *_ = armorm
    runtime = RewardModel.load(folder / "bundle", provider="cpu")
    long = {"prompt": "the lazy dog " * MAX_LENGTH, "response": "no"}
    good = {"prompt": "the lazy dog", "response": "no"}
    alone = runtime.score(**good)
    results = runtime.score_rows([good, long, {"text": "no header in a raw text"}, good])
    assert isinstance(results[1], RowError) and isinstance(results[2], RowError)
    assert "tap 'gate' needs the ids" in str(results[1])
    assert f"the text of {MAX_LENGTH} tokens (after the cut) has none" in str(results[1])
    assert results[0].reward == results[3].reward == alone  # type: ignore[union-attr]
    with pytest.raises(RowError, match="item 0: tap 'gate' needs the ids"):
        runtime.score_many([long])


def test_a_gated_reward_and_its_objectives_are_bit_identical_in_any_batch(armorm: Any) -> None:
    """Rows of 19 values do not begin at aligned addresses: a sum that goes by alignment would show here."""
    folder, *_ = armorm
    runtime = RewardModel.load(folder / "bundle", provider="cpu")
    rows = [{"prompt": "the lazy dog", "response": letter} for letter in "abcdefghijklmnop"]
    alone = [runtime.score_rows([row])[0] for row in rows]
    assert len({result.tokens for result in alone}) == 1  # one length, so that they share batches
    assert len({result.reward for result in alone}) == len(rows)
    for size in (2, 3, 5, 16):
        found = [result for start in range(0, 16, size) for result in runtime.score_rows(rows[start : start + size])]
        assert found == alone


def test_weights_are_refused_where_the_checkpoint_has_a_gate(armorm: Any, tmp_path: Path) -> None:
    folder, *_ = armorm
    with pytest.raises(RewardRTError, match="--weights: the checkpoint's own gate makes one reward of its values"):
        export(folder / "rm", tmp_path / "bundle", weights=(1.0,) * 19)


def test_the_published_ids_stand_in_where_the_tokenizer_does_not_know_the_marks(armorm: Any, tmp_path: Path) -> None:
    tokenizer = make_marked_tokenizer(marks=["<|eot_id|>"])
    write_with_head(
        tmp_path / "rm",
        armorm_head(),
        architecture="LlamaForRewardModelWithGating",
        tokenizer=tokenizer,
        vocab_size=128256,
    )
    spec = read_checkpoint(tmp_path / "rm").spec
    assert spec.taps == (
        Tap("last", "before_first_id", (PAD,)),
        Tap("gate", "pattern_start", (128009, 128006, 78191, 128007, 271)),
    )
    assert spec.combine.temperature == 10.0  # the class's default
    edit_json(tmp_path / "rm" / "config.json", vocab_size=308)
    with pytest.raises(RewardRTError, match=r"the tokenizer has not all of <\|eot_id\|>, <\|start_header_id\|>"):
        read_checkpoint(tmp_path / "rm")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"regression_layer.weight": None}, "no reward head: the armorm spec needs regression_layer.weight"),
        ({"gating.logit_scale": None}, "the armorm spec needs gating.logit_scale"),
        ({"gating.layers.2.weight": torch.randn(48, 47)}, "gating.layers.2.weight: expected shape"),
        ({"gating.layers.4.weight": torch.randn(19, 19)}, "4 hidden layers; config.json's gating_n_hidden is 3"),
        ({"gating.layers.1.bias": None}, "the armorm spec needs gating.layers.1.bias"),
        ({"reward_transform_matrix": torch.eye(18)}, "reward_transform_matrix: expected shape"),
        ({"gating.extra": torch.ones(3)}, "1 tensors are left over.*gating.extra"),
        (
            {f"gating.layers.{number}.weight": None for number in range(4)},
            "no gate: the checkpoint has no gating.layers",
        ),
        ({"gating.layers.1.bias": torch.full((48,), float("nan"))}, "gating.layers.1.bias: holds values that are not"),
    ],
)
def test_every_tensor_of_a_gated_head_is_accounted_for(
    armorm: Any, tmp_path: Path, damage: dict[str, torch.Tensor | None], message: str
) -> None:
    import shutil

    from safetensors.torch import save_file

    folder, *_ = armorm
    shutil.copytree(folder / "rm", tmp_path / "rm")
    state = {name: tensor for name, tensor in {**read_tensors(tmp_path / "rm"), **damage}.items() if tensor is not None}
    save_file(state, tmp_path / "rm" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardRTError, match=message) as caught:
        read_checkpoint(tmp_path / "rm")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("backbone", ["llama", "gemma2"])
def test_qrm_scores_as_its_published_class(tmp_path: Path, backbone: str) -> None:
    is_gemma = backbone == "gemma2"
    count, quantiles, step = (5, 4, 4) if is_gemma else (19, 3, 3)
    tensors = qrm_head(count, quantiles, dropout=is_gemma, matrix=not is_gemma)
    tokenizer = make_marked_tokenizer(GEMMA, GEMMA_MARKS) if is_gemma else make_marked_tokenizer()
    text = "<end_of_turn>\n<start_of_turn>model\n"
    text = text if is_gemma else "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    header = tokenizer(text, add_special_tokens=False)["input_ids"]
    temperature = 1.5 if is_gemma else 10
    model = write_with_head(
        tmp_path / "rm",
        tensors,
        architecture="Gemma2ForQuantileSequenceClassification" if is_gemma else "LlamaForRewardModelWithGating",
        backbone=backbone,
        config={"num_objectives": count, "num_quantiles": quantiles, "gating_temperature": temperature},
        tokenizer=tokenizer,
    )
    export(tmp_path / "rm", tmp_path / "bundle", max_length=MAX_LENGTH)
    rows, ids = conversations_of(tokenizer)
    expected, rewards = [], []
    for each in ids:
        hidden = hidden_states(model, each)
        outputs = tensors["regression_layer.weight"] @ hidden[before_first_pad(each)]
        mean = outputs.reshape(count, quantiles).mean(1)
        logits = batch_norm_network(tensors, hidden[header_start(each, header)], step)
        gate = torch.softmax(logits / temperature, -1) * 0.6
        mixed = mean if is_gemma else mean @ tensors["reward_transform_matrix"]
        expected.append(float((gate * mixed).sum()))
        rewards.append(mean.numpy())
    runtime = assert_parity(tmp_path / "bundle", rows, expected)
    assert runtime.spec.family == "qrm"
    assert len(runtime.spec.output.labels) == count and runtime.spec.output.labels[4] == "helpsteer-verbosity"
    found = np.array([result.objectives for result in runtime.score_rows(rows)])
    assert np.abs(found - np.array(rewards)).max() < 1e-4


def test_a_qrm_whose_quantiles_are_not_what_config_says_is_refused(tmp_path: Path) -> None:
    write_with_head(
        tmp_path / "rm",
        qrm_head(5, 4, dropout=False, matrix=True),
        architecture="LlamaForRewardModelWithGating",
        config={"num_quantiles": 19},
        tokenizer=make_marked_tokenizer(),
    )
    with pytest.raises(RewardRTError, match="20 outputs; expected 19 quantiles of 5 objectives, 95"):
        read_checkpoint(tmp_path / "rm")
    edit_json(tmp_path / "rm" / "config.json", remove=("num_quantiles",))
    checkpoint = read_checkpoint(tmp_path / "rm")
    assert (checkpoint.spec.family, checkpoint.spec.heads[0].group) == ("qrm", 4)


@pytest.mark.parametrize("softmax", [False, True])
def test_ldl_scores_as_its_published_class(tmp_path: Path, softmax: bool) -> None:
    config = {"softmax": True, "temperature": 2.0} if softmax else {}
    model, values, gate = write_ldl(tmp_path / "rm", **config)
    export(tmp_path / "rm", tmp_path / "bundle", max_length=MAX_LENGTH)
    rows, ids = conversations_of(make_marked_tokenizer(GEMMA, GEMMA_MARKS))

    def network(tensors: dict[str, torch.Tensor], state: torch.Tensor) -> torch.Tensor:
        numbers = sorted({int(name.split(".")[1]) for name in tensors})
        for number in numbers:
            state = state @ tensors[f"network.{number}.weight"].T + tensors[f"network.{number}.bias"]
            state = state if number == numbers[-1] else torch.nn.functional.leaky_relu(state)
        return state

    expected = []
    for each in ids:
        state = hidden_states(model, each)[before_first_pad(each)]
        distributions = torch.softmax(network(values, state).view(22, 10), -1)
        weights = network(gate, state)
        weights = torch.softmax(weights / 2.0, -1) if softmax else weights
        total = (
            weights @ distributions
        )  # the class mixes the distributions first, and takes the expectation of the mixture
        expected.append(float((total * torch.linspace(0, 1, 10)).sum()))
    runtime = assert_parity(tmp_path / "bundle", rows, expected)
    assert runtime.spec.family == "ldl"
    assert runtime.spec.output.labels[-1] == "LABEL_21"


def test_ldl_without_one_of_its_files_or_with_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    import pickle

    write_ldl(tmp_path / "rm")
    gate = (tmp_path / "rm" / "gating_layer.pt").read_bytes()
    (tmp_path / "rm" / "gating_layer.pt").unlink()
    with pytest.raises(RewardRTError, match=r"has no gating_layer.pt with layers; copy it beside the model"):
        read_checkpoint(tmp_path / "rm")
    (tmp_path / "rm" / "gating_layer.pt").write_bytes(pickle.dumps({"x": print}))
    with pytest.raises(RewardRTError, match=r"gating_layer.pt: not loadable with torch.load\(weights_only=True\)"):
        read_checkpoint(tmp_path / "rm")
    (tmp_path / "rm" / "gating_layer.pt").write_bytes(gate)
    add_tensors(tmp_path / "rm", {"gating_layer.network.0.weight": torch.randn(48, 32)})
    with pytest.raises(RewardRTError, match=r"gating_layer.pt: holds tensors that the model's own files hold too"):
        read_checkpoint(tmp_path / "rm")


def test_the_page_shows_every_objective_of_every_answer(armorm: Any) -> None:
    bundle = armorm[0] / "bundle"
    runtime = RewardModel.load(bundle, provider="cpu")
    (scored,) = runtime.score_rows([{"prompt": PROMPT, "responses": ANSWERS}])
    order = sorted(range(3), key=lambda index: -scored.answers[index].reward)
    with serving(bundle) as server, chromium() as browser, opened(browser, server.url) as page:
        fill(page)
        press_score(page)
        assert [reward for _, reward in shown(page)] == [
            float(str(np.float32(scored.rewards[index]))) for index in order
        ]
        heads, *lines = table(page, "Objectives, of which the reward is made")
        assert heads == ["", *(f"answer {index + 1}" for index in order)]
        assert tuple(line[0] for line in lines) == runtime.spec.output.labels
        found = np.float32([line[1:] for line in lines]).T
        assert found.tolist() == [np.float32(scored.answers[index].objectives).tolist() for index in order]
        assert_accessible(page)
