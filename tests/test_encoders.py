"""Encoders with a classification head: the runtime against transformers' own class."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from checkpoints import add_tensors, edit_json, make_tokenizer, read_tensors, write_sequence_classification
from checkpoints_encoders import ENCODERS, POSITIONS, make_encoder_tokenizer, write_encoder
from rewardrt import RewardModel
from rewardrt.bundle.spec import Tap, TextRule
from rewardrt.errors import BundleError, CheckpointError, RowError
from rewardrt.text.rendering import Renderer
from rewardrt.text.rows import parse_row
from rewardrt.text.tokens import EncodedText, longest_first
from rewardrt_export.checkpoint import Checkpoint, read_checkpoint
from rewardrt_export.pipeline import export
from texts import make_texts

TOLERANCE = 1e-4  # standard deviations of the reward
# What the six architectures do not do by default: the convolution and token types of DeBERTa-v2-xlarge, the mean, the
# biases and another activation in ModernBERT's head.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in ENCODERS} | {
    "deberta-v2 with convolution": (
        "deberta-v2",
        {"conv_kernel_size": 3, "conv_act": "gelu", "type_vocab_size": 2, "pooler_hidden_act": "tanh"},
    ),
    "modernbert with mean": (
        "modernbert",
        {"classifier_pooling": "mean", "classifier_bias": True, "norm_bias": True, "classifier_activation": "silu"},
    ),
}


@dataclasses.dataclass(frozen=True)
class Exported:
    folder: Path  # of the checkpoint
    model: Any
    tokenizer: Any  # transformers', as AutoTokenizer loads it
    runtime: RewardModel

    def expected(self, *texts: str, max_length: int = POSITIONS) -> float:
        """tokenizer(question, answer) and the class's own forward, as its users write it."""
        inputs = self.tokenizer(*texts, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.inference_mode():
            return float(self.model(**inputs).logits[0, 0])


@pytest.fixture(scope="module", params=VARIANTS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    model_type, changes = VARIANTS[request.param]
    folder = tmp_path_factory.mktemp("encoder")
    model = write_encoder(folder / "rm", model_type, **changes)
    export(folder / "rm", folder / "bundle", precisions=("fp32", "half"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "rm")
    return Exported(folder / "rm", model, tokenizer, RewardModel.load(folder / "bundle", provider="cpu"))


def make_pairs(count: int) -> list[tuple[str, str]]:
    """Return pairs of which some are too long: by the question, by the answer, and by both."""
    texts = make_texts(2 * count, longest=60, seed=3)
    return list(zip(texts[::2], texts[1::2], strict=True))


def as_rows(pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"prompt": question, "response": answer} for question, answer in pairs]


@pytest.mark.filterwarnings("ignore::rewardrt.TruncationWarning")
def test_every_encoder_scores_pairs_as_in_transformers_alone_and_padded(exported: Exported) -> None:
    assert exported.runtime.spec.family == "encoder"
    pairs = make_pairs(32)
    expected = np.array([exported.expected(*pair) for pair in pairs])
    rows = as_rows(pairs)
    alone = np.array([exported.runtime.score_many([row])[0] for row in rows])
    padding = RewardModel.load(exported.runtime.bundle.path, provider="cpu", padding=True)
    assert np.abs(alone - expected).max() < TOLERANCE * expected.std()
    assert np.abs(padding.score_many(rows) - expected).max() < TOLERANCE * expected.std()
    # Without padding, the same bits in any company.
    assert exported.runtime.score_many(rows[::-1]).tobytes() == alone[::-1].tobytes()
    half = RewardModel.load(exported.runtime.bundle.path, provider="cpu", precision="half").score_many(rows)
    assert 1e-5 < np.sqrt(np.mean((half - expected) ** 2)) / expected.std() < 0.01  # 0.002 to 0.006 were seen


def test_ids_and_type_ids_are_transformers_own_at_every_length(exported: Exported) -> None:
    renderer, tokenizer = exported.runtime.answers.renderer, exported.runtime.answers.tokenizer
    cut = set()
    for question, answer in [*make_pairs(4), ("a b c d", "d c b a")]:
        rendered = renderer.render(parse_row({"prompt": question, "response": answer}).items[0])
        whole = len(exported.tokenizer(question, answer)["input_ids"])
        for limit in (5, 6, 16, 17, 64, POSITIONS):
            theirs = exported.tokenizer(question, answer, truncation=True, max_length=limit)
            found = tokenizer.encode(rendered, max_length=limit)
            assert found.ids.tolist() == theirs["input_ids"]
            assert found.truncated == whole - len(found.ids)
            if found.type_ids is not None:
                assert found.type_ids.tolist() == theirs["token_type_ids"]
                assert set(found.type_ids.tolist()) == {0, 1}
            cut.add(found.truncated > 0)
    assert cut == {False, True}
    uses = exported.model.config.to_dict().get("type_vocab_size", 0) > 1
    assert exported.runtime.spec.text.type_ids == uses


@pytest.mark.filterwarnings("ignore::rewardrt.TruncationWarning")
def test_a_text_row_is_a_single_text_with_the_tokenizers_special_tokens(exported: Exported) -> None:
    texts = [*make_texts(24, longest=20, seed=5), "too long " * POSITIONS]
    expected = np.array([exported.expected(text) for text in texts])
    found = exported.runtime.score_many([{"text": text} for text in texts])
    assert np.abs(found - expected).max() < TOLERANCE * expected.std()


def test_what_stands_in_the_padding_does_not_show_in_the_reward(exported: Exported) -> None:
    encoded = [
        text
        for text in exported.runtime.answers.encode([parse_row(row).items[0] for row in as_rows(make_pairs(8))])
        if isinstance(text, EncodedText)
    ]
    lengths = np.array([len(text.ids) for text in encoded])
    assert lengths.min() < lengths.max() == POSITIONS
    rewards = []
    for filler in (0, 1, 7):
        ids = np.full((len(encoded), POSITIONS), filler)
        types = np.full((len(encoded), POSITIONS), filler % 2)
        for row, text in enumerate(encoded):
            ids[row, : len(text.ids)] = text.ids
            types[row, : len(text.ids)] = 0 if text.type_ids is None else text.type_ids
        rewards.append(exported.runtime.session.run(ids, lengths, type_ids=types)[:, 0])
    assert rewards[0].tobytes() == rewards[1].tobytes() == rewards[2].tobytes()
    alone = np.array([exported.runtime.runner.run([text])[0] for text in encoded])[:, 0]
    assert np.abs(rewards[0] - alone).max() < TOLERANCE * alone.std()


def test_an_empty_answer_is_still_a_pair(exported: Exported) -> None:
    """As in a batch; transformers takes tokenizer(question, "") alone for a single text."""
    batch = exported.tokenizer(["What is it?"], [""], return_tensors="pt")
    with torch.inference_mode():
        expected = float(exported.model(**batch).logits[0, 0])
    assert exported.runtime.score(prompt="What is it?", response="") == pytest.approx(expected, abs=1e-5)


def test_one_round_of_messages_is_a_pair_and_more_are_refused(exported: Exported) -> None:
    user, answer = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}
    reward = exported.runtime.score(messages=[user, answer])
    assert reward == exported.runtime.score(prompt="why?", response="because")
    for messages in ([user, answer, user, answer], [{"role": "system", "content": "be brief"}, user, answer]):
        with pytest.raises(RowError, match="one prompt and its answer; found a longer conversation"):
            exported.runtime.score(messages=messages)


def test_a_limit_that_the_special_tokens_fill_is_an_error_of_the_row(exported: Exported) -> None:
    row = {"prompt": "why is that?", "responses": ["because", "so"]}
    prepared = exported.runtime.answers.prepare([row], max_length=3)
    assert [type(result) for result in prepared.texts] == [RowError, RowError]
    (result,) = exported.runtime.score_prepared(prepared)
    assert str(result).startswith("responses[0]: a limit of 3 tokens leaves no room for text beside")
    assert "; responses[1]: a limit of 3 tokens" in str(result)


def test_two_texts_are_cut_as_by_the_library_at_every_pair_of_lengths() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    for first, second, room in itertools.product(range(1, 10), range(10), range(1, 14)):
        backend.enable_truncation(room, strategy="longest_first")
        theirs = backend.encode("a " * first, "b " * second).ids
        assert longest_first(first, second, room) == (theirs.count(0), theirs.count(1))


def read_encoder(folder: Path, model_type: str, **changes: Any) -> Checkpoint:
    write_encoder(folder, model_type, **changes)
    return read_checkpoint(folder)


def test_the_mean_and_the_norm_in_modernberts_head_follow_the_config(tmp_path: Path) -> None:
    first = read_encoder(tmp_path / "cls", "modernbert").spec
    mean = read_encoder(tmp_path / "mean", "modernbert", classifier_pooling="mean", norm_eps=1e-3).spec
    assert first.taps == (Tap("cls", "first"),)
    assert mean.taps == (Tap("mean", "mean"),)
    assert [layer.norm for layer in mean.heads[0].layers] == ["head.norm.weight", None]
    assert mean.heads[0].layers[0].norm_eps == 1e-3
    assert not mean.has_positions and not mean.causal


def test_positions_that_start_past_the_padding_id_leave_less_room(tmp_path: Path) -> None:
    for model_type, room in (("roberta", POSITIONS), ("bert", POSITIONS)):
        write_encoder(tmp_path / model_type, model_type)
        edit_json(tmp_path / model_type / "tokenizer_config.json", remove=("model_max_length",))
        assert read_checkpoint(tmp_path / model_type).spec.max_length == room
        with pytest.raises(CheckpointError, match=f"has positions for {room} tokens"):
            read_checkpoint(tmp_path / model_type, max_length=room + 1)


def test_type_ids_are_fed_only_where_tokenizer_and_model_have_them(tmp_path: Path) -> None:
    assert read_encoder(tmp_path / "bert", "bert").spec.text.type_ids
    assert not read_encoder(tmp_path / "untold", "roberta", type_vocab_size=2).spec.text.type_ids
    assert not read_encoder(tmp_path / "one", "bert", type_vocab_size=1).spec.text.type_ids


def test_a_chat_template_in_the_tokenizer_is_what_training_used(tmp_path: Path) -> None:
    write_encoder(tmp_path, "modernbert")
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}[SEP]{{ messages[1].content }}")
    assert read_checkpoint(tmp_path).spec.text == TextRule(source="chat_template")


