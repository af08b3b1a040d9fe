"""ArmoRM and QRM: several objectives, weighted by a gate that reads the end of the prompt."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from rewardrt.bundle.spec import Combine, Head, Layer, Output, Tap, TextRule
from rewardrt.errors import CheckpointError
from rewardrt_export.families import objectives
from rewardrt_export.families.draft import Draft, Family
from rewardrt_export.families.sequence_classification import pad_tap

if TYPE_CHECKING:
    from rewardrt_export.source.folder import Source

REGRESSION = "regression_layer.weight"
GATE = re.compile(r"gating\.layers\.(\d+)\.(weight|running_mean)")
# The text between prompt and answer, by model_type, and its ids in the published checkpoints.
HEADERS = {
    "llama": ("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", (128009, 128006, 78191, 128007, 271)),
    "gemma2": ("<end_of_turn>\n<start_of_turn>model\n", (107, 108, 106, 2516, 108)),
}


def _is_gated(source: Source) -> bool:
    return "ForRewardModelWithGating" in source.architecture or (
        REGRESSION in source.stored and any(GATE.fullmatch(name) for name in source.stored)
    )


def _has_quantiles(source: Source) -> bool:
    if "num_quantiles" in source.raw:
        return True
    rows, gates = source.stored.get(REGRESSION), _gate_layers(source)
    return rows is not None and bool(gates) and rows.shape[0] > source.stored[gates[-1].weight].shape[0]


def _matches_armorm(source: Source) -> str | None:
    return f"it has {REGRESSION} and a gating network" if _is_gated(source) and not _has_quantiles(source) else None


def _matches_qrm(source: Source) -> str | None:
    return (
        f"it has {REGRESSION} with several quantiles for each objective, and a gating network"
        if _is_gated(source) and _has_quantiles(source)
        else None
    )


def _gate_layers(source: Source) -> tuple[Layer, ...]:
    """Return the linear layers of the gating network, an MLP with batch norms (QRM) or without, read off its tensors.

    ReLUs and dropouts have no tensors, so the layers' numbers have gaps.
    """
    found = sorted((int(match[1]), match[2]) for name in source.stored if (match := GATE.fullmatch(name)))
    norms = {number for number, kind in found if kind == "running_mean"}
    linear = [number for number, kind in found if kind == "weight" and number not in norms]
    layers = []
    for number in linear:
        name = f"gating.layers.{number}"
        following = linear[linear.index(number) + 1] if number != linear[-1] else number + 1
        norm = next((f"gating.layers.{other}" for other in range(number + 1, following) if other in norms), None)
        bias = f"{name}.bias" if norm is None else None  # a batch norm has its own
        layers.append(Layer(f"{name}.weight", bias, "none" if number == linear[-1] else "relu", batch_norm=norm))
    return tuple(layers)


def _header(source: Source) -> tuple[int, ...]:
    """Return the ids between prompt and answer: from config.json, else from this tokenizer, else the published ones."""
    stated = source.raw.get("gating_token_pattern")
    if isinstance(stated, list) and stated and all(isinstance(number, int) for number in stated):
        return tuple(stated)
    kind = source.config.model_type
    if kind not in HEADERS:
        raise CheckpointError(
            f"the gate reads before the answer's header, which is known for {', '.join(HEADERS)} and not for {kind}; "
            "state its ids as gating_token_pattern in config.json"
        )
    text, ids = HEADERS[kind]
    tokenizer: Any = source.tokenizer
    marks = re.findall(r"<[^>]+>", text)
    if all(tokenizer.convert_tokens_to_ids(mark) not in (None, tokenizer.unk_token_id) for mark in marks):
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    if max(ids) < source.config.vocab_size:
        return ids
    raise CheckpointError(
        f"the tokenizer has not all of {', '.join(marks)}, before which the gate reads; it is not this "
        "checkpoint's, or config.json lacks gating_token_pattern"
    )


def _temperature(source: Source) -> float:
    stated = source.raw.get("gating_temperature")
    if isinstance(stated, (int, float)) and stated > 0:
        return float(stated)
    if stated is None and source.config.model_type == "llama":
        return 10.0
    raise CheckpointError(f"config.json: gating_temperature {stated!r}; expected a positive number")


def _describe(source: Source) -> Draft:
    layers = _gate_layers(source)
    if not layers:
        raise CheckpointError("no gate: the checkpoint has no gating.layers.*.weight; it was lost or never trained")
    hidden = len(layers) - 1
    stated = source.raw.get("gating_n_hidden", hidden)
    if hidden != stated:
        raise CheckpointError(f"gating.layers: {hidden} hidden layers; config.json's gating_n_hidden is {stated}")
    if source.chat_template is None:
        raise CheckpointError("no chat template: the gate reads where the answer begins, which only a template marks")
    count = source.stored[layers[-1].weight].shape[0]
    regression = Layer(REGRESSION)
    quantiles = 1
    if _has_quantiles(source):
        found = source.stored[REGRESSION].shape[0] if REGRESSION in source.stored else 0
        quantiles = source.raw.get("num_quantiles") or found // count
        if found and found != quantiles * count:
            raise CheckpointError(
                f"{REGRESSION}: {found} outputs; expected {quantiles} quantiles of {count} objectives, "
                f"{quantiles * count}, as config.json and the gate say"
            )
    matrix = "reward_transform_matrix"
    return Draft(
        heads=(
            Head((regression,), ("last",), "mean" if quantiles > 1 else "none", quantiles),
            Head(layers, ("gate",)),
        ),
        text=TextRule(source="chat_template"),
        taps=(pad_tap(source, "before_first_id"), Tap("gate", "pattern_start", _header(source))),
        combine=Combine(
            "gate",
            temperature=_temperature(source),
            matrix=matrix if matrix in source.stored else None,
            scale_tensor="gating.logit_scale",
        ),
        output=Output(
            labels=objectives.label_names(
                source.raw, count, objectives.ARMORM if count == len(objectives.ARMORM) else objectives.HELPSTEER
            )
        ),
        reasons={
            "heads": f"regression_layer has {count} objectives of {quantiles} quantiles; the gate is an MLP",
            "text": "the chat template as it is",
            "taps": "the class is a copy of transformers' before its pull request 35911; the gate reads where the last "
            "assistant header begins",
            "combine": "temperature from config.json, scale and matrix from the checkpoint",
        },
    )


ARMORM = Family(
    name="armorm",
    title="ArmoRM: objectives weighted by a gate",
    examples=("RLHFlow/ArmoRM-Llama3-8B-v0.1",),
    head="`regression_layer` (objectives) and `gating.layers` (MLP), `gating.logit_scale`, `reward_transform_matrix`",
    tap="objectives: the token before the first pad id; gate: the end-of-turn token before the last assistant header",
    eos="the template's own",
    output="raw; the objectives by name",
    maths="r = sum(softmax(MLP(h[prompt end]) / T) * scale * ((W h[before pad]) M))",
    matches=_matches_armorm,
    describe=_describe,
)

QRM = Family(
    name="qrm",
    title="QRM: quantiles of objectives weighted by a gate",
    examples=("nicolinho/QRM-Llama3.1-8B-v2", "nicolinho/QRM-Gemma-2-27B"),
    head="`regression_layer` (objectives x quantiles) and `gating.layers` (MLP with batch norms), `gating.logit_scale`",
    tap="objectives: the token before the first pad id; gate: the end-of-turn token before the last assistant header",
    eos="the template's own",
    output="raw expectation; the objectives by name",
    maths="r = sum(softmax(MLP(h[prompt end]) / T) * scale * (mean over quantiles of (W h[before pad]) M))",
    matches=_matches_qrm,
    describe=_describe,
)
