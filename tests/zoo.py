"""Every text model type of transformers, tiny and random: does it export, and are its rewards those of its class?

    python tests/zoo.py docs/backbones.md                # the page's table: every type, which takes hours
    python tests/zoo.py - --types llama,mixtral --precisions fp32,int8

A type that transformers maps to sequence classification is written as such a classifier; any other causal language
model has a value head beside it. Each is exported with its certificate, and texts of 3 to 208 tokens that share
beginnings are then scored alone and together, and by transformers' own class in float32, which takes no part in the
export. Windows and chunks are of 8 tokens, far shorter than the texts.
"""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
import textwrap
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from checkpoints import VOCABULARY, add_tensors, make_tokenizer, randomize
from rewardrt import RewardModel, RewardRTError
from rewardrt.bundle.spec import Spec
from rewardrt.errors import InferenceError
from rewardrt.text.tokens import EncodedText
from rewardrt_export.pipeline import export

MARK, END = "<!-- made by `make zoo` -->", "<!-- end -->"
MOST_PARAMETERS = 5_000_000  # of a tiny model: a type that is larger has sizes that its row here does not name
EXACT = 1e-3  # standard deviations of the reward; the certificate's own bound is 1e-4, on other texts
SECONDS = 600  # for one type

# Types that transformers maps to sequence classification and that read no plain text once from left to right.
NOT_TEXT = {
    "encoder-decoders": "bart bigbird_pegasus mbart mt5 mvp plbart t5 t5gemma t5gemma2 umt5 "
    "blenderbot blenderbot-small marian pegasus prophetnet",
    "for proteins": "esm esmc",
    "for words with positions on a page": "layoutlm layoutlmv2 layoutlmv3 lilt",
    "for page markup": "markuplm",
    "for tables": "tapas",
    "for arbitrary bytes": "perceiver",
    "for images or sound": "modernvbert ultravbert emu3 fuyu git got_ocr2 mllama moshi moss_transcribe_diarize musicgen "
    "musicgen_melody phi4_multimodal trocr whisper",
}
CLASSIFIERS = [
    kind
    for kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    if not any(kind in kinds.split() for kinds in NOT_TEXT.values())
]
CAUSAL_ONLY = [
    kind
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if kind not in CLASSIFIERS and not any(kind in kinds.split() for kinds in NOT_TEXT.values())
]