def test_a_pooler_that_roberta_never_calls_may_be_in_the_file(tmp_path: Path) -> None:
    write_encoder(tmp_path, "roberta")
    pooler = {"roberta.pooler.dense.weight": torch.randn(32, 32), "roberta.pooler.dense.bias": torch.randn(32)}
    add_tensors(tmp_path, pooler)
    checkpoint = read_checkpoint(tmp_path)
    assert not {tensor.name for source in checkpoint.backbone.sources.values() for tensor in source.stored} & set(
        pooler
    )


@pytest.mark.parametrize(
    ("model_type", "lost"),
    [
        ("bert", "bert.pooler.dense.weight"),
        ("roberta", "classifier.dense.bias"),
        ("electra", "classifier.out_proj.weight"),
        ("deberta-v2", "pooler.dense.weight"),
        ("modernbert", "head.norm.weight"),
    ],
)
def test_a_lost_part_of_the_head_is_refused_by_its_name(tmp_path: Path, model_type: str, lost: str) -> None:
    write_encoder(tmp_path, model_type)
    kept = {name: tensor for name, tensor in read_tensors(tmp_path).items() if name != lost}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"no reward head: the encoder spec needs {re.escape(lost)}"):
        read_checkpoint(tmp_path)


def test_a_head_without_training_or_with_two_outputs_is_refused(tmp_path: Path) -> None:
    write_encoder(tmp_path / "zeros", "bert")
    add_tensors(tmp_path / "zeros", {"classifier.weight": torch.zeros(1, 32)})
    with pytest.raises(CheckpointError, match=r"classifier\.weight: all zeros"):
        read_checkpoint(tmp_path / "zeros")
    with pytest.raises(CheckpointError, match=r"classifier\.weight: 2 outputs; expected a reward model with one"):
        read_encoder(tmp_path / "two", "bert", num_labels=2)
    with pytest.raises(CheckpointError, match="pooler_hidden_act 'mish'; expected one of gelu"):
        read_encoder(tmp_path / "act", "deberta-v2", pooler_hidden_act="mish")
    with pytest.raises(CheckpointError, match="is_decoder is set"):
        read_encoder(tmp_path / "decoder", "bert", is_decoder=True)


