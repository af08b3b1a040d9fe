"""A tiny checkpoint of every backbone and every family, for what has to hold of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import checkpoints_gated as gated
import checkpoints_process as process
import checkpoints_token_logits as logits
import checkpoints_value_head as value_head
from checkpoints import BACKBONES, CHATML, make_tokenizer, write_openrlhf, write_sequence_classification
from checkpoints_encoders import ENCODERS, write_encoder
from checkpoints_linear import (
    internlm2_tokenizer,
    tokenizer_ending_with,
    tokenizer_starting_with,
    write_internlm2,
    write_linear,
)
from checkpoints_pairwise import write_general_preference, write_pair_preference, write_pairrm
from rewardrt_export.token_options import TokenOptions


@dataclass(frozen=True)
class Case:
    """What writes a checkpoint into a folder, and the options of its export; `base` is a folder beside it."""

    write: Callable[[Path], Any]
    options: dict[str, Any] = field(default_factory=dict)
    has_base: bool = False

    def export_options(self, folder: Path) -> dict[str, Any]:
        return self.options | ({"base": folder.parent / "base"} if self.has_base else {})


def decoder(name: str) -> Case:
    # A granite's own scale of the logits is none of a head's: OpenRLHF's class has it not.
    write = write_openrlhf if name == "granite" else write_sequence_classification
    changes = HEADS_OF_16 | ({"word_embed_proj_dim": 64} if name == "opt" else {})
    return Case(lambda folder: write(folder, name, **changes))


def encoder(name: str) -> Case:
    changes = HEADS_OF_16 | ({"pooler_hidden_size": 64} if name == "deberta-v2" else {})
    return Case(lambda folder: write_encoder(folder, name, **changes))


def linear_head(backbone: str, head: str, prefix: str, tokenizer: Any, config: dict[str, Any], **more: Any) -> Case:
    def write(folder: Path) -> None:
        write_linear(folder, backbone, head, prefix=prefix, config=config, tokenizer=tokenizer(), **more)

    return Case(write, has_base=bool(more.get("raw")))


def marked() -> Any:
    tokenizer = tokenizer_starting_with("<s>", template="{{ bos_token }}" + CHATML)
    tokenizer.add_special_tokens({"cls_token": "<|cls|>"})
    return tokenizer


def pythia() -> Any:
    tokenizer = tokenizer_ending_with("<|endoftext|>", template=None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|prompter|>", "<|assistant|>"]})
    return tokenizer


def beaver(kind: str, **config: Any) -> Case:
    config = {"architectures": ["LlamaForScore"], "score_dim": 1, "do_normalize": False, "score_type": kind} | config
    return linear_head("llama", "score_head", "model.", lambda: tokenizer_starting_with("<s>"), config)


def with_head(tensors: Callable[[], dict[str, torch.Tensor]], architecture: str, **more: Any) -> Case:
    marks = more.pop("marks", None)

    def write(folder: Path) -> None:
        tokenizer = gated.make_marked_tokenizer(*marks) if marks is not None else None
        gated.write_with_head(folder, tensors(), architecture=architecture, tokenizer=tokenizer, **more)

    return Case(write)


# Of the backbones: as in real models, attention has a kernel then. Those of the families have heads of 8, and no kernel.
HEADS_OF_16: dict[str, Any] = {"hidden_size": 64}
LLAMA3 = (gated.LLAMA3, gated.LLAMA3_MARKS)
GATING = {"num_objectives": 19, "gating_temperature": 10, "gating_hidden_dim": 48, "gating_n_hidden": 3}
QUANTILES = {"num_objectives": 5, "num_quantiles": 4, "gating_temperature": 1.5}
LABELS = {"id2label": {str(index): f"LABEL_{index}" for index in range(10)}}

EVERY_BACKBONE: dict[str, Case] = {
    **{name: decoder(name) for name in BACKBONES if name != "gpt2"},
    "gpt2": Case(lambda folder: value_head.write_value_head(folder, "gpt2", sizes=(64,), **HEADS_OF_16)),
    "internlm2": Case(
        lambda folder: write_internlm2(
            folder, reward_id=305, tokenizer=internlm2_tokenizer(knows_reward_token=False), bias=True
        )
    ),
    **{name: encoder(name) for name in ENCODERS},
}


def qwen() -> Any:
    return logits.byte_level(logits.QWEN_SPECIAL, bos=None, template=logits.QWEN_TEMPLATE)


def guard() -> Any:
    return logits.byte_level(logits.LLAMA_SPECIAL, bos="<|begin_of_text|>", template=logits.GUARD_TEMPLATE)


def language_model(family: str, backbone: str, tokenizer: Callable[[], Any], **options: Any) -> Case:
    """A language model whose reward is of its tokens' logits; `options` are those of `TokenOptions`."""
    given = {"family": family} | ({"token_options": TokenOptions(**options)} if options else {})
    return Case(lambda folder: logits.write_language_model(folder, backbone, tokenizer()), given)


