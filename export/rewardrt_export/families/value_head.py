"""TRL's AutoModelForCausalLMWithValueHead, also used by LLaMA-Factory and GRM: `v_head` on a language model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rewardrt.bundle.spec import Head, Layer, Tap
from rewardrt.errors import CheckpointError
from rewardrt_export.families.draft import Draft, Family
from rewardrt_export.families.sequence_classification import text_rule

if TYPE_CHECKING:
    from rewardrt_export.source.folder import Source

SUMMARY = "v_head.summary"


def _matches(source: Source) -> str | None:
    # Skywork's process reward models have the same head, followed by a sigmoid.
    if source.architecture.endswith("ForPrmModel"):
        return None
    if any(name.startswith(f"{SUMMARY}.") for name in source.stored):
        return f"it has {SUMMARY}"
    if "vhead_layer_type" in source.raw:
        return "config.json has vhead_layer_type"
    return None


def _describe(source: Source) -> Draft:
    from rewardrt_export.source.folder import language_model_head  # brings transformers, which the listing does without

    return Draft(
        heads=(Head(_layers(source)),),
        text=text_rule(source),
        taps=(Tap("last", "last_mask"),),
        backbone_prefix=_backbone_prefix(source),
        unused=language_model_head(source.stored),
        reasons={
            "heads": "ValueHead: one linear layer with a bias, or GRM's linear layers with ReLU between them",
            "text": "the template as it is: LLaMA-Factory and GRM append nothing to it",
            "taps": "attention_mask.sum() - 1",
            "unused": "the value head is beside the language model's own",
        },
    )


def _layers(source: Source) -> tuple[Layer, ...]:
    """Return the head's layers: as stated in config.json, else by the numbers of its tensors (0, 2, 4, ...)."""
    numbers = [int(found[1]) for name in source.stored if (found := re.fullmatch(rf"{SUMMARY}\.(\d+)\.weight", name))]
    kind = source.raw.get("vhead_layer_type", "mlp" if numbers else "linear")
    if kind == "linear":
        return (Layer(f"{SUMMARY}.weight", f"{SUMMARY}.bias"),)
    hidden = source.raw.get("vhead_num_layers", max(numbers, default=2) // 2)
    if not isinstance(hidden, int) or hidden < 1:
        raise CheckpointError(
            f"config.json: vhead_num_layers {hidden!r}; expected the number of hidden layers, 1 or more"
        )
    return tuple(
        Layer(f"{SUMMARY}.{2 * n}.weight", f"{SUMMARY}.{2 * n}.bias", "relu" if n < hidden else "none")
        for n in range(hidden + 1)
    )


def _backbone_prefix(source: Source) -> str:
    """Return the prefix of the backbone's names in a state dict of the whole wrapper, such as a ZeRO-3 save."""
    from rewardrt_export.source.folder import language_model_head

    wrapped = {".".join(name.split(".")[:2]) for name in source.stored if name.startswith("pretrained_model.")}
    wrapped -= {".".join(name.split(".")[:2]) for name in language_model_head(source.stored)}
    return f"{wrapped.pop()}." if len(wrapped) == 1 else ""


VALUE_HEAD = Family(
    name="value-head",
    title="value head on a causal language model (TRL, LLaMA-Factory, GRM)",
    examples=("LLaMA-Factory stage: rm", "TRL AutoModelForCausalLMWithValueHead", "Ray2333/GRM-Llama3-8B-sftreg"),
    head="v_head.summary: linear with bias, or GRM's MLP; in the model's file or in value_head.safetensors / .bin",
    tap="last token; --pooling last_not_id for old LLaMA-Factory, which did not use the attention mask",
    eos="the template's own; without a template EOS is appended if missing",
    output="raw",
    maths="r = w . h[last] + b, or W2 relu(W1 h[last] + b1) + b2",
    matches=_matches,
    describe=_describe,
)