def test_a_class_name_alone_does_not_tell_encoders_from_decoders(tmp_path: Path) -> None:
    assert read_encoder(tmp_path / "encoder", "deberta-v2").spec.family == "encoder"
    write_sequence_classification(tmp_path / "decoder")
    assert read_checkpoint(tmp_path / "decoder").spec.family == "sequence-classification"
    config = AutoConfig.for_model(
        "layoutlm", vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "unknown")
    make_encoder_tokenizer("bert").save_pretrained(tmp_path / "unknown")
    with pytest.raises(CheckpointError, match="LayoutLMForSequenceClassification is not a reward model of a known"):
        read_checkpoint(tmp_path / "unknown")
    with pytest.raises(CheckpointError, match="model_type 'layoutlm': expected an encoder, one of albert"):
        read_checkpoint(tmp_path / "unknown", family="encoder")


def test_encoder_decoders_stay_refused(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    config = {"model_type": "t5", "architectures": ["T5ForSequenceClassification"], "is_encoder_decoder": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"score.weight": torch.ones(1, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="t5: an encoder-decoder reads a text twice, in its two halves"):
        read_checkpoint(tmp_path)


def test_type_ids_without_a_pair_are_no_spec(tmp_path: Path) -> None:
    spec = read_encoder(tmp_path, "bert").spec
    for changes in ({"causal": True}, {"text": TextRule(source="concatenate", type_ids=True)}):
        with pytest.raises(BundleError, match="type_ids is set; expected an encoder that reads a pair"):
            dataclasses.replace(spec, **changes)
    assert Renderer(spec.text, None)  # a pair needs no template
