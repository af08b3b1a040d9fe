"""A head of two linear layers with a ReLU between them: Qwen2.5-Math-RM, INF-ORM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rewardrt.bundle.spec import Head, Layer, Output
from rewardrt_export.families.draft import Draft, Family
from rewardrt_export.families.objectives import label_names
from rewardrt_export.families.sequence_classification import pad_tap, text_rule

if TYPE_CHECKING:
    from rewardrt_export.source.folder import Source

ARCHITECTURES = ("Qwen2ForRewardModel", "INFORMForSequenceClassification")


def _matches(source: Source) -> str | None:
    if source.architecture in ARCHITECTURES:
        return f"its architecture is {source.architecture}"
    # Process reward models have the same two layers, and are ForProcessRewardModel or ForTokenClassification.
    ends = source.architecture.endswith(("ForRewardModel", "ForSequenceClassification"))
    if ends and {"score.0.weight", "score.2.weight"} <= source.stored.keys():
        return f"its architecture is {source.architecture}, and it has score.0.weight and score.2.weight"
    return None


def _describe(source: Source) -> Draft:
    last = source.stored.get("score.2.weight")
    outputs = last.shape[0] if last is not None else 1
    return Draft(
        heads=(Head((Layer("score.0.weight", "score.0.bias", "relu"), Layer("score.2.weight", "score.2.bias"))),),
        text=text_rule(source),
        taps=(pad_tap(source, "before_first_id"),),
        output=Output(labels=label_names(source.raw, outputs) if outputs > 1 else ()),
        reasons={
            "heads": "the class builds score as Linear, ReLU, Linear",
            "text": "the chat template brings its own special tokens",
            "taps": "the class is a copy of transformers' before its pull request 35911",
        },
    )


MLP_HEAD = Family(
    name="mlp-head",
    title="Two-layer head",
    examples=("Qwen/Qwen2.5-Math-RM-72B", "infly/INF-ORM-Llama3.1-70B"),
    head="`score.0`, ReLU, `score.2`, both with bias",
    tap="the token before the first pad id, which is the last token unless the text contains a pad id",
    eos="the template's own; without a template EOS is appended if missing",
    output="raw",
    maths="r = W2 relu(W0 h[before pad] + b0) + b2",
    matches=_matches,
    describe=_describe,
)
