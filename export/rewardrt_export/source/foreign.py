"""Folders whose weights are in another program's format: what they are, and how to convert them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PLAIN = "expected model.safetensors, model.safetensors.index.json or pytorch_model.bin in the folder"
_SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")


@dataclass(frozen=True)
class Foreign:
    """One format: a folder has it if a file matches one of the `names` (globs).

    `what` names the format, and `remedy` is the command that converts it. `{folder}`, `{parent}` and `{name}` in them
    are filled in.
    """

    names: tuple[str, ...]
    what: str
    remedy: str


_COPY = "then copy config.json and the tokenizer's files into OUT"
PROGRAMS = (
    Foreign(
        ("model_world_size_*_rank_*.pt", "*/model_world_size_*_rank_*.pt"),
        "shards of verl, one for each process",
        "merge them: python -m verl.model_merger merge --backend fsdp --local_dir {parent} --target_dir OUT",
    ),
    Foreign(
        ("iter_*", "latest_checkpointed_iteration.txt", "mp_rank_[0-9][0-9]", "mp_rank_[0-9][0-9]_[0-9]*"),
        "a Megatron checkpoint, cut by tensors or layers",
        "convert it to transformers' layout with Megatron's tools/checkpoint/convert.py or Megatron Bridge",
    ),
    Foreign(
        ("zero_to_fp32.py", "latest", "global_step*"),
        "a DeepSpeed checkpoint, in which each process saved its part",
        f"make plain weights: python {{folder}}/zero_to_fp32.py {{folder}} OUT --safe_serialization, {_COPY}",
    ),
    Foreign(
        ("*mp_rank_*_model_states.pt", "*zero_pp_rank_*_states.pt"),
        "a step of a DeepSpeed checkpoint, in which each process saved its part",
        "make plain weights in the folder above: python zero_to_fp32.py . OUT --safe_serialization, " + _COPY,
    ),
    Foreign(
        ("*.distcp", ".metadata", "pytorch_model_fsdp_*", "*/*.distcp"),
        "a distributed (FSDP) checkpoint, in which each process saved its part",
        f"merge it: accelerate merge-weights {{parent}} OUT, {_COPY}",
    ),
    Foreign(
        ("pytorch_model_fsdp.bin",),
        "the whole state dict that FSDP gathered",
        "rename {name} to pytorch_model.bin",
    ),
    Foreign(("*.gguf",), "a model for llama.cpp ({name})", "export the folder that it was made from"),
    Foreign(
        ("consolidated*.pth", "consolidated*.safetensors", "params.json"),
        "a model in its author's own layout ({name}), which has no reward head",
        "export the folder that was trained; transformers' convert_llama_weights_to_hf and its like make one of a base",
    ),
    Foreign(
        ("tf_model*.h5", "*.ckpt.index"),
        "TensorFlow weights ({name})",
        "with transformers 4 and TensorFlow: AutoModelForSequenceClassification.from_pretrained(FOLDER, from_tf=True)"
        ".save_pretrained(OUT)",
    ),
    Foreign(
        ("flax_model*.msgpack",),
        "Flax weights ({name})",
        "with transformers 4 and flax: AutoModelForSequenceClassification.from_pretrained(FOLDER, from_flax=True)"
        ".save_pretrained(OUT)",
    ),
    Foreign(
        ("*.onnx", "openvino_model.xml", "*.engine", "onnx", "*.mlmodel", "rust_model.ot", "weights.npz"),
        "a model exported for another runtime ({name})",
        "export the folder that it was made from",
    ),
    Foreign(
        ("adapter_model.safetensors", "adapter_model.bin"),
        "an adapter's weights without adapter_config.json",
        "copy adapter_config.json beside them",
    ),
)


def describe_foreign(folder: Path) -> str:
    """Say what a folder without plain weights contains, and how to make plain weights from it."""
    shards = sorted(path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name))
    if shards:
        index = "model.safetensors.index.json" if shards[0].endswith("safetensors") else "pytorch_model.bin.index.json"
        return f"{folder}: {len(shards)} shards ({shards[0]}, ...) without their index; copy {index} beside them"
    saved = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    if saved:
        last = max(saved, key=lambda path: (len(path.name), path.name))
        return f"{folder}: no weights, but {len(saved)} checkpoints of a training; export one of them, such as {last}"
    for layout in PROGRAMS:
        for pattern in layout.names:
            if first := next(iter(sorted(folder.glob(pattern))), None):
                fill = {"folder": folder, "name": first.name, "parent": _holder(first)}
                return f"{folder}: {layout.what.format(**fill)}; {layout.remedy.format(**fill)}"
    return f"{folder}: no weights; {PLAIN}{_near(folder)}"


def _holder(found: Path) -> Path:
    """Return the folder that contains the shards."""
    return found if found.is_dir() and found.name.startswith("pytorch_model_fsdp") else found.parent


def _near(folder: Path) -> str:
    """Name files that may be the weights under another name, or a subfolder that has weights."""
    files = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    files = [
        name for name in files if name not in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")
    ]
    if files:
        return f"; if {files[0]} is the model's weights, rename it"
    below = sorted(folder.glob("*/model*.safetensors*")) + sorted(folder.glob("*/pytorch_model*.bin*"))
    return f"; there are some in {below[0].parent}" if below else ""
