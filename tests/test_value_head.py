"""Value heads on a language model: the runtime against TRL's forward and GRM's MLP, written out here."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import add_tensors, edit_json, make_tokenizer, read_tensors
from checkpoints_value_head import head_tensors, make_head, values_at_the_end, write_head_file, write_value_head
from rewardrt import RewardModel, RewardRTError
from rewardrt.bundle.spec import Tap
from rewardrt_export.checkpoint import Checkpoint, read_checkpoint
from rewardrt_export.pipeline import export
from texts import make_conversations

TOLERANCE = 1e-4  # standard deviations of the reward


@pytest.mark.parametrize(
    ("backbone", "where", "sizes"),
    [
        ("llama", "model", (32,)),  # TRL
        ("qwen2", "value_head.safetensors", (32,)),  # LLaMA-Factory
        ("gpt_neox", "model", (32, 48, 48)),  # GRM, with two hidden layers; the language model's head is embed_out
    ],
)
def test_value_heads_score_as_in_trl_single_and_batched(
    tmp_path: Path, backbone: str, where: str, sizes: tuple[int, ...]
) -> None:
    model, head = write_value_head(tmp_path / "rm", backbone, where=where, sizes=sizes)
    bundle = export(tmp_path / "rm", tmp_path / "bundle")
    spec = bundle.manifest.spec
    assert (spec.family, spec.taps) == ("value-head", (Tap("last", "last_mask"),))
    assert [layer.activation for layer in spec.heads[0].layers] == ["relu"] * (len(sizes) - 1) + ["none"]
    conversations = make_conversations(24, longest=20)
    tokenizer = make_tokenizer()
    ids = [tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"] for messages in conversations]
    expected = torch.cat([values_at_the_end(model, head, ids[i : i + 8]) for i in range(0, 24, 8)]).numpy()
    rows = [{"messages": messages} for messages in conversations]
    runtime = RewardModel.load(tmp_path / "bundle", provider="cpu")
    single = np.array([runtime.score_many([row])[0] for row in rows])
    batched = RewardModel.load(tmp_path / "bundle", provider="cpu", padding=True).score_many(rows)
    assert np.abs(single - expected).max() < TOLERANCE * expected.std()
    assert np.abs(batched - expected).max() < TOLERANCE * expected.std()


def everything(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return every tensor that the graph would hold."""
    read = {name: source.read for name, source in checkpoint.backbone.sources.items()} | checkpoint.head().sources
    return {name: each().float() for name, each in read.items()}


def beside(name: str) -> Callable[[Path], None]:
    def move(folder: Path) -> None:
        state = read_tensors(folder)
        head = {key: tensor for key, tensor in state.items() if key.startswith("v_head.")}
        save_file({key: tensor for key, tensor in state.items() if key not in head}, folder / "model.safetensors")
        save_file(head, folder / name) if name.endswith("safetensors") else torch.save(head, folder / name)

    return move


def old_names(folder: Path) -> None:
    beside("value_head.bin")(folder)
    state = torch.load(folder / "value_head.bin")
    torch.save({name.removeprefix("v_head."): tensor for name, tensor in state.items()}, folder / "value_head.bin")


def whole_wrapper(folder: Path) -> None:
    """What DeepSpeed ZeRO-3 gathers: the wrapper's own names."""
    state = {
        name if name.startswith("v_head.") else f"pretrained_model.{name}": tensor
        for name, tensor in read_tensors(folder).items()
    }
    save_file(state, folder / "model.safetensors")


