"""Tiny random checkpoints in the true on-disk layout of each family, made by the test that needs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role ' + message.role + ' is not known') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 300

BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
GQA = {"num_key_value_heads": 2}
# The window is far shorter than the texts of the tests, so that a missing mask shows.
WINDOW = {"sliding_window": 8}
BACKBONES: dict[str, dict[str, Any]] = {
    "llama": GQA,
    "qwen2": GQA,
    "qwen3": GQA | {"head_dim": 16},
    "mistral": GQA | WINDOW,
    "gemma2": GQA | WINDOW | {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": GQA
    | WINDOW
    | {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": GQA | WINDOW,
    "gpt_neox": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "olmo2": GQA,
    "smollm3": GQA | {"no_rope_layer_interval": 2},
    "granite": GQA,
    "mixtral": GQA | WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": GQA
    | {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
    },
}


def make_tokenizer(
    *, pad: str = "<pad>", adds_bos: bool = False, template: str | None = CHATML
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of VOCABULARY tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog and the user asks for more"] * 4, trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token=pad
    )
    tokenizer.chat_template = template
    return tokenizer


def make_config(backbone: str = "llama", **changes: Any) -> Any:
    return AutoConfig.for_model(backbone, **{**BASE, **BACKBONES[backbone], **changes})


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter values large enough that an error anywhere shows in the reward."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def write_openrlhf(
    folder: Path,
    backbone: str = "llama",
    *,
    prefix: str | None = "score",
    head_name: str = "score",
    config: dict[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    max_shard_size: str = "5GB",
    **changes: Any,
) -> tuple[torch.nn.Module, torch.Tensor]:
    """Write what OpenRLHF's save_model leaves: base model tensors under the class's prefix, and the head.

    Returns the backbone in float32 with eager attention, and the head's weight [1, hidden].
    """
    model_config = make_config(backbone, **changes)
    model = AutoModel.from_config(model_config, attn_implementation="eager", dtype=torch.float32).eval()
    randomize(model)
    head = torch.randn(1, getattr(model_config, "word_embed_proj_dim", None) or model_config.hidden_size)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    edit_json(
        folder / "config.json",
        architectures=["RewardModel"],
        normalize_reward=False,
        **({"value_head_prefix": prefix} if prefix else {}),
        **(config or {}),
    )
    add_tensors(folder, {f"{head_name}.weight": head}, prefix=f"{model.base_model_prefix}.")
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return model, head


def write_sequence_classification(
    folder: Path,
    backbone: str = "llama",
    *,
    labels: int = 1,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **changes: Any,
) -> torch.nn.Module:
    """Write what save_pretrained leaves of an AutoModelForSequenceClassification, and return that model."""
    config = make_config(backbone, num_labels=labels, **changes)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager", dtype=torch.float32)
    randomize(model)
    model.eval().save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return model


def write_judge(folder: Path) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """Write a checkpoint of no family, for docs/spec-file.md: a Llama, `judge.up` [24, 32] and `judge.down` [3, 24].

    Returns the backbone in float32 with eager attention, and the two tensors.
    """
    model = AutoModel.from_config(make_config(), attn_implementation="eager", dtype=torch.float32).eval()
    randomize(model)
    model.save_pretrained(folder)
    up, down = torch.randn(24, 32) * 0.3, torch.randn(3, 24)
    add_tensors(folder, {"judge.up": up, "judge.down": down}, prefix="model.")
    edit_json(folder / "config.json", architectures=["LlamaForJudging"])
    make_tokenizer(template=None).save_pretrained(folder)
    return model, up, down


def add_tensors(folder: Path, tensors: dict[str, torch.Tensor], prefix: str = "") -> None:
    """Rewrite model.safetensors with `prefix` before every name that has it not, and with these tensors added."""
    state = read_tensors(folder)
    named = {name if name.startswith(prefix) else prefix + name: tensor for name, tensor in state.items()}
    save_file({**named, **tensors}, folder / "model.safetensors", metadata={"format": "pt"})


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def edit_json(path: Path, *, remove: tuple[str, ...] = (), **changes: Any) -> None:
    data = json.loads(path.read_text())
    data = {name: value for name, value in data.items() if name not in remove} | changes
    path.write_text(json.dumps(data))
