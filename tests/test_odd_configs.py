"""Every field of a checkpoint's JSON files with a value of the wrong kind: exported, or refused in one line and in time."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from checkpoints import edit_json, write_sequence_classification
from checkpoints_value_head import write_language_model
from rewardrt import RewardRTError
from rewardrt_export.checkpoint import read_checkpoint

VALUES: list[Any] = [
    None, "text", "2048", [], [1, "x"], {}, {"a": {"b": [1]}}, -1, 0, 1.5, 10**12, True, float("inf"), "\ud800",
]  # fmt: skip
# Fields that these checkpoints do not have, and others have.
MORE = {
    "config.json": (
        "quantization_config", "vision_config", "text_config", "auto_map", "rope_scaling", "rope_parameters", "layer_types",
        "num_labels", "id2label", "sliding_window", "is_encoder_decoder", "pruned_heads", "attn_implementation", "torch_dtype",
    ),
    "tokenizer_config.json": (
        "auto_map", "added_tokens_decoder", "extra_special_tokens", "additional_special_tokens", "add_bos_token", "init_inputs",
        "fast_tokenizer_files", "split_special_tokens", "chat_template", "truncation_side", "padding_side",
    ),
    "adapter_config.json": ("rank_pattern", "alpha_pattern", "use_dora", "use_rslora", "exclude_modules", "base_model_class"),
}  # fmt: skip
SAMPLED = 2  # values of each field; all of them have been tried by hand
LONGEST = 20.0  # seconds; it is some hundredths where the machine is free


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint, an encoder's kin with positions from its pad id, and an adapter over its base."""
    folder = tmp_path_factory.mktemp("odd")
    for backbone in ("llama", "gemma2"):
        write_sequence_classification(folder / backbone, backbone)
    write_language_model(folder / "base")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS")
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    return folder


def fields(path: Path) -> Iterator[tuple[str, Any]]:
    names = dict.fromkeys([*json.loads(path.read_text()), *MORE[path.name]])
    for name in names:
        for value in random.Random(name).sample(VALUES, SAMPLED):
            yield name, value


@pytest.mark.filterwarnings("ignore")  # what transformers says of an odd value
@pytest.mark.parametrize(
    ("folder", "file"),
    [
        ("llama", "config.json"),
        ("gemma2", "config.json"),
        ("llama", "tokenizer_config.json"),
        ("adapter", "adapter_config.json"),
    ],
)
def test_a_field_of_the_wrong_kind_exports_or_is_refused_in_one_line(
    tmp_path: Path, folders: Path, folder: str, file: str
) -> None:
    shutil.copytree(folders / folder, tmp_path / "rm")
    path, base = tmp_path / "rm" / file, folders / "base" if folder == "adapter" else None
    whole = path.read_text()
    read, said = 0, list[str]()
    for name, value in fields(path):
        edit_json(path, **{name: value})
        started = time.perf_counter()
        try:
            read_checkpoint(tmp_path / "rm", base=base)
            read += 1
        except RewardRTError as error:
            said.append(str(error))
        except Exception as error:
            raise AssertionError(f"{name} {value!r}: {type(error).__name__}: {error}") from error
        assert time.perf_counter() - started < LONGEST, (name, value)
        path.write_text(whole)
    assert read > 5 and len(said) > 5
    assert not any("\n" in line for line in said)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "pad id = vocabulary size": (
        "config.json",
        {"pad_token_id": 300},
        "config.json: pad_token_id 300, and vocab_size is 300: no token of the model has this id",
    ),
    "an activation that is none": (
        "config.json",
        {"hidden_act": "nonesuch"},
        "LlamaModel cannot be built of config.json: hidden_act 'nonesuch' is not known there",
    ),
    "more layers than tensors": (
        "config.json",
        {"num_hidden_layers": 10**12},
        "num_hidden_layers 1000000000000; no model has so many",
    ),
    "layers of another model": (
        "config.json",
        {"num_hidden_layers": 900},
        "num_hidden_layers 900, and the checkpoint has",
    ),
    "labels without end": (
        "config.json",
        {"num_labels": 10**12},
        "num_labels 1000000000000; no model has so many",
    ),
    "a head of no size": (
        "config.json",
        {"head_dim": 0},
        "LlamaModel cannot be built of config.json: ZeroDivisionError",
    ),
    "a type that torch has not": ("config.json", {"dtype": []}, "not a config of model_type 'llama': dtype '[]' ("),
    "no kind of model": ("config.json", {"model_type": None}, "config.json: model_type None is not an architecture"),
    "a limit in words": (
        "tokenizer_config.json",
        {"model_max_length": "long"},
        "tokenizer_config.json: model_max_length 'long'; expected a number of tokens, 1 or more",
    ),
    "a negative limit": ("tokenizer_config.json", {"model_max_length": -1}, "model_max_length -1; expected a number"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_names_its_field(tmp_path: Path, folders: Path, name: str) -> None:
    file, stated, message = REFUSED[name]
    shutil.copytree(folders / "llama", tmp_path / "rm")
    edit_json(tmp_path / "rm" / file, **stated)
    with pytest.raises(RewardRTError) as caught:
        read_checkpoint(tmp_path / "rm")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("stated", "limit"), [("128", 128), (128.0, 128), (None, 512), (1e30, 512), (10**40, 512), (float("inf"), 512)]
)
def test_the_tokenizers_limit_is_read_in_every_form_of_a_number(
    tmp_path: Path, folders: Path, stated: Any, limit: int
) -> None:
    shutil.copytree(folders / "llama", tmp_path / "rm")
    edit_json(tmp_path / "rm" / "tokenizer_config.json", model_max_length=stated)
    assert read_checkpoint(tmp_path / "rm").spec.max_length == limit