LAYOUTS = {
    "value_head.safetensors": beside("value_head.safetensors"),
    "value_head.bin": beside("value_head.bin"),
    "v_head.bin": beside("v_head.bin"),
    "the layer's name alone": old_names,
    "the whole wrapper": whole_wrapper,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_value_head_is_the_same_model(tmp_path: Path, layout: str) -> None:
    write_value_head(tmp_path / "rm")
    expected = read_checkpoint(tmp_path / "rm")
    theirs = everything(expected)
    LAYOUTS[layout](tmp_path / "rm")
    found = read_checkpoint(tmp_path / "rm")
    assert found.spec == expected.spec
    ours = everything(found)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def drop(folder: Path, *names: str) -> None:
    state = {name: tensor for name, tensor in read_tensors(folder).items() if name not in names}
    save_file(state, folder / "model.safetensors")


LOST: dict[str, tuple[Callable[[Path], object], str]] = {
    "trap 2, the file of the head left behind": (
        lambda f: drop(f, "v_head.summary.weight", "v_head.summary.bias"),
        "LlamaForCausalLM is not a reward model of a known family",
    ),
    "trap 2, nothing but a language model after a merge": (
        lambda f: drop(f, "v_head.summary.weight", "v_head.summary.bias"),
        "beside the backbone it has lm_head.weight; a head trained with LoRA, or saved in a file of its own",
    ),
    "trap 1, a config with a head and no head": (
        lambda f: (
            drop(f, "v_head.summary.weight", "v_head.summary.bias"),
            edit_json(f / "config.json", vhead_layer_type="mlp", vhead_num_layers=1, vhead_num_neurons=48),
        ),
        "no reward head: the value-head spec needs v_head.summary.0.weight ['outputs', 32], and the checkpoint has not",
    ),
    "trap 1, the bias lost": (
        lambda f: drop(f, "v_head.summary.bias"),
        "no reward head: the value-head spec needs v_head.summary.bias [1], and the checkpoint has not",
    ),
    "trap 1, a head that was never trained": (
        lambda f: add_tensors(f, {"v_head.summary.weight": torch.zeros(1, 32)}),
        "v_head.summary.weight: all zeros; the head was never trained",
    ),
    "trap 1, a head of another backbone": (
        lambda f: add_tensors(f, {"v_head.summary.weight": torch.ones(1, 64)}),
        "v_head.summary.weight: expected shape ['outputs', 32] for this backbone, found [1, 64]",
    ),
    "trap 1, a head that ZeRO-3 saved empty": (
        lambda f: add_tensors(f, {"v_head.summary.weight": torch.empty(0)}),
        "1 tensors are empty (v_head.summary.weight): a DeepSpeed ZeRO-3 save",
    ),
    "a layer of the MLP lost": (
        lambda f: (
            drop(f, "v_head.summary.weight", "v_head.summary.bias"),
            add_tensors(f, {k: v for k, v in head_tensors(make_head(32, 48, 48)).items() if ".2." not in k}),
        ),
        "no reward head: the value-head spec needs v_head.summary.2.weight ['outputs', 48], and the checkpoint has not",
    ),
    "a layer more than the config says": (
        lambda f: (
            drop(f, "v_head.summary.weight", "v_head.summary.bias"),
            add_tensors(f, head_tensors(make_head(32, 48, 48))),
            edit_json(f / "config.json", vhead_layer_type="mlp", vhead_num_layers=1),
        ),
        "v_head.summary.2.weight: 48 outputs; expected a reward model with one",
    ),
    "a linear head where the config says MLP": (
        lambda f: edit_json(f / "config.json", vhead_layer_type="mlp", vhead_num_layers=1),
        "no reward head: the value-head spec needs v_head.summary.0.weight",
    ),
    "a number of layers that is none": (
        lambda f: edit_json(f / "config.json", vhead_layer_type="mlp", vhead_num_layers="two"),
        "vhead_num_layers 'two'; expected the number of hidden layers, 1 or more",
    ),
    "two kinds of head at once": (
        lambda f: add_tensors(f, {"score.weight": torch.randn(1, 32)}),
        "matches 3 families (openrlhf: it has score.weight with one output, and config.json says LlamaForCausalLM; "
        "sequence-classification: it has score.weight",
    ),
    "the head in two files": (
        lambda f: write_head_file(f / "value_head.safetensors", make_head(32, seed=9)),
        "v_head.summary.bias, v_head.summary.weight both in the model's file and in a value head's",
    ),
    "a tensor beside the head": (
        lambda f: add_tensors(f, {"v_head.other": torch.randn(1)}),
        "1 tensors are left over, neither LlamaForCausalLM's backbone nor its head (v_head.summary.bias, "
        "v_head.summary.weight): v_head.other",
    ),
    "a head file that wants to run code": (
        lambda f: (
            drop(f, "v_head.summary.weight", "v_head.summary.bias"),
            (f / "value_head.bin").write_bytes(pickle.dumps({"x": print})),
        ),
        "value_head.bin: not loadable with torch.load(weights_only=True)",
    ),
}


@pytest.mark.parametrize("name", LOST)
def test_a_value_head_that_is_lost_or_odd_stops_the_export_in_one_line(tmp_path: Path, name: str) -> None:
    damage, message = LOST[name]
    write_value_head(tmp_path / "rm")
    damage(tmp_path / "rm")
    with pytest.raises(RewardRTError) as caught:
        read_checkpoint(tmp_path / "rm")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_mlp_is_told_from_its_tensors_where_the_config_does_not_say(tmp_path: Path) -> None:
    write_value_head(tmp_path / "rm", sizes=(32, 48, 48))
    stated = read_checkpoint(tmp_path / "rm").spec
    edit_json(tmp_path / "rm" / "config.json", remove=("vhead_layer_type", "vhead_num_layers", "vhead_num_neurons"))
    assert read_checkpoint(tmp_path / "rm").spec == stated


def test_only_the_language_models_head_is_left_out(tmp_path: Path) -> None:
    write_value_head(tmp_path / "rm")
    stored = load_file(tmp_path / "rm" / "model.safetensors")
    checkpoint = read_checkpoint(tmp_path / "rm")
    used = {tensor.name for source in checkpoint.backbone.sources.values() for tensor in source.stored}
    assert stored.keys() - used - checkpoint.head().tensors == {"lm_head.weight"}


def test_a_spec_file_says_which_tensors_are_left_out_and_no_others_are(tmp_path: Path) -> None:
    write_value_head(tmp_path / "rm")
    heads = '[[heads]]\n[[heads.layers]]\nweight = "v_head.summary.weight"\nbias = "v_head.summary.bias"\n'
    (tmp_path / "mine.toml").write_text(heads)
    with pytest.raises(RewardRTError, match=r"1 tensors are left over.*: lm_head.weight; a reward would ignore them"):
        read_checkpoint(tmp_path / "rm", spec_file=tmp_path / "mine.toml")
    (tmp_path / "mine.toml").write_text(
        f'{heads}[unused]\n"lm_head.weight" = "the reward is read off the hidden state"\n'
    )
    found = read_checkpoint(tmp_path / "rm", spec_file=tmp_path / "mine.toml")
    assert found.spec.heads == read_checkpoint(tmp_path / "rm").spec.heads
