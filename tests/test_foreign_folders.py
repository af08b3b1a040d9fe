"""Weights in another program's layout, with names that wrappers made, or in another type: read, or named with a remedy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import edit_json, read_tensors, write_openrlhf, write_sequence_classification
from checkpoints_value_head import make_head, write_head_file, write_value_head
from rewardrt import RewardRTError
from rewardrt_export.checkpoint import read_checkpoint
from rewardrt_export.source.weights import read_file


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint; copy it before changing anything."""
    folder = tmp_path_factory.mktemp("foreign") / "rm"
    write_openrlhf(folder)
    return folder


def rename(folder: Path, change: Callable[[str], str]) -> None:
    state = {change(name): tensor for name, tensor in read_tensors(folder).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change",
    [
        "_orig_mod.{}".format,
        "module.{}".format,
        "module._orig_mod.{}".format,
        "_orig_mod.module.{}".format,
        "module.module.{}".format,
        "_fsdp_wrapped_module.{}".format,
        lambda name: name.replace("model.layers.0.", "model.layers.0._orig_mod."),
        lambda name: name.replace("self_attn.", "_checkpoint_wrapped_module.self_attn."),
    ],
)
def test_what_wrappers_put_into_names_is_left_out(tmp_path: Path, plain: Path, change: Callable[[str], str]) -> None:
    shutil.copytree(plain, tmp_path / "rm")
    rename(tmp_path / "rm", change)
    assert "_orig_mod" not in str(read_tensors(plain).keys())
    expected, found = read_checkpoint(plain), read_checkpoint(tmp_path / "rm")
    assert found.spec == expected.spec
    for name, source in expected.backbone.sources.items():
        assert torch.equal(found.backbone.sources[name].read(), source.read())


