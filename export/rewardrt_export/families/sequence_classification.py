"""transformers' *ForSequenceClassification on a decoder: `score`, read at the last token that is not padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rewardrt.bundle.spec import Combine, Head, Layer, Output, PoolingRule, Tap, TextRule
from rewardrt.errors import CheckpointError
from rewardrt_export.families.draft import Draft, Family
from rewardrt_export.families.encoder import ENCODERS, NO_GRAPH, modernbert_dense
from rewardrt_export.families.objectives import label_names
from rewardrt_export.families.openrlhf import is_its_own
from rewardrt_export.source.directions import is_two_way

if TYPE_CHECKING:
    from rewardrt_export.source.folder import Source

# The heads of decoders whose class does not call its head `score`, by model_type.
HEADS: dict[str, Callable[[Any], tuple[Layer, ...]]] = {
    "ctrl": lambda config: (Layer("classifier.weight"),),
    "modernbert-decoder": lambda config: (
        modernbert_dense(config),
        Layer("classifier.weight", "classifier.bias" if config.classifier_bias else None),
    ),
}
# Heads of Athene, Starling, INF-ORM and others, whose own classes have the same suffix but another head.
OTHER_HEADS = ("v_head.weight", "score.0.weight")


def _matches(source: Source) -> str | None:
    kind = source.config.model_type
    # Decoders' classes call the head score, encoders' call it classifier.
    is_encoder = kind in ENCODERS | NO_GRAPH or any(name.startswith("classifier.") for name in source.stored)
    is_encoder = is_encoder and kind not in HEADS
    two_way = is_two_way(source.config)  # a decoder's class that reads as an encoder
    other = is_encoder or two_way or source.stored.keys() & set(OTHER_HEADS)
    if other:
        return None
    if source.architecture.endswith("ForSequenceClassification"):
        return f"its architecture is {source.architecture}"
    # The base's config.json next to trained weights. OpenRLHF uses the name score.weight too.
    if "score.weight" in source.stored and source.says_base_model and not is_its_own(source):
        return f"it has score.weight, the name of its head, and config.json says {source.architecture}"
    return None


def _describe(source: Source) -> Draft:
    labels = _stated_labels(source.raw)
    found = source.stored["score.weight"].shape[0] if "score.weight" in source.stored else None
    if found is not None and labels not in (None, found):
        raise CheckpointError(
            f"config.json states {labels} labels, but score.weight has {found} output{'s' if found != 1 else ''}; "
            "correct id2label or num_labels"
        )
    bias = "score.bias" if "score.bias" in source.stored else None
    own = HEADS.get(source.config.model_type, lambda config: (Layer("score.weight", bias),))
    tap = pad_tap(source)
    return Draft(
        heads=(Head(own(source.config)),),
        text=text_rule(source),
        taps=(tap,),
        output=Output(labels=label_names(source.raw, found) if found is not None and found > 1 else ()),
        reasons={
            "heads": "transformers' name for the head of this architecture",
            "text": "TRL's RewardTrainer: a template brings its own special tokens, so that BOS is not doubled",
            "taps": f"transformers reads {tap.rule}, pad id {source.pad_id}",
        },
    )


def _stated_labels(config: dict[str, Any]) -> int | None:
    """Return config.json's number of labels, which is often only stated as the length of id2label."""
    if isinstance(config.get("id2label"), dict):
        return len(config["id2label"])
    number = config.get("num_labels")
    return number if isinstance(number, int) else None


def pad_tap(source: Source, rule: PoolingRule = "last_not_id") -> Tap:
    """Return the tap where transformers reads; without a pad id that is the last token.

    Code copied from transformers before its pull request 35911 reads at `before_first_id` instead.
    """
    pad = source.pad_id
    return Tap("last", "last_mask") if pad is None else Tap("last", rule, (pad,))


def text_rule(source: Source) -> TextRule:
    """Return TRL's text rule: the chat template, or without one prompt + response with special tokens and EOS."""
    if source.chat_template is not None:
        return TextRule(source="chat_template")
    eos = source.tokenizer.eos_token
    return TextRule(source="concatenate", append_if_missing=str(eos) if eos else "", add_special_tokens=True)


SEQUENCE_CLASSIFICATION = Family(
    name="sequence-classification",
    title="transformers *ForSequenceClassification",
    examples=(
        "Skywork/Skywork-Reward-V2-Llama-3.1-8B",
        "sfairXC/FsfairX-LLaMA3-RM-v0.1",
        "Ray2333/GRM-Llama3-8B-rewardmodel-ft",
    ),
    head="linear `score`, with or without bias; several outputs need --weights",
    tap="last token that is not the pad id; --pooling before_first_id for transformers before its pull request 35911",
    eos="the template's own; without a template EOS is appended if missing",
    output="raw logit, or the weighted sum of several",
    maths="r = sum(weights * (W h[last not pad] + b))",
    matches=_matches,
    describe=_describe,
)


def _describe_odin(source: Source) -> Draft:
    return dataclasses.replace(
        _describe(source),
        combine=Combine("dot", (0.0, 1.0)),
        output=Output(labels=("length", "quality")),
    )


ODIN = Family(
    name="odin",
    title="ODIN: a head for length and one for quality",
    examples=("Lichang-Chen/gemma_9b_odin_v2",),
    head="linear `score` with two outputs; the second is the reward. Only with --family: no file identifies it",
    tap="last token that is not the pad id",
    eos="the template's own; without a template EOS is appended if missing",
    output="raw logit of index 1; objectives length and quality",
    maths="r = (W h[last not pad])[1]",
    matches=lambda source: None,
    describe=_describe_odin,
)