# What a config's fields are set to where it has them, whatever its type.
SIZES: dict[str, Any] = {
    # widths
    **dict.fromkeys("hidden_size d_model n_embd dim emb_dim embedding_size embed_dim word_embed_proj_dim".split(), 32),
    **dict.fromkeys("dim_model emb_size model_dim shared_intermediate_size".split(), 32),
    **dict.fromkeys("intermediate_size d_ff ffn_dim hidden_dim n_inner block_ff_dim mamba_d_ssm".split(), 64),
    # layers and heads
    **dict.fromkeys("num_hidden_layers num_layers n_layer n_layers".split(), 3),
    **dict.fromkeys("num_attention_heads n_head n_heads num_heads".split(), 4),
    **dict.fromkeys("num_key_value_heads num_kv_heads".split(), 2),
    **dict.fromkeys("head_dim kv_channels v_head_dim qk_nope_head_dim attention_head_size".split(), 8),
    **dict.fromkeys("qk_rope_head_dim rope_head_dim rotary_dim".split(), 4),
    **dict.fromkeys("kv_lora_rank q_lora_rank".split(), 16),
    "query_pre_attn_scalar": 8,
    "max_window_layers": 1,
    # vocabulary and lengths
    **dict.fromkeys("vocab_size vocab_size_per_layer_input".split(), VOCABULARY),
    **dict.fromkeys("max_position_embeddings n_positions n_ctx max_seq_len".split(), 512),
    **dict.fromkeys("sliding_window attention_window local_attention window_size attention_chunk_size".split(), 8),
    "use_sliding_window": True,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "type_vocab_size": 2,
    # experts
    **dict.fromkeys("num_experts num_local_experts n_routed_experts moe_num_experts".split(), 4),
    **dict.fromkeys("num_experts_per_tok moe_topk moe_k".split(), 2),
    **dict.fromkeys("moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size".split(), 16),
    **dict.fromkeys("n_group topk_group first_k_dense_replace decoder_sparse_step n_shared_experts".split(), 1),
    "moe_layer_start_index": 1,
    # layers with state
    **dict.fromkeys("linear_key_head_dim linear_value_head_dim mamba_d_state ssm_state_size state_size".split(), 8),
    **dict.fromkeys("linear_conv_kernel_dim linear_num_value_heads mamba_d_conv mamba_n_heads mamba_num_heads".split(), 4),
    **dict.fromkeys("linear_num_key_heads n_mamba_heads".split(), 2),
    **dict.fromkeys("mamba_d_head mamba_head_dim".split(), 16),
    **dict.fromkeys("mamba_n_groups n_groups mamba_ngroups".split(), 1),
    **dict.fromkeys("mamba_chunk_size chunk_size".split(), 8),
    "mamba_dt_rank": 4, "conv_L_cache": 3,
    # what single types have
    "index_n_heads": 2, "index_head_dim": 8, "index_topk": 1024,
    "hidden_size_per_layer_input": 8, "laurel_rank": 4, "altup_num_inputs": 2, "num_kv_shared_layers": 0,
}  # fmt: skip
_LATENT = {"num_key_value_heads": 4, "head_dim": 4}  # its rotated part; keys and values come out of one small vector
_LATENT_12 = {"num_key_value_heads": 4, "head_dim": 12}
_HYBRID: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],  # which share their weights
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
}
# What else a type needs for its sizes to fit together.
OWN_SIZES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu"), _LATENT),
    **dict.fromkeys(("minicpm3", "mistral4"), _LATENT_12),
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "jamba": {
        "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "mamba_expand": 2,
    },
    "dots3_note_text": _LATENT,
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "longcat_flash": _LATENT | {"num_layers": 2, "ffn_hidden_size": 64, "zero_expert_num": 2},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 16},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "reformer": {
        "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 32], "attn_layers": ["local", "lsh", "local"],
        "num_hidden_layers": 3, "is_decoder": False, "num_hashes": 1, "num_buckets": 4,
    },
    "roc_bert": {"pronunciation_vocab_size": 30, "shape_vocab_size": 30, "pronunciation_embed_dim": 16, "shape_embed_dim": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": _HYBRID,
    "zaya": {"num_experts_per_tok": 1},
    "zamba2": _HYBRID | {"hybrid_layer_ids": [1, 3], "num_mem_blocks": 1, "use_shared_attention_adapter": False, "adapter_rank": 4},
}  # fmt: skip
# Of a model that takes images, its text part, and a small rest.
TEXT_PARTS = {"gemma3": "gemma3_text", "gemma4": "gemma4_text", "llama4": "llama4_text", "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "depth": 1, "num_heads": 2, "out_hidden_size": 32, "num_position_embeddings": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What became of one precision: furthest from transformers' class, in standard deviations of the reward."""

    furthest: float
    rms: float
    same_bits: bool  # alone and together with others that share beginnings


@dataclass(frozen=True)
class Row:
    """One type: exact, refused, wrong or at fault; and why, or how exact."""

    kind: str
    outcome: str
    reason: str = ""
    found: dict[str, Found] = field(default_factory=dict)
    reuses: bool = False  # prefixes are computed once
    seconds: float = 0.0


def tiny_config(kind: str, labels: int | None = 1) -> PretrainedConfig:
    """Return a small config of a type; for a classifier with so many labels."""
    made = CONFIG_MAPPING[kind]
    outputs = {} if labels is None else {"num_labels": labels}
    base = made()
    if kind in TEXT_PARTS:
        seen = {name: size for name, size in VISION.items() if name in base.vision_config.to_dict()}
        return made(text_config=tiny_config(TEXT_PARTS[kind], None).to_dict(), vision_config=seen, **outputs)
    renamed = set(getattr(made, "attribute_map", {}))
    fields = set(base.to_dict()) - renamed
    values = {name: size for name, size in SIZES.items() if name in fields} | OWN_SIZES.get(kind, {})
    layers, kinds = int(values.get("num_hidden_layers", 3)), getattr(base, "layer_types", None)
    # Of some types the kinds follow from other fields, and cannot be set.
    named = getattr(made, "attribute_map", {}).get("layer_types", "layer_types")
    fixed = any(isinstance(getattr(made, name, None), property) for name in (named, "layer_types"))
    if kinds and not values.keys() & {"layer_types", "layers_block_type"} and kind != "jamba" and not fixed:
        each = list(dict.fromkeys(kinds))
        values["layer_types"] = (each * layers)[:layers]
    return made(**values, **outputs)


def texts() -> list[list[int]]:
    """Return token ids of texts of 3 to 208 tokens, of which each shares a beginning with others."""
    rng = np.random.default_rng(0)
    longest = rng.integers(6, VOCABULARY, 208)
    made = []
    for length in (3, 7, 9, 17, 33, 64, 100, 150, 208):
        made.append(longest[:length].tolist())
        other = longest[:length].copy()
        other[length * 2 // 3 :] = rng.integers(6, VOCABULARY, length - length * 2 // 3)
        made.append(other.tolist())
    return made


def encode(ids: list[int], spec: Spec) -> EncodedText:
    """Make a text of token ids, read where the spec reads one without padding."""
    places = np.array([0 if tap.rule == "first" else len(ids) - 1 for tap in spec.taps])
    kinds = np.zeros(len(ids), np.int64) if spec.text.type_ids else None
    return EncodedText(np.array(ids, np.int64), 0, places, kinds)


class Specimen:
    """A tiny random checkpoint of one type in a folder, and transformers' own class of it."""

    def __init__(self, kind: str, folder: Path) -> None:
        """Write it; raises whatever the type's classes raise of such a config."""
        self.kind = kind
        self.folder = folder
        self.classifies = kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        config = tiny_config(kind, 1 if self.classifies else None)
        auto = AutoModelForSequenceClassification if self.classifies else AutoModelForCausalLM
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
        if size > MOST_PARAMETERS:
            raise ValueError(f"{size:,} parameters: its config has sizes of another name")
        torch.manual_seed(0)
        self._model = auto.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
        randomize(self._model)
        self._model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        if not self.classifies:
            self._head = torch.randn(1, config.get_text_config().hidden_size) * 0.3
            bias = torch.zeros(1)
            add_tensors(folder, {"v_head.summary.weight": self._head, "v_head.summary.bias": bias})

    def export(self, target: Path, precisions: tuple[str, ...]) -> Any:
        """Export it, certified."""
        family = {} if self.classifies else {"family": "value-head"}
        return export(self.folder, target, precisions=precisions, max_length=500, **family)  # type: ignore[arg-type]

    def rewards(self, every: list[list[int]]) -> np.ndarray:
        """Return the reward of each text by transformers' class, alone and without padding."""
        found = []
        for ids in every:
            inputs = torch.tensor([ids])
            given = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
            with torch.inference_mode():
                if self.classifies:
                    found.append(float(self._model(**given).logits.flatten()[0]))
                else:
                    inner = self._model.base_model
                    inner = self._model.model if inner is self._model else inner
                    hidden = inner(**given, use_cache=False).last_hidden_state
                    found.append(float(hidden[0, -1] @ self._head[0]))
        return np.array(found)


def compare(bundle: Any, precision: str, expected: np.ndarray) -> Found:
    """Score the texts alone and all together with one graph."""
    model = RewardModel.load(bundle.path, provider="cpu", precision=precision)
    every = [encode(ids, bundle.manifest.spec) for ids in texts()]
    alone = np.array([_value(model.runner.run([text])[0]) for text in every])
    together = np.array([_value(value) for value in model.runner.run(every)])
    away = np.abs(alone - expected) / expected.std()
    return Found(float(away.max()), float(np.sqrt((away**2).mean())), bool((alone == together).all()))


def _value(values: Any) -> float:
    if isinstance(values, InferenceError):
        raise values
    return float(np.asarray(values).reshape(-1)[0])


def sweep(kind: str, precisions: tuple[str, ...], folder: Path) -> Row:
    """Write, export and compare one type."""
    try:
        specimen = Specimen(kind, folder / "checkpoint")
    except Exception as error:
        return Row(kind, "not built", f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
    while True:
        began = time.perf_counter()
        try:
            bundle = specimen.export(folder / "bundle", precisions)
        except RewardRTError as error:
            if len(precisions) > 1:  # one that rounds too much for this type, or what torch cannot do in bfloat16
                named = re.search(r"(?:^|none was written: )(\w+):", str(error))
                failed = named[1] if named and named[1] in precisions[1:] else precisions[-1]
                precisions = tuple(name for name in precisions if name != failed)
                continue
            return Row(kind, "refused", str(error), seconds=time.perf_counter() - began)
        except Exception as error:
            return Row(kind, "fault", f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
        break
    seconds = time.perf_counter() - began
    expected = specimen.rewards(texts())
    found = {name: compare(bundle, name, expected) for name in precisions}
    reuses = bool(RewardModel.load(bundle.path, provider="cpu", precision=precisions[0]).runner.session.past)
    exact = found["fp32"].furthest < EXACT and all(each.same_bits for each in found.values())
    return Row(kind, "exact" if exact else "wrong", "", found, reuses, seconds)


def _apart(kind: str, precisions: tuple[str, ...]) -> Row:
    """Sweep a type in a process of its own: one that hangs or crashes is a row like others."""
    began = time.monotonic()
    receive, send = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(receive)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.alarm(SECONDS)
        with tempfile.TemporaryDirectory() as folder:
            row = sweep(kind, precisions, Path(folder))
        os.write(send, json.dumps(asdict(row)).encode())
        os._exit(0)
    os.close(send)
    data = b""
    while part := os.read(receive, 65536):
        data += part
    os.close(receive)
    while not os.waitpid(process, os.WNOHANG)[0] and time.monotonic() - began < SECONDS + 60:
        time.sleep(0.01)
    if not data:
        return Row(kind, "fault", f"its process ended without a result after {time.monotonic() - began:.0f} s")
    return _read_row(data)


def _read_row(data: bytes | str) -> Row:
    raw = json.loads(data)
    return Row(**raw | {"found": {name: Found(**each) for name, each in raw["found"].items()}})


def _line(row: Row, precisions: tuple[str, ...]) -> str:
    if row.found:
        cells = [f"{row.found['fp32'].furthest:.0e}"]
        others = [row.found.get(name) for name in precisions if name != "fp32"]
        cells += ["" if found is None else f"{found.rms:.0e}" for found in others]
        return f"| {row.kind} | {row.outcome} | {'yes' if row.reuses else 'no'} | {' | '.join(cells)} | |"
    reason = re.sub(r"\s*\|\s*", " ", row.reason.split("; this backbone cannot be exported yet")[0])
    return f"| {row.kind} | {row.outcome} | | {' | ' * (len(precisions) - 1)} | {reason[:240]} |"


def table(rows: dict[str, list[Row]], precisions: tuple[str, ...]) -> str:
    """Return the page's tables, with their counts and the versions that they were made with."""
    names = ("torch", "transformers", "onnxruntime")
    lines = [f"Made with {', '.join(f'{name} {version(name)}' for name in names)}, on a CPU.", ""]
    others = [f"{name}, rms" for name in precisions if name != "fp32"]
    for title, every in rows.items():
        counts = Counter(row.outcome for row in every)
        lines += [f"### {title}: {counts['exact']} of {len(every)} exact", ""]
        lines += [", ".join(f"{number} {outcome}" for outcome, number in counts.most_common()) + ".", ""]
        head = ["type", "outcome", "prefixes reused", "fp32, largest", *others, "reason"]
        lines += [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
        lines += [_line(row, precisions) for row in every] + [""]
    lines += ["Not in the tables, because they give no reward for plain text:", ""]
    for what, kinds in NOT_TEXT.items():
        named = f"{what}: {kinds.replace(' ', ', ')}"
        lines += textwrap.wrap(named, 120, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)


@click.command()
@click.argument("page", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--types", help="Only these, separated by commas.")
@click.option("--precisions", default="fp32,int8,half", show_default=True)
@click.option("--rows", "kept", type=click.Path(path_type=Path), help="A file of rows that were made, to go on from.")
def main(page: Path, types: str | None, precisions: str, kept: Path | None) -> None:
    """Write the table into PAGE, between its two marks; - prints it. Status 1 where one is wrong or at fault."""
    torch.set_num_threads(1)
    chosen = types.split(",") if types else None
    parts = {"Sequence classification": CLASSIFIERS, "Causal language models with a value head": CAUSAL_ONLY}
    names = tuple(precisions.split(","))
    known: dict[str, Row] = {}
    if kept is not None and kept.exists():
        for line in kept.read_text(encoding="utf-8").splitlines():
            row = _read_row(line)
            known[row.kind] = row
    rows: dict[str, list[Row]] = {}
    for title, kinds in parts.items():
        for kind in kinds if chosen is None else [kind for kind in chosen if kind in kinds]:
            row = known.get(kind) or _apart(kind, names)
            if kept is not None and kind not in known:
                kept.parent.mkdir(parents=True, exist_ok=True)
                with kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
            click.echo(f"{kind}: {row.outcome} {row.reason[:150]}", err=True)
            rows.setdefault(title, []).append(row)
    made = table(rows, names)
    if str(page) == "-":
        click.echo(made)
    else:
        before, _, rest = page.read_text(encoding="utf-8").partition(MARK)
        page.write_text(f"{before}{MARK}\n{made}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    if any(row.outcome in ("wrong", "fault") for each in rows.values() for row in each):
        raise SystemExit(1)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