EVERY_FAMILY: dict[str, Case] = {
    "openrlhf": Case(write_openrlhf),
    "sequence-classification": Case(write_sequence_classification),
    "value-head": Case(lambda folder: value_head.write_value_head(folder, "gpt_neox", sizes=(32, 48, 48))),
    "eurus": linear_head(
        "mistral",
        "regression_head",
        "model.",
        lambda: tokenizer_starting_with("<s>", template=None),
        {"architectures": ["EurusRewardModel"]},
    ),
    "starling": linear_head(
        "llama", "v_head", "transformer.", lambda: tokenizer_starting_with("<s>", pad="<unk>"), {}, raw=True
    ),
    "internlm2-reward": EVERY_BACKBONE["internlm2"],
    "athene": linear_head(
        "llama", "v_head", "model.", marked, {"architectures": ["AtheneForSequenceClassification"]}, vocab_size=304
    ),
    "beaver": beaver("reward"),
    "beaver-cost": beaver("cost", mean=[0.75], var=[6.25]),
    "openassistant-pythia": linear_head(
        "gpt_neox",
        "out_proj",
        "gpt_neox.",
        pythia,
        {"architectures": ["GPTNeoXRewardModel"], "model_type": "gpt_neox_reward_model", "pooling": "mean"},
        bias=True,
        vocab_size=304,
    ),
    "deepspeed-chat": linear_head(
        "opt",
        "v_head",
        "rwtransformer.",
        lambda: tokenizer_starting_with("</s>"),
        {"architectures": ["OPTForCausalLM"], "vocab_size": 300},
        raw=True,
        vocab_size=304,
    ),
    "trlx": linear_head(
        "gpt2",
        "v_head",
        "transformer.",
        lambda: tokenizer_ending_with("<|endoftext|>"),
        {"architectures": ["GPT2LMHeadModel"]},
        raw=True,
        vocab_size=304,
    ),
    "odin": Case(lambda folder: write_sequence_classification(folder, "gemma2", labels=2), {"family": "odin"}),
    "mlp-head": with_head(gated.mlp_head, "Qwen2ForRewardModel", backbone="qwen2"),
    "armorm": with_head(gated.armorm_head, "LlamaForRewardModelWithGating", config=GATING, marks=LLAMA3),
    "qrm": with_head(
        lambda: gated.qrm_head(5, 4, dropout=True, matrix=False),
        "Gemma2ForQuantileSequenceClassification",
        backbone="gemma2",
        config=QUANTILES,
        marks=(gated.GEMMA, gated.GEMMA_MARKS),
    ),
    "ldl": Case(gated.write_ldl),
    "urm": with_head(
        lambda: gated.linear("score", 10, gated.HIDDEN, bias=False),
        "LlamaForSequenceClassificationWithNormal",
        config=LABELS,
    ),
    "encoder": Case(lambda folder: write_encoder(folder, "bert")),
    "qwen-prm": Case(process.write_qwen_prm),
    "trl-prm": Case(process.write_trl_prm),
    "math-shepherd": Case(
        lambda folder: process.write_language_model(folder, "mistral", process.make_metaspace_tokenizer()),
        {"family": "math-shepherd"},
    ),
    "rlhflow-prm": Case(
        lambda folder: process.write_language_model(folder, "llama", make_tokenizer()), {"family": "rlhflow-prm"}
    ),
    "skywork-prm": Case(process.write_skywork_prm),
    "pairrm": Case(lambda folder: write_pairrm(folder, tasks=2)),
    "pair-preference": Case(
        lambda folder: write_pair_preference(
            folder, tokenizer=make_tokenizer(adds_bos=True, template="{{ bos_token }}" + CHATML)
        ),
        {"family": "pair-preference"},
    ),
    "general-preference": Case(
        lambda folder: write_general_preference(
            folder, tokenizer=make_tokenizer(adds_bos=True, template="{{ bos_token }}" + CHATML)
        )
    ),
    "nemotron-lm-row": Case(
        lambda folder: gated.write_language_model(folder, tied=False), {"family": "nemotron-lm-row"}
    ),
    "token-logit": language_model("token-logit", "gemma2", qwen, tokens="1..5"),
    "qwen3-reranker": language_model("qwen3-reranker", "qwen3", qwen),
    "mxbai-rerank-v2": language_model("mxbai-rerank-v2", "qwen2", qwen),
    "bge-reranker-gemma": language_model("bge-reranker-gemma", "gemma", lambda: logits.sentence_piece(None)),
    "zerank-1": language_model("zerank-1", "qwen3", qwen),
    "zerank-2": language_model("zerank-2", "qwen3", qwen),
    "nemotron-rerank": Case(logits.write_nemotron_rerank),
    "shieldgemma": language_model(
        "shieldgemma", "gemma2", lambda: logits.sentence_piece(logits.SHIELD_TEMPLATE), instruction="Be kind."
    ),
    "llama-guard": language_model("llama-guard", "llama", guard),
    "qwen3guard-gen": language_model("qwen3guard-gen", "qwen3", qwen),
    "granite-guardian": language_model("granite-guardian", "granite", qwen),
    "wildguard": language_model("wildguard", "mistral", qwen, template="{prompt}\n{response}\n"),
}
