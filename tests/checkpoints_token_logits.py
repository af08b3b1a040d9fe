"""Tiny language models whose reward is a function of tokens' logits, with tokenizers built as the real ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from checkpoints import BACKBONES, BASE, GQA, edit_json, randomize, read_tensors

WORDS = (
    "yes no Yes No safe unsafe Safe Unsafe Controversial query document instruction relevance judgment Query Document "
    "Instruct passage question answer the and of user assistant system harmful request response 0 1 2 3 4 5 "
)
VOCABULARY = 600
# Qwen's and Llama 3's: words with the space before them, digits one by one, runs of line breaks.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
LLAMA_SPECIAL = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
GEMMA_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]

QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GUARD_TEMPLATE = (
    "{{ bos_token }}<|start_header_id|>user<|end_header_id|>\n\nTask: Check the last message of the conversation.\n\n"
    "{% for message in messages %}{{ message.role }}: {{ message.content | trim }}\n\n{% endfor %}"
    "Provide your assessment.<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
)
SHIELD_TEMPLATE = (
    "{{ bos_token }}You are a policy expert.\n\n<start_of_turn>\nHuman Question: {{ messages[0].content | trim }}\n"
    "<end_of_turn>\n\n<start_of_turn>\nChatbot Response: {{ messages[1].content | trim }}\n<end_of_turn>\n\n"
    "Our safety principle is defined in the below:\n\n{{ guideline }}\n\n===\n\nDoes it violate the principle? Your "
    "answer must start with 'Yes' or 'No'.\n\n"
)


def byte_level(special: list[str], *, bos: str | None, template: str | None) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE like Qwen's, or with `bos` like Llama 3's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([WORDS, *WORDS.split(), "\n\n", "\n"] * 8, trainer)
    if bos is not None:
        number = backend.token_to_id(bos)
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, number)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=special[-1] if bos is None else "<|eot_id|>",
        pad_token=special[0],
    )
    tokenizer.chat_template = template
    return tokenizer


def sentence_piece(template: str | None) -> PreTrainedTokenizerFast:
    """Return a BPE over characters with byte fallback, spaces as "▁" and a BOS, as Gemma's."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*GEMMA_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    backend.train_from_iterator([*WORDS.split(), *(f"▁{word}" for word in WORDS.split()), "\n", ":"] * 8, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


def write_language_model(
    folder: Path, backbone: str, tokenizer: PreTrainedTokenizerFast, *, tied: bool = True, **changes: Any
) -> Any:
    """Write a random causal language model; returns transformers' class in float32 with eager attention."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(
        backbone,
        **BASE
        | BACKBONES.get(backbone, GQA | {"head_dim": 16})
        | {"vocab_size": len(tokenizer), "max_position_embeddings": 1024, "tie_word_embeddings": tied}
        | ids
        | {"pad_token_id": tokenizer.pad_token_id}
        | changes,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    randomize(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def write_nemotron_rerank(folder: Path, temperature: float = 2.0) -> tuple[Any, Any, torch.Tensor]:
    """Write NVIDIA's layout of a Llama that looks both ways; returns the causal model, the tokenizer and the head."""
    tokenizer = byte_level(LLAMA_SPECIAL, bos="<|begin_of_text|>", template=None)
    model = write_language_model(folder, "llama", tokenizer)
    head = torch.randn(1, 32) * 0.3
    tensors = {name: value for name, value in read_tensors(folder).items() if name != "lm_head.weight"}
    save_file(tensors | {"score.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(
        folder / "config.json",
        architectures=["LlamaBidirectionalForSequenceClassification"],
        model_type="llama_bidirec",
        pooling="avg",
        temperature=temperature,
        num_labels=1,
    )
    return model, tokenizer, head


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """The logits of the token after a text, by transformers' class."""
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0, -1]
    return found
