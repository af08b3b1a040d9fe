"""Each wrong checkpoint ends in one clear line and exit status 2, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from checkpoints import (
    add_tensors,
    edit_json,
    make_tokenizer,
    read_tensors,
    write_openrlhf,
    write_sequence_classification,
)
from rewardrt import RewardModel, RewardRTError
from rewardrt.cli.app import app
from rewardrt_export.pipeline import export


def drop(folder: Path, *names: str) -> None:
    state = {name: tensor for name, tensor in read_tensors(folder).items() if name not in names}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def shard(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"score.weight": "model-00001-of-00002.safetensors", "a": "model-00002-of-00002.safetensors"}}'
    )
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def unsafe_bin(folder: Path) -> None:
    import pickle

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": print}))


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no head": (
        lambda f: drop(f, "score.weight"),
        "no reward head: the openrlhf spec needs score.weight ['outputs', 32], and the checkpoint has not",
    ),
    "head of the wrong width": (
        lambda f: add_tensors(f, {"score.weight": torch.randn(1, 31)}),
        "score.weight: expected shape ['outputs', 32] for this backbone, found [1, 31]",
    ),
    "head without its second axis": (
        lambda f: add_tensors(f, {"score.weight": torch.randn(32)}),
        "score.weight: expected shape ['outputs', 32] for this backbone, found [32]",
    ),
    "two outputs": (
        lambda f: add_tensors(f, {"score.weight": torch.randn(2, 32)}),
        "score.weight: 2 outputs; expected a reward model with one",
    ),
    "a NaN in the head": (
        lambda f: add_tensors(f, {"score.weight": torch.full((1, 32), float("nan"))}),
        "score.weight: holds values that are not finite",
    ),
    "a head that was never trained": (
        lambda f: add_tensors(f, {"score.weight": torch.zeros(1, 32)}),
        "score.weight: all zeros",
    ),
    "an infinity in the backbone": (
        lambda f: add_tensors(f, {"model.norm.weight": torch.full((32,), float("inf"))}),
        "norm.weight: holds values that are not finite",
    ),
    "a NaN in the embeddings": (
        lambda f: add_tensors(f, {"model.embed_tokens.weight": torch.full((300, 32), float("nan"))}),
        "embed_tokens.weight: holds values that are not finite",
    ),
    "a second head": (
        lambda f: add_tensors(f, {"value_head.weight": torch.randn(1, 32)}),
        "1 tensors are left over, neither RewardModel's backbone nor its head (score.weight): value_head.weight",
    ),
    "a bias that the family has not": (
        lambda f: add_tensors(f, {"score.bias": torch.randn(1)}),
        "left over, neither RewardModel's backbone nor its head (score.weight): score.bias",
    ),
    "a language model's head left over": (
        lambda f: add_tensors(f, {"lm_head.weight": torch.randn(300, 32)}),
        "left over, neither RewardModel's backbone nor its head (score.weight): lm_head.weight",
    ),
    "a backbone tensor missing": (
        lambda f: drop(f, "model.layers.1.mlp.up_proj.weight"),
        "1 of 20 LlamaModel tensors are not in the checkpoint: layers.1.mlp.up_proj.weight",
    ),
    "a backbone tensor of the wrong shape": (
        lambda f: add_tensors(f, {"model.norm.weight": torch.ones(16)}),
        "norm.weight is [16], config.json says [32]",
    ),
    "missing shard": (shard, "1 of 2 shards missing: model-00002-of-00002.safetensors"),
    "truncated safetensors file": (
        lambda f: truncate(f / "model.safetensors"),
        "model.safetensors: not a whole safetensors file",
    ),
    "a pickle that wants to run code": (unsafe_bin, "not loadable with torch.load(weights_only=True)"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights; expected model.safetensors"),
    "no tokenizer": (remove_tokenizer, "no tokenizer; expected tokenizer.json"),
    "damaged tokenizer": (lambda f: truncate(f / "tokenizer.json"), "tokenizer.json: not readable as JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "damaged config": (lambda f: truncate(f / "config.json"), "config.json: not readable as JSON"),
    "unknown architecture": (
        lambda f: edit_json(f / "config.json", model_type="nonesuch"),
        "model_type 'nonesuch' is not an architecture that transformers knows",
    ),
    "remote code": (
        lambda f: edit_json(f / "config.json", model_type="nonesuch", auto_map={"AutoModel": "x.Y"}),
        "it comes with code of its own, which is never run",
    ),
    "quantized": (
        lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "gptq"}),
        "a quantized checkpoint",
    ),
    "std of zero": (
        lambda f: edit_json(f / "config.json", mean=0.0, std=0.0),
        "expected a finite mean and a positive std",
    ),
    "a plain language model": (
        lambda f: (
            edit_json(f / "config.json", remove=("value_head_prefix",), architectures=["LlamaForCausalLM"]),
            drop(f, "score.weight"),
        ),
        "LlamaForCausalLM is not a reward model of a known family",
    ),
    "two families at once": (
        lambda f: edit_json(f / "config.json", architectures=["LlamaForSequenceClassification"]),
        "matches 2 families (openrlhf: config.json has value_head_prefix; sequence-classification: its architecture is "
        "LlamaForSequenceClassification); choose one with --family",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_checkpoint_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    damage, message = WRONG[name]
    write_openrlhf(tmp_path / "rm")
    damage(tmp_path / "rm")
    with pytest.raises(RewardRTError) as caught:
        export(tmp_path / "rm", tmp_path / "out" / "bundle")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rm"]


def test_two_labels_in_the_config_are_refused_for_sequence_classification(tmp_path: Path) -> None:
    write_sequence_classification(tmp_path / "two", labels=2)
    with pytest.raises(RewardRTError, match=r"score.weight: 2 outputs; expected a reward model with one"):
        export(tmp_path / "two", tmp_path / "bundle")
    write_sequence_classification(tmp_path / "rm")
    edit_json(tmp_path / "rm" / "config.json", id2label={"0": "a", "1": "b"})
    with pytest.raises(RewardRTError, match=r"config.json states 2 labels, but score.weight has 1 output"):
        export(tmp_path / "rm", tmp_path / "bundle")


def test_the_command_prints_the_line_and_exits_2(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import sys

    from rewardrt.cli.app import main

    write_openrlhf(tmp_path / "rm")
    drop(tmp_path / "rm", "score.weight")
    capfd.readouterr()  # what transformers said while it wrote the checkpoint
    old, sys.argv = sys.argv, ["rewardrt", "export", str(tmp_path / "rm"), str(tmp_path / "bundle")]
    try:
        with pytest.raises(SystemExit) as caught:
            main()
    finally:
        sys.argv = old
    assert caught.value.code == 2
    lines = capfd.readouterr().err.splitlines()
    times, steps = zip(*(line.partition(" s] ")[::2] for line in lines[:2]), strict=True)
    assert steps == ("loading torch and transformers", "reading the checkpoint")
    assert all(float(time.removeprefix("[")) >= 0 for time in times)
    assert lines[2].startswith("error: no reward head: ")
    assert len(lines) == 3
    assert not (tmp_path / "bundle").exists()


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write_openrlhf(tmp_path / "rm")
    for options, message in (
        ({"family": "nonesuch"}, "no family 'nonesuch'; expected one of "),
        ({"normalise": True}, "--normalize: config.json has no mean and std"),
        ({"max_length": 513}, "--max-length 513: the backbone has positions for 512 tokens"),
    ):
        with pytest.raises(RewardRTError) as caught:
            export(tmp_path / "rm", tmp_path / "bundle", **options)
        assert message in str(caught.value)


def test_an_existing_target_is_kept_unless_forced_and_only_a_bundle_is_ever_replaced(tmp_path: Path) -> None:
    write_openrlhf(tmp_path / "rm")
    export(tmp_path / "rm", tmp_path / "bundle")
    with pytest.raises(RewardRTError, match="exists already; choose another folder, or replace it with --force"):
        export(tmp_path / "rm", tmp_path / "bundle")
    export(tmp_path / "rm", tmp_path / "bundle", force=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep")
    with pytest.raises(RewardRTError, match="is not a bundle; --force replaces bundles only"):
        export(tmp_path / "rm", tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "keep"


def test_a_failed_forced_export_keeps_the_old_bundle(tmp_path: Path) -> None:
    write_openrlhf(tmp_path / "rm")
    export(tmp_path / "rm", tmp_path / "bundle")
    before = RewardModel.load(tmp_path / "bundle", provider="cpu").score(text="still here")
    add_tensors(tmp_path / "rm", {"model.norm.weight": torch.full((32,), float("nan"))})
    with pytest.raises(RewardRTError, match="not finite"):
        export(tmp_path / "rm", tmp_path / "bundle", force=True)
    assert RewardModel.load(tmp_path / "bundle", provider="cpu").score(text="still here") == before


def test_without_a_chat_template_text_and_prompt_with_response_can_be_scored(tmp_path: Path) -> None:
    write_openrlhf(tmp_path / "rm", tokenizer=make_tokenizer(template=None))
    export(tmp_path / "rm", tmp_path / "bundle")
    runtime = RewardModel.load(tmp_path / "bundle", provider="cpu")
    # OpenRLHF without a template: prompt + response, " " + eos, last id forced to EOS.
    assert runtime.score(prompt="Say hi. ", response="Hi!\n") == runtime.score(text="Say hi. Hi! </s>")
    with pytest.raises(RewardRTError, match="this model has no chat template"):
        runtime.score(messages=[{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")])
    once = [{"role": "user", "content": "Say hi. "}, {"role": "assistant", "content": "Hi!"}]
    assert runtime.score(messages=once) == runtime.score(
        text="Say hi. Hi! </s>"
    )  # one round is a prompt and its answer


def test_help_of_export_needs_no_torch() -> None:
    result = CliRunner().invoke(app, ["export", "--help"])
    assert result.exit_code == 0
    assert "Export a trained reward model to a bundle, and certify it against torch." in result.output
