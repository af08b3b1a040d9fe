"""Two-layer heads (Qwen2.5-Math-RM, INF-ORM) and a row of the LM head (Nemotron-Reward-HF)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from checkpoints import add_tensors, edit_json, make_tokenizer, read_tensors
from checkpoints_gated import mlp_head, write_language_model, write_with_head
from parity import assert_parity, hidden_states
from rewardrt import RewardRTError
from rewardrt.bundle.spec import Tap
from rewardrt_export.checkpoint import read_checkpoint
from rewardrt_export.families import FAMILIES
from rewardrt_export.pipeline import export
from rewardrt_export.source.folder import read_source
from texts import make_conversations, make_texts

EOS = 2


def score(tensors: dict[str, torch.Tensor], state: torch.Tensor) -> float:
    """nn.Sequential(Linear, ReLU, Linear)."""
    inner = torch.relu(tensors["score.0.weight"] @ state + tensors["score.0.bias"])
    return float(tensors["score.2.weight"] @ inner + tensors["score.2.bias"])


@pytest.mark.parametrize(
    ("backbone", "architecture"), [("qwen2", "Qwen2ForRewardModel"), ("llama", "INFORMForSequenceClassification")]
)
def test_a_two_layer_head_scores_as_its_class(tmp_path: Path, backbone: str, architecture: str) -> None:
    """pad == eos, so that the rule shows: the class reads before the first pad of the text, wrapping round."""
    tensors = mlp_head()
    tokenizer = make_tokenizer(pad="</s>")
    model = write_with_head(
        tmp_path / "rm", tensors, architecture=architecture, backbone=backbone, tokenizer=tokenizer, pad_token_id=EOS
    )
    export(tmp_path / "rm", tmp_path / "bundle")
    words = make_texts(20, longest=20)
    texts = [*words, *(f"{a}</s>{b}</s>" for a, b in zip(words[:6], words[6:12], strict=True)), "</s>first"]
    rows = [{"text": text} for text in texts]
    expected = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        position = (int(torch.eq(torch.tensor(ids), EOS).int().argmax(-1)) - 1) % len(ids)
        expected.append(score(tensors, hidden_states(model, ids)[position]))
    runtime = assert_parity(tmp_path / "bundle", rows, expected)
    assert runtime.spec.family == "mlp-head"
    assert runtime.spec.taps == (Tap("last", "before_first_id", (EOS,)),)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("score.0.bias", None, "the mlp-head spec needs score.0.bias"),
        ("score.2.weight", None, "the mlp-head spec needs score.2.weight"),
        ("score.2.weight", torch.randn(2, 32), "score.2.weight: 2 outputs|score.2.bias: expected shape"),
        ("score.0.weight", torch.randn(32, 31), "score.0.weight: expected shape"),
        ("score.2.weight", torch.zeros(1, 32), "score.2.weight: all zeros"),
        ("score.4.weight", torch.randn(1, 1), "1 tensors are left over.*score.4.weight"),
    ],
)
def test_a_two_layer_head_that_is_not_whole_is_refused(
    tmp_path: Path, name: str, tensor: torch.Tensor | None, message: str
) -> None:
    from safetensors.torch import save_file

    write_with_head(tmp_path / "rm", mlp_head(), architecture="Qwen2ForRewardModel", backbone="qwen2")
    state = {key: value for key, value in {**read_tensors(tmp_path / "rm"), name: tensor}.items() if value is not None}
    save_file(state, tmp_path / "rm" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardRTError, match=message):
        read_checkpoint(tmp_path / "rm")


def test_a_process_reward_model_with_the_same_two_layers_is_none_of_these(tmp_path: Path) -> None:
    write_with_head(tmp_path / "rm", mlp_head(2), architecture="Qwen2ForProcessRewardModel", backbone="qwen2")
    assert FAMILIES["mlp-head"].matches(read_source(tmp_path / "rm")) is None


@pytest.mark.parametrize("tied", [False, True])
def test_the_reward_is_logit_0_of_the_next_token(tmp_path: Path, tied: bool) -> None:
    model = write_language_model(tmp_path / "rm", tied=tied)
    assert ("lm_head.weight" in read_tensors(tmp_path / "rm")) != tied
    bundle = export(tmp_path / "rm", tmp_path / "bundle", family="nemotron-lm-row")
    tokenizer = make_tokenizer()
    conversations = make_conversations(24, longest=20)
    expected = []
    for messages in conversations:
        ids = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=False)["input_ids"]
        with torch.inference_mode():
            expected.append(float(model(torch.tensor([ids])).logits[0, -1, 0]))
    runtime = assert_parity(tmp_path / "bundle", [{"messages": messages} for messages in conversations], expected)
    assert runtime.spec.heads[0].layers[0].rows == (0,)
    if not tied:  # of the LM head's 300 rows one is in the bundle
        size = sum(record.bytes for record in bundle.manifest.files if record.path.startswith("model.onnx"))
        assert size < 4 * sum(tensor.numel() for tensor in model.model.state_dict().values()) + 30_000


def test_a_language_model_is_no_reward_model_by_itself(tmp_path: Path) -> None:
    write_language_model(tmp_path / "rm", tied=False)
    with pytest.raises(RewardRTError, match="say which: --tokens yes,no, or --family nemotron-lm-row"):
        read_checkpoint(tmp_path / "rm")


def test_a_row_is_refused_where_the_logits_are_more_than_the_row(tmp_path: Path) -> None:
    write_language_model(tmp_path / "rm", tied=False)
    edit_json(tmp_path / "rm" / "config.json", final_logit_softcapping=30.0)
    with pytest.raises(
        RewardRTError, match=r"final_logit_softcapping is 30.0, and transformers' class .* does not read it"
    ):
        read_checkpoint(tmp_path / "rm", family="nemotron-lm-row")


def test_an_untied_model_without_its_lm_head_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    write_language_model(tmp_path / "rm", tied=False)
    state = {name: tensor for name, tensor in read_tensors(tmp_path / "rm").items() if name != "lm_head.weight"}
    save_file(state, tmp_path / "rm" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardRTError, match=r"no LM head: expected lm_head.weight, or tie_word_embeddings"):
        read_checkpoint(tmp_path / "rm", family="nemotron-lm-row")
    add_tensors(tmp_path / "rm", {"lm_head.weight": torch.full((300, 32), float("nan"))})
    with pytest.raises(RewardRTError, match=r"lm_head.weight: holds values that are not finite"):
        read_checkpoint(tmp_path / "rm", family="nemotron-lm-row")
