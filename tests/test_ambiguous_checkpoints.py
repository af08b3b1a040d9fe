"""Files that fit two trainers are a question that names both; what was answered is in the manifest."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from checkpoints import (
    add_tensors,
    edit_json,
    make_tokenizer,
    read_tensors,
    write_openrlhf,
    write_sequence_classification,
)
from checkpoints_process import write_trl_prm
from checkpoints_value_head import randomize_adapter, write_language_model
from rewardrt import RewardModel, RewardRTError
from rewardrt.cli.app import app
from rewardrt_export.checkpoint import read_checkpoint
from rewardrt_export.families import choose_family
from rewardrt_export.pipeline import export
from rewardrt_export.source.folder import read_source
from rewardrt_export.source.padding import Padding

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}]


@pytest.mark.parametrize("architectures", [["LlamaForCausalLM"], ["LlamaModel"], [], None, "LlamaForCausalLM"])
def test_score_weight_beside_the_bases_config_is_a_question_with_two_answers(
    tmp_path: Path, architectures: Any
) -> None:
    """Both trainers call their head `score`; the base's config.json does not say which one it was."""
    tokenizer = make_tokenizer(pad="</s>")
    model = write_sequence_classification(tmp_path / "rm", tokenizer=tokenizer, pad_token_id=2)
    edit_json(tmp_path / "rm" / "config.json", architectures=architectures)
    with pytest.raises(RewardRTError) as caught:
        read_checkpoint(tmp_path / "rm")
    said = str(caught.value)
    assert "matches 2 families (openrlhf: it has score.weight with one output" in said
    assert "sequence-classification: it has score.weight" in said
    assert "choose one with --family: openrlhf reads last token (end of text:" in said
    assert "\n" not in said
    if architectures != ["LlamaForCausalLM"]:
        return
    text = tokenizer.apply_chat_template(HI, tokenize=False)
    readings = {}
    for family, ids, place in (
        ("openrlhf", tokenizer(text.rstrip("\n") + " </s>", add_special_tokens=False)["input_ids"], -1),
        ("sequence-classification", tokenizer(text, add_special_tokens=False)["input_ids"], -1),
    ):
        bundle = export(tmp_path / "rm", tmp_path / family, family=family, certified=False)
        with torch.inference_mode():
            readings[family] = model.score(model.model(torch.tensor([ids])).last_hidden_state)[0, place, 0].item()
        found = RewardModel.load(tmp_path / family, provider="cpu").score(messages=HI)
        assert found == pytest.approx(readings[family], abs=1e-5)
        assert bundle.manifest.provenance.choices["family"] == (
            f"{family}, as --family says; the files fit openrlhf and sequence-classification"
        )
    assert abs(readings["openrlhf"] - readings["sequence-classification"]) > 0.1


def rename_head(folder: Path, name: str, rows: int = 1, **config: Any) -> None:
    add_tensors(folder, {f"{name}.weight": torch.randn(rows, 32)})
    edit_json(folder / "config.json", remove=("value_head_prefix",), **config)


def without_head(folder: Path) -> None:
    from safetensors.torch import save_file

    state = {name: tensor for name, tensor in read_tensors(folder).items() if not name.startswith("score")}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


BASE = {"architectures": ["LlamaForCausalLM"]}
# What the head is called, how many outputs, what config.json says: the families that it may be, as asked or taken.
FITS: list[tuple[str, int, dict[str, Any], tuple[str, ...]]] = [
    ("score", 1, BASE, ("openrlhf", "sequence-classification")),
    ("score", 1, {"architectures": ["RewardModel"]}, ("openrlhf",)),
    ("score", 1, {"architectures": ["LLMForSequenceRegression"]}, ("openrlhf",)),
    ("score", 1, BASE | {"value_head_prefix": "score"}, ("openrlhf",)),
    ("score", 1, {"architectures": ["LlamaForSequenceClassification"]}, ("sequence-classification",)),
    (
        "score", 1, {"architectures": ["LlamaForSequenceClassification"], "value_head_prefix": "score"},
        ("openrlhf", "sequence-classification"),
    ),
    ("score", 1, {"architectures": ["CriticModel"], "value_head_prefix": "score"}, ()),
    ("score", 1, {"architectures": ["LlamaForTokenClassification"]}, ()),
    ("score", 2, BASE, ("sequence-classification", "trl-prm")),
    ("score", 2, {"architectures": ["LlamaForTokenClassification"]}, ("trl-prm",)),
    ("score", 2, {"architectures": ["LlamaForTokenClassification"], "id2label": {"0": "O", "1": "PERSON"}}, ()),
    ("score", 5, BASE, ("sequence-classification",)),
    ("value_head", 1, {"architectures": ["RewardModel"]}, ("openrlhf",)),
    ("value_head", 1, BASE, ("openrlhf", "general-preference")),
    ("value_head", 1, {"architectures": ["CustomRewardModel"]}, ("openrlhf", "general-preference")),
    ("value_head", 4, BASE, ("general-preference",)),
    ("v_head", 1, BASE, ()),
    ("v_head", 1, {"architectures": ["AtheneForSequenceClassification"]}, ("athene",)),
    ("v_head", 1, {"architectures": ["LlamaForSequenceClassification"]}, ()),
    ("v_head.summary", 1, BASE, ("value-head",)),
    ("v_head.summary", 1, {"architectures": ["LlamaForPrmModel"]}, ("skywork-prm",)),
    ("classifier", 2, BASE, ()),
]  # fmt: skip


