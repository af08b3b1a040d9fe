"""transformers *ForSequenceClassification: the runtime against the class itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from checkpoints import BACKBONES, CHATML, edit_json, make_tokenizer, write_sequence_classification
from rewardrt import RewardModel
from rewardrt.bundle.spec import Tap
from rewardrt_export.pipeline import export
from texts import make_conversations, make_texts

TOLERANCE = 1e-4  # standard deviations of the reward
HALF = 0.01  # rms in standard deviations of what float16 rounds: 0.001 to 0.004 were seen


def logits(model: Any, texts: list[list[int]], pad: int) -> np.ndarray:
    """The class's own forward on one right-padded batch."""
    width = max(map(len, texts))
    input_ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids in texts])
    attention_mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in texts])
    with torch.inference_mode():
        return model(input_ids=input_ids, attention_mask=attention_mask).logits[:, 0].float().numpy()


# transformers has no GraniteForSequenceClassification; test_openrlhf.py holds that backbone.
@pytest.mark.parametrize("backbone", sorted(BACKBONES.keys() - {"granite"}))
def test_every_backbone_scores_as_in_transformers(tmp_path: Path, backbone: str) -> None:
    model = write_sequence_classification(tmp_path / "rm", backbone)
    bundle = export(tmp_path / "rm", tmp_path / "bundle", precisions=("fp32", "half"))
    assert bundle.manifest.spec.family == "sequence-classification"
    tokenizer = make_tokenizer()
    conversations = make_conversations(24, longest=20)
    ids = [tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"] for messages in conversations]
    assert min(map(len, ids)) > 8  # longer than the window of the backbones that have one
    expected = np.concatenate([logits(model, ids[i : i + 8], pad=3) for i in range(0, 24, 8)])
    runtime = RewardModel.load(tmp_path / "bundle", provider="cpu")
    rows = [{"messages": messages} for messages in conversations]
    single = np.array([runtime.score_many([row])[0] for row in rows])
    batched = RewardModel.load(tmp_path / "bundle", provider="cpu", padding=True).score_many(rows)
    assert np.abs(single - expected).max() < TOLERANCE * expected.std()
    assert np.abs(batched - expected).max() < TOLERANCE * expected.std()
    half = RewardModel.load(tmp_path / "bundle", provider="cpu", precision="half").score_many(rows)
    assert 1e-5 < np.sqrt(np.mean((half - expected) ** 2)) / expected.std() < HALF


def test_pad_equal_to_eos_reads_the_token_before_the_closing_eos_as_transformers_does(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(pad="</s>")
    model = write_sequence_classification(tmp_path / "rm", tokenizer=tokenizer, pad_token_id=2)
    bundle = export(tmp_path / "rm", tmp_path / "bundle")
    assert bundle.manifest.spec.taps == (Tap("last", "last_not_id", (2,)),)
    texts = [f"{text}</s>" for text in make_texts(24, longest=20)] + ["</s></s>", "a</s>b</s></s>"]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert all(each[-1] == 2 for each in ids)
    expected = logits(model, ids, pad=2)
    found = RewardModel.load(tmp_path / "bundle", provider="cpu").score_many([{"text": text} for text in texts])
    assert np.abs(found - expected).max() < TOLERANCE * expected.std()
    # Read at the last position instead, the same texts get clearly other rewards.
    export(tmp_path / "rm", tmp_path / "last", pooling="last_mask")
    last = RewardModel.load(tmp_path / "last", provider="cpu").score_many([{"text": text} for text in texts])
    assert np.abs(last - expected).max() > 0.1 * expected.std()


def test_before_first_id_reads_before_the_first_pad_as_old_transformers_did(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(pad="</s>")
    model = write_sequence_classification(tmp_path / "rm", tokenizer=tokenizer, pad_token_id=2)
    export(tmp_path / "rm", tmp_path / "bundle", pooling="before_first_id")
    runtime = RewardModel.load(tmp_path / "bundle", provider="cpu")
    for text in ("one</s>two three</s>", "no end", "</s>first"):
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.inference_mode():
            every = model.score(model.model(ids).last_hidden_state)[0, :, 0]
        position = (torch.eq(ids, 2).int().argmax(-1) - 1) % ids.shape[-1]  # transformers before its PR 35911
        assert runtime.score(text=text) == pytest.approx(every[position].item(), abs=1e-5)


def test_without_a_pad_id_the_last_position_is_read(tmp_path: Path) -> None:
    model = write_sequence_classification(tmp_path / "rm", pad_token_id=None)
    bundle = export(tmp_path / "rm", tmp_path / "bundle")
    assert bundle.manifest.spec.taps == (Tap("last", "last_mask"),)
    ids = make_tokenizer()("the lazy dog</s>", add_special_tokens=False)["input_ids"]
    found = RewardModel.load(tmp_path / "bundle", provider="cpu").score(text="the lazy dog</s>")
    assert found == pytest.approx(logits(model, [ids], pad=0)[0], abs=1e-5)


def test_a_template_with_bos_and_a_tokenizer_that_adds_one_give_one_bos(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(adds_bos=True, template="{{ bos_token }}" + CHATML)
    model = write_sequence_classification(tmp_path / "rm", tokenizer=tokenizer)
    export(tmp_path / "rm", tmp_path / "bundle")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    ids = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert ids.count(1) == 1
    runtime = RewardModel.load(tmp_path / "bundle", provider="cpu")
    assert runtime.score(messages=messages) == pytest.approx(logits(model, [ids], pad=3)[0], abs=1e-5)


def test_without_a_template_prompt_and_response_are_joined_as_trl_does(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(adds_bos=True, template=None)
    model = write_sequence_classification(tmp_path / "rm", tokenizer=tokenizer)
    export(tmp_path / "rm", tmp_path / "bundle")
    ids = tokenizer("Say hi. Hi!" + tokenizer.eos_token)["input_ids"]
    assert (ids[0], ids[-1]) == (1, 2)
    runtime = RewardModel.load(tmp_path / "bundle", provider="cpu")
    found = runtime.score(prompt="Say hi. ", response="Hi!")
    assert found == pytest.approx(logits(model, [ids], pad=3)[0], abs=1e-5)


def test_labels_may_be_stated_only_as_id2label_or_not_at_all(tmp_path: Path) -> None:
    write_sequence_classification(tmp_path / "rm")
    for name, removed in (
        ("id2label", ("num_labels", "label2id")),
        ("nothing", ("id2label", "label2id", "num_labels")),
    ):
        edit_json(tmp_path / "rm" / "config.json", remove=removed)
        bundle = export(tmp_path / "rm", tmp_path / name)
        assert bundle.manifest.spec.family == "sequence-classification"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_checkpoint_is_computed_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    model = write_sequence_classification(tmp_path / "rm")
    model.to(dtype).save_pretrained(tmp_path / "rm")
    bundle = export(tmp_path / "rm", tmp_path / "bundle")
    assert bundle.manifest.provenance.stored_dtypes == (str(dtype).removeprefix("torch."),)
    # The rounded weights in float32 arithmetic; loaded anew, because .to() has rounded the rotary frequencies too.
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", dtype=torch.float32)
    texts = make_texts(24, longest=20)
    ids = [make_tokenizer()(text, add_special_tokens=False)["input_ids"] for text in texts]
    expected = logits(model, ids, pad=3)
    found = RewardModel.load(tmp_path / "bundle", provider="cpu").score_many([{"text": text} for text in texts])
    assert np.abs(found - expected).max() < TOLERANCE * expected.std()
