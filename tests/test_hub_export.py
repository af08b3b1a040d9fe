"""Exports of checkpoints by their name on the Hub: what is downloaded, what the bundle says, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification

from checkpoints import write_openrlhf, write_sequence_classification
from hub_server import Hub, serving, variables
from rewardrt import RewardModel
from rewardrt.errors import CheckpointError
from rewardrt.text.tokens import EncodedText
from rewardrt_export.pipeline import export
from rewardrt_export.places import check_checkpoint, find_repository
from rewardrt_export.source.repository import find_checkpoint, wanted_files

# What is in repositories beside what an export reads.
STRAYS = {
    "modeling.py": b"raise SystemExit", "pytorch_model.bin": b"torch", "tf_model.h5": b"h5", "flax_model.msgpack": b"",
    "model.gguf": b"gguf", "onnx/model.onnx": b"onnx", "original/model.safetensors": b"x", "optimizer.pt": b"x",
    "training_args.bin": b"x", "README.md": b"x", ".gitattributes": b"x", "rng_state.pth": b"x",
}  # fmt: skip
LISTINGS = {
    "safetensors and nothing beside": (
        ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"],
        list(STRAYS),
    ),
    "an index before a file": (
        ["config.json", "model.safetensors.index.json", "spiece.model"],
        ["model.safetensors", "pytorch_model.bin.index.json", "model-00001-of-00002.safetensors"],
    ),
    "what torch saved, for want of safetensors": (
        ["config.json", "pytorch_model.bin", "vocab.json", "merges.txt", "value_head.bin", "gating_layer.pt"],
        ["optimizer.pt", "scheduler.pt", "model.gguf", "v_head.bin"],
    ),
    "an adapter": (
        ["adapter_config.json", "adapter_model.safetensors", "value_head.safetensors", "tokenizer.json"],
        ["adapter_model.bin", "checkpoint-10/adapter_model.safetensors", "value_head.bin"],
    ),
    "templates, and sentence-transformers' module": (
        ["config.json", "model.safetensors", "chat_template.jinja", "additional_chat_templates/rag.jinja",
         "processor_config.json", "1_LogitScore/config.json"],
        ["1_Pooling/config.json", "preprocessor_config.json", "additional_chat_templates/a.py"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LISTINGS)
def test_of_a_repository_only_what_an_export_reads_is_wanted(name: str) -> None:
    wanted, left = LISTINGS[name]
    assert sorted(wanted_files([*left, *wanted])) == sorted(wanted)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sharded(files: dict[str, bytes]) -> dict[str, bytes]:
    """Return a checkpoint whose one file of weights stands under an index."""
    weights = files.pop("model.safetensors")
    names = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")]).keys() - {"__metadata__"}
    shard = "model-00001-of-00001.safetensors"
    index = {"weight_map": dict.fromkeys(sorted(names), shard), "metadata": {}}
    return files | {shard: weights, "model.safetensors.index.json": json.dumps(index).encode(), "model.safetensors": b"stray"}  # fmt: skip


PROGRAM = """
import json, sys
from rewardrt import RewardRTError
from rewardrt.bundle import hub
from rewardrt_export.cli import export
from rewardrt_export.source.folder import read_source
from rewardrt_export.source.repository import find_checkpoint
export.main(["org/rm", "--explain"], standalone_mode=False)
for name, base in json.loads(sys.argv[1]):
    try:
        found = read_source(find_checkpoint(name), find_checkpoint(base) if base else None)
        print(hub.name_of(found.folder), "on", hub.name_of(found.adapter.base), len(found.stored))
    except RewardRTError as error:
        print(type(error).__name__, error)
"""


def explained(hub: Hub, home: Path, *asked: tuple[str, str | None]) -> list[str]:
    """Explain org/rm; return what was said of it and the first line, and one for each name that was read."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(asked)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=variables(hub, home), cwd=home, timeout=200
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return [done.stderr.splitlines()[0], lines[0], *lines[len(lines) - len(asked) :]]