@pytest.fixture(scope="module")
def headless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ambiguous") / "rm"
    write_openrlhf(folder)
    without_head(folder)
    return folder


@pytest.mark.parametrize(("head", "rows", "config", "families"), FITS)
def test_every_head_is_taken_where_the_files_decide_and_asked_about_where_they_do_not(
    tmp_path: Path, headless: Path, head: str, rows: int, config: dict[str, Any], families: tuple[str, ...]
) -> None:
    import shutil

    shutil.copytree(headless, tmp_path / "rm")
    rename_head(tmp_path / "rm", head, rows, **config)
    source = read_source(tmp_path / "rm")
    if len(families) == 1:
        assert choose_family(source).name == families[0]
        return
    with pytest.raises(RewardRTError) as caught:
        choose_family(source)
    for family in families:
        assert f"{family}: " in str(caught.value)
    assert ("choose one with --family" in str(caught.value)) == bool(families)


def test_a_token_classifier_with_two_labels_of_its_own_names_is_no_process_reward_model(tmp_path: Path) -> None:
    write_trl_prm(tmp_path / "rm")
    assert choose_family(read_source(tmp_path / "rm")).name == "trl-prm"
    edit_json(tmp_path / "rm" / "config.json", id2label={"0": "O", "1": "PERSON"})
    with pytest.raises(RewardRTError, match="is not a reward model of a known family"):
        read_checkpoint(tmp_path / "rm")
    assert read_checkpoint(tmp_path / "rm", family="trl-prm").spec.input == "steps"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A classifier's adapter over a base whose pad id is its EOS; the adapter's tokenizer pads with <pad>."""
    folder = tmp_path_factory.mktemp("pads")
    write_language_model(folder / "base", pad_token_id=2)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder / "base", num_labels=1, attn_implementation="eager"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(
            model, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
        )
        randomize_adapter(adapted)
        adapted.save_pretrained(folder / "adapter")
    # Ends with EOS: what the two readings disagree about.
    make_tokenizer(template="{% for m in messages %}{{ m.content }}{% endfor %}</s>").save_pretrained(
        folder / "adapter"
    )
    return folder, adapted.eval()


def test_an_adapter_whose_base_pads_with_another_token_than_its_tokenizer_asks(adapter: tuple[Path, Any]) -> None:
    folder, model = adapter
    assert isinstance(model, PeftModel)
    with pytest.raises(RewardRTError) as caught:
        read_checkpoint(folder / "adapter")
    assert str(caught.value) == (
        "the reward is read by the pad token, and the files allow two: the base's config.json says '</s>' (id 2), the "
        "tokenizer '<pad>' (id 3); say --pad-token '<pad>' if it was trained by TRL's RewardTrainer, which takes the "
        "tokenizer's, or --pad-token '</s>' if it was trained with the base's config.json as it stands"
    )
    ids = make_tokenizer()("hihello there</s>", add_special_tokens=False)["input_ids"]
    found = {}
    for given, pad in (("<pad>", 3), ("2", 2)):
        bundle = export(folder / "adapter", folder / f"bundle{pad}", pad_token=given, certified=False)
        model.config.pad_token_id = model.base_model.model.config.pad_token_id = pad
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0, 0].item()
        found[pad] = RewardModel.load(folder / f"bundle{pad}", provider="cpu").score(messages=HI)
        assert found[pad] == pytest.approx(expected, abs=1e-5)
        assert bundle.manifest.spec.taps[0].ids == (pad,)
        assert bundle.manifest.provenance.choices["pad_token"].endswith(
            "as --pad-token says; config.json's is '</s>' (id 2), the tokenizer's '<pad>' (id 3)"
        )
    assert abs(found[2] - found[3]) > 0.1
    assert read_checkpoint(folder / "adapter", pooling="last_mask").spec.taps[0].rule == "last_mask"


def test_the_command_shows_the_choice_and_explain_asks_the_same(adapter: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = adapter
    result = CliRunner().invoke(app, ["export", str(folder / "adapter"), "--explain"])
    assert "--pad-token '<pad>' if it was trained by TRL" in str(result.exception)
    result = CliRunner().invoke(app, ["export", str(folder / "adapter"), "--explain", "--pad-token", "<pad>"])
    assert "# pad_token: '<pad>' (id 3), as --pad-token says" in result.output
    assert "ids = [3]" in result.output


class _Tokenizer:
    """Four tokens, of which 2 is the EOS."""

    eos_token_id = 2

    def __init__(self, pad: int | None) -> None:
        self.pad_token_id = pad

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return ["<unk>", "<s>", "</s>", "<pad>"][token_id]


# config's id, tokenizer's id, whether the config is an adapter's base's: the id, or what the question offers.
PADS: list[tuple[int | None, int | None, bool, int | tuple[str, ...] | None]] = [
    (3, 3, False, 3),
    (3, 3, True, 3),
    (2, 3, False, 2),
    (2, 3, True, ("--pad-token '<pad>' if it was trained by TRL", "--pad-token '</s>' if it was trained with")),
    (None, 3, False, None),
    (None, 3, True, 3),
    (3, None, False, 3),
    (2, None, True, 2),  # TRL takes EOS then, which is the same
    (3, None, True, ("--pad-token '</s>' if it was trained by TRL", "--pad-token '<pad>' if it was trained with")),
    (None, None, False, None),
    (
        None,
        None,
        True,
        ("--pad-token '</s>' if it was trained by TRL", "--pooling last_mask if it was trained without"),
    ),
    (9, 3, True, ("--pad-token '<pad>' if", "--pad-token 9 if")),
]


@pytest.mark.parametrize(("config", "tokenizer", "borrowed", "expected"), PADS)
def test_the_pad_id_is_the_one_that_training_had_or_a_question(
    config: int | None, tokenizer: int | None, borrowed: bool, expected: Any
) -> None:
    padding = Padding(_Tokenizer(tokenizer), config, borrowed)
    if isinstance(expected, tuple):
        with pytest.raises(RewardRTError) as caught:
            padding.choose()
        assert all(part in str(caught.value) for part in expected)
    else:
        found, said = padding.choose()
        assert found == expected
        assert (said is None) == (config == tokenizer or tokenizer is None)


def test_a_whole_checkpoint_keeps_its_own_pad_id_and_says_where_the_tokenizer_differs(tmp_path: Path) -> None:
    write_sequence_classification(tmp_path / "rm", pad_token_id=2)
    checkpoint = read_checkpoint(tmp_path / "rm")
    assert checkpoint.spec.taps[0].ids == (2,)
    assert checkpoint.source.choices["pad_token"] == (
        "config.json's '</s>' (id 2), which the trained class had; the tokenizer's is '<pad>' (id 3), taken with --pad-token"
    )
    assert read_checkpoint(tmp_path / "rm", pad_token="<pad>").spec.taps[0].ids == (3,)
    edit_json(tmp_path / "rm" / "config.json", pad_token_id=-1)  # Llama's first config.json: the id of no token
    assert read_checkpoint(tmp_path / "rm").spec.taps[0].rule == "last_mask"


def test_a_pad_token_that_is_none_or_not_read_is_refused(tmp_path: Path) -> None:
    write_sequence_classification(tmp_path / "rm")
    write_openrlhf(tmp_path / "openrlhf")
    for name, given, message in (
        ("rm", "<nothing>", "--pad-token '<nothing>': the tokenizer has no such token"),
        ("rm", "300", "--pad-token '300': the tokenizer has no such token"),
        ("rm", "", "--pad-token '': the tokenizer has no such token"),
        ("openrlhf", "<pad>", "--pad-token <pad>: the reward is not read by a pad token; leave the option out"),
    ):
        with pytest.raises(RewardRTError) as caught:
            read_checkpoint(tmp_path / name, pad_token=given)
        assert message in str(caught.value)