def test_wrapped_names_in_bins_shards_head_files_and_adapters_are_left_out_too(tmp_path: Path, plain: Path) -> None:
    state = {f"module._orig_mod.{name}": tensor for name, tensor in read_tensors(plain).items()}
    shutil.copytree(plain, tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    assert read_checkpoint(tmp_path / "bin").spec == read_checkpoint(plain).spec
    write_value_head(tmp_path / "head", where="value_head.safetensors")
    head = load_file(tmp_path / "head" / "value_head.safetensors")
    save_file({f"module.{name}": tensor for name, tensor in head.items()}, tmp_path / "head" / "value_head.safetensors")
    assert read_checkpoint(tmp_path / "head").spec.family == "value-head"
    names = ("module.base_model.model.model.norm.weight", "base_model.model._orig_mod.model.embed_tokens.weight")
    save_file({name: torch.ones(4) for name in names}, tmp_path / "adapter_model.safetensors")
    assert set(read_file(tmp_path / "adapter_model.safetensors")) == {
        "base_model.model.model.norm.weight",
        "base_model.model.model.embed_tokens.weight",
    }


def test_two_tensors_of_one_name_without_their_wrappers_are_refused_by_name(tmp_path: Path, plain: Path) -> None:
    shutil.copytree(plain, tmp_path / "rm")
    state = read_tensors(plain)
    save_file(state | {"module.score.weight": torch.ones(1, 32)}, tmp_path / "rm" / "model.safetensors")
    with pytest.raises(
        RewardRTError, match=r"(module\.)?score.weight and (module\.)?score.weight are both the model's sc"
    ):
        read_checkpoint(tmp_path / "rm")


def empty(folder: Path) -> None:
    state = {name: torch.empty(0) if "mlp" in name else tensor for name, tensor in read_tensors(folder).items()}
    save_file(state, folder / "model.safetensors")


def holding(*names: str, config: bool = True) -> Callable[[Path], None]:
    """Take the weights away, and put these files or folders there."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        if not config:
            (folder / "config.json").unlink()
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir() if name.endswith("/") else path.write_bytes(b"0")

    return change


def stored_as(dtype: torch.dtype) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        state = read_tensors(folder)
        save_file(state | {name: state[name].to(dtype)}, folder / "model.safetensors")

    return change


ZERO = "a DeepSpeed checkpoint, in which each process saved its part; make plain weights: python "
FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "an unfinished ZeRO-3 save": (
        empty,
        "6 tensors are empty (model.layers.0.mlp.down_proj.weight, model.layers.0.mlp.gate_proj.weight, "
        "model.layers.0.mlp.up_proj.weight and 3 more): a DeepSpeed ZeRO-3 save, for which the processes' parts were not "
        "gathered; set stage3_gather_16bit_weights_on_model_save",
    ),
    "DeepSpeed": (holding("latest", "zero_to_fp32.py", "global_step50/mp_rank_00_model_states.pt"), ZERO),
    "DeepSpeed without config.json": (holding("latest", "global_step50/", config=False), ZERO),
    "a step of DeepSpeed": (
        holding("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"),
        "a step of a DeepSpeed checkpoint, in which each process saved its part; make plain weights in the folder above",
    ),
    "FSDP": (
        holding(".metadata", "__0_0.distcp"),
        "a distributed (FSDP) checkpoint, in which each process saved its part",
    ),
    "accelerate's FSDP": (holding("pytorch_model_fsdp_0/__0_0.distcp"), "merge it: accelerate merge-weights "),
    "FSDP's whole state": (holding("pytorch_model_fsdp.bin"), "rename pytorch_model_fsdp.bin to pytorch_model.bin"),
    "verl": (
        holding("model_world_size_8_rank_0.pt", "model_world_size_8_rank_1.pt"),
        "shards of verl, one for each process; merge them: python -m verl.model_merger merge --backend fsdp --local_dir",
    ),
    "verl's step": (holding("critic/model_world_size_8_rank_0.pt"), "/rm/critic --target_dir OUT"),
    "Megatron": (
        holding("mp_rank_00/model_optim_rng.pt"),
        "a Megatron checkpoint, cut by tensors or layers; convert it",
    ),
    "Megatron's iterations": (holding("latest_checkpointed_iteration.txt", "iter_0000100/"), "a Megatron checkpoint"),
    "llama.cpp": (
        holding("model-q4.gguf"),
        "a model for llama.cpp (model-q4.gguf); export the folder that it was made",
    ),
    "Meta's own": (
        holding("consolidated.00.pth", "params.json"),
        "a model in its author's own layout (consolidated.00.pth)",
    ),
    "TensorFlow": (holding("tf_model.h5"), "TensorFlow weights (tf_model.h5); with transformers 4"),
    "Flax": (holding("flax_model.msgpack"), "Flax weights (flax_model.msgpack); with transformers 4"),
    "ONNX": (holding("model.onnx"), "a model exported for another runtime (model.onnx); export the folder that"),
    "a training's folder": (
        holding("checkpoint-50/model.safetensors", "checkpoint-500/model.safetensors", config=False),
        "no weights, but 2 checkpoints of a training; export one of them, such as ",
    ),
    "shards without their index": (
        holding("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        "2 shards (model-00001-of-00002.safetensors, ...) without their index; copy model.safetensors.index.json beside",
    ),
    "an adapter's weights": (holding("adapter_model.safetensors"), "an adapter's weights without adapter_config.json"),
    "another name": (holding("reward.pt"), "no weights; expected model.safetensors, model.safetensors.index.json or"),
    "a folder below": (holding("huggingface/model.safetensors"), "/rm/huggingface"),
    "weights left with git-lfs": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "model.safetensors: a git-lfs pointer and not the file itself; run `git lfs pull`",
    ),
    "float8": (
        stored_as(torch.float8_e4m3fn),
        "1 tensors hold quantized weights (model.layers.0.mlp.up_proj.weight (float8_e4m3fn)); export the checkpoint",
    ),
    "8 bits": (stored_as(torch.int8), "(model.layers.0.mlp.up_proj.weight (int8)); export the checkpoint"),
    "bitsandbytes": (
        lambda f: edit_json(
            f / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
        ),
        "config.json: a quantized checkpoint; export the one it was made from",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_plain_checkpoint_is_named_with_what_makes_one_of_it(tmp_path: Path, plain: Path, name: str) -> None:
    change, message = FOREIGN[name]
    shutil.copytree(plain, tmp_path / "rm")
    change(tmp_path / "rm")
    with pytest.raises(RewardRTError) as caught:
        read_checkpoint(tmp_path / "rm")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "stated",
    [
        {"quantization_config": None},
        {"quantization_config": {}},
        {"quantization_config": {"quant_method": "none"}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}},
        {"vision_config": None, "audio_config": None, "text_config": None, "auto_map": None},
        {"initializer_range": 0},
        {"initializer_range": 0.0},
        {"rms_norm_eps": 1},
    ],
)
def test_fields_that_say_nothing_change_nothing(tmp_path: Path, plain: Path, stated: dict[str, object]) -> None:
    shutil.copytree(plain, tmp_path / "rm")
    edit_json(tmp_path / "rm" / "config.json", **stated)
    found, expected = read_checkpoint(tmp_path / "rm"), read_checkpoint(plain)
    assert found.spec == expected.spec
    assert {name: source.stored[0].shape for name, source in found.backbone.sources.items()} == {
        name: source.stored[0].shape for name, source in expected.backbone.sources.items()
    }


def test_a_plain_checkpoint_beside_a_trainings_own_files_is_read(tmp_path: Path) -> None:
    write_sequence_classification(tmp_path / "rm")
    for name in ("latest", "zero_to_fp32.py", "tf_model.h5", "model.gguf"):
        (tmp_path / "rm" / name).write_text("global_step50")
    (tmp_path / "rm" / "global_step50").mkdir()
    assert read_checkpoint(tmp_path / "rm").spec.family == "sequence-classification"
    write_head_file(tmp_path / "rm" / "value_head.bin", make_head(32))
    with pytest.raises(RewardRTError, match="matches 2 families"):
        read_checkpoint(tmp_path / "rm")