def test_checkpoints_and_bases_are_read_by_name(tmp_path: Path) -> None:
    write_openrlhf(tmp_path / "rm", "llama")
    write_sequence_classification(tmp_path / "base", "llama")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    tensors = len(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about transformers
        adapted = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=2, target_modules=["q_proj"]))
        adapted.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "org/base"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with serving() as hub:
        files = sharded(files_of(tmp_path / "rm"))
        commits = {
            "org/rm": hub.add("org/rm", STRAYS | files),
            "org/base": hub.add("org/base", STRAYS | files_of(tmp_path / "base")),
            "org/adapter": hub.add("org/adapter", files_of(tmp_path / "adapter")),
        }
        hub.add("org/gguf", {"model.gguf": b"x", "config.json": b"{}"})
        hub.add("org/bundle", {"reward.json": b"{}"})
        (tmp_path / "here-is").mkdir()
        found = explained(
            hub, tmp_path, ("hf://org/adapter", "org/base"), ("org/adapter@main", None),
            ("org/gguf", None), ("org/bundle", None), ("org/none", None), ("here-is/a-slip", None), ("./org/here", None),
        )  # fmt: skip
        read = {*files} - {"model.safetensors", "README.md"}
        size = sum(len(files[name]) for name in read) / 1e6
        rm, base, adapter = (f"{name}@{commits[name]}" for name in commits)
        assert found[0] == f"downloading hf://{rm} or taking it from the cache ({len(read)} files, {size:,.1f} MB)"
        assert found[1] == f"# {rm}: OpenRLHF reward model"
        assert found[2] == f"{adapter} on {base} {tensors}"
        refused = str(tmp_path / "hf/hub/models--org--adapter/snapshots" / commits["org/adapter"])
        assert found[3:] == [
            f"CheckpointError {refused}: an adapter of 'org/base', which is not a folder here; give its base with --base "
            "FOLDER, or have it downloaded: --base hf://org/base",
            f"CheckpointError hf://org/gguf@{hub.repos['org/gguf'].refs['main']}: no weights that an export reads; "
            "expected model.safetensors or pytorch_model.bin, or an adapter's, found config.json, model.gguf",
            f"CheckpointError hf://org/bundle@{hub.repos['org/bundle'].refs['main']}: is a bundle already; score with it: "
            f"rewardrt score hf://org/bundle@{hub.repos['org/bundle'].refs['main']}",
            f"HubError hf://org/none: no such repository at {hub.url}, or it is private: set HF_TOKEN, or run `hf auth "
            "login`",
            "CheckpointError here-is/a-slip: expected a checkpoint folder, found nothing; to download it from the "
            "Hugging Face Hub, name it hf://here-is/a-slip",
            "CheckpointError org/here: expected a checkpoint folder, found nothing; to download it from the Hugging Face "
            "Hub, name it hf://org/here",
        ]
        asked = {path.split("/resolve/")[1].partition("/")[2] for how, path, _ in hub.log if "/org/rm/resolve/" in path}
        assert asked == read
        assert not {"modeling.py", "optimizer.pt", "pytorch_model.bin", "onnx/model.onnx"} & set(hub.files())


def test_a_bundle_says_the_repository_and_commit_of_a_folder_of_the_hubs_cache(tmp_path: Path) -> None:
    commit = "0123456789" * 4
    place = tmp_path / "models--org--rm" / "snapshots" / commit
    (tmp_path / "models--org--rm" / "blobs").mkdir(parents=True)
    backbone, head = write_openrlhf(place, "llama")
    for path in list(place.iterdir()):  # as the cache has them
        path.rename(place.parent.parent / "blobs" / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    made = export(place, tmp_path / "out", certified=False)
    assert made.manifest.provenance.checkpoint == f"org/rm@{commit}"
    ids = [5, 6, 7]
    model = RewardModel.load(tmp_path / "out", provider="cpu")
    found = model.runner.run([EncodedText(np.array(ids), 0, np.array([2]), None)])[0][0]
    with torch.inference_mode():
        expected = (backbone(torch.tensor([ids])).last_hidden_state[0, -1] @ head[0]).item()
    assert abs(found - expected) < 1e-5


def test_a_folder_goes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "rm").mkdir(parents=True)
    assert find_repository("org/rm") is None and find_checkpoint("org/rm") == Path("org/rm")
    assert find_checkpoint(tmp_path / "org" / "rm") == tmp_path / "org" / "rm"
    assert str(find_repository("hf://org/rm")) == "hf://org/rm"
    assert str(find_repository("another/rm@v2")) == "hf://another/rm@v2"
    assert find_repository("org/rn") is None  # the folder org is here: a slip
    with pytest.raises(CheckpointError, match="org/rn: expected a checkpoint folder, found nothing"):
        check_checkpoint(Path("org/rn"))
