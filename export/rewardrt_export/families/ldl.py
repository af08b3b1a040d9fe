"""LDL-Reward: a distribution over scores for each objective, and a gate, in files next to the model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rewardrt.bundle.spec import Combine, Head, Layer, Output
from rewardrt.errors import CheckpointError
from rewardrt_export.families.draft import Draft, Family
from rewardrt_export.families.objectives import label_names
from rewardrt_export.families.sequence_classification import pad_tap, text_rule

if TYPE_CHECKING:
    from rewardrt_export.source.folder import Source

SCORES = 10  # scores of each distribution, evenly spaced from 0 to 1; a constant in the class's code


def _matches(source: Source) -> str | None:
    files = [name for name in ("regression_layer.pt", "gating_layer.pt") if (source.folder / name).is_file()]
    if files:
        return f"it has {' and '.join(files)} beside the model"
    return f"its architecture is {source.architecture}" if source.architecture.startswith("LDLRewardModel") else None


def _layers(source: Source, file: str) -> tuple[Layer, ...]:
    """Return the linear layers of one file; leaky ReLUs are between them, and dropouts in the gate."""
    pattern = re.compile(rf"({file}\.(?:network\.)?(?:(\d+)\.)?)weight")
    found = sorted((int(match[2] or 0), match[1]) for name in source.stored if (match := pattern.fullmatch(name)))
    if not found:
        raise CheckpointError(f"no reward head: {source.folder} has no {file}.pt with layers; copy it beside the model")
    last = found[-1]
    return tuple(
        Layer(
            f"{name}weight",
            f"{name}bias" if f"{name}bias" in source.stored else None,
            "none" if (number, name) == last else "leaky_relu",
        )
        for number, name in found
    )


def _describe(source: Source) -> Draft:
    values, gate = _layers(source, "regression_layer"), _layers(source, "gating_layer")
    count = source.stored[gate[-1].weight].shape[0]
    softmax, temperature = source.raw.get("softmax", False), source.raw.get("temperature", 1.0)
    if not isinstance(softmax, bool) or not isinstance(temperature, (int, float)) or not temperature > 0:
        raise CheckpointError(
            f"config.json: softmax {softmax!r}, temperature {temperature!r}; expected true or false, a positive number"
        )
    return Draft(
        heads=(Head(values, ("last",), "expectation", SCORES, 0.0, 1.0), Head(gate, ("last",))),
        text=text_rule(source),
        taps=(pad_tap(source, "before_first_id"),),
        combine=Combine("gate", softmax=softmax, temperature=float(temperature)),
        output=Output(labels=label_names(source.raw, count)),
        reasons={
            "heads": "regression_layer.pt and gating_layer.pt",
            "taps": "the class is a copy of transformers' before its pull request 35911",
            "combine": "config.json's softmax (default false) says whether the gate's weights go through one",
        },
    )


LDL = Family(
    name="ldl",
    title="LDL-Reward: expected scores weighted by a gate",
    examples=("ShikaiChen/LDL-Reward-Gemma-2-27B-v0.1",),
    head="regression_layer.pt and gating_layer.pt: MLPs with leaky ReLUs; 22 objectives of 10 scores",
    tap="the token before the first pad id, for both",
    eos="the template's own; without a template EOS is appended if missing",
    output="raw expectation; objectives are numbered unless id2label names them",
    maths="r = sum(g * E), E = sum(softmax(MLP(h)) * linspace(0, 1, 10)), g = MLP'(h), or its softmax",
    matches=_matches,
    describe=_describe,
)
