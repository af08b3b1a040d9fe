"""OpenRLHF: a class made at run time from the base model's class and one linear layer without bias."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rewardrt.bundle.spec import Affine, Head, Layer, Tap, TextRule
from rewardrt.errors import CheckpointError
from rewardrt_export.families.draft import Draft, Family

if TYPE_CHECKING:
    from rewardrt_export.source.folder import Source


# The names of the class that OpenRLHF makes at run time, in current and earlier versions.
ARCHITECTURES = ("RewardModel", "LLMForSequenceRegression")


def is_its_own(source: Source) -> bool:
    """Whether config.json shows that OpenRLHF wrote it."""
    return "value_head_prefix" in source.raw or source.architecture in ARCHITECTURES


def _matches(source: Source) -> str | None:
    if "prompt_head.weight" in source.stored:
        return None
    if source.architecture == "CriticModel":
        return None  # it scores the tokens of a policy in training, not texts
    if "value_head_prefix" in source.raw:
        return "config.json has value_head_prefix"
    if source.architecture in ARCHITECTURES:
        return f"its architecture is {source.architecture}"
    if _has_plain_head(source, "value_head"):
        return "it has value_head.weight with one output"
    if _has_plain_head(source, "score") and source.says_base_model:
        return f"it has score.weight with one output, and config.json says {source.architecture}"
    return None


def _has_plain_head(source: Source, name: str) -> bool:
    head = source.stored.get(f"{name}.weight")
    return head is not None and head.shape[:1] == (1,) and f"{name}.bias" not in source.stored


def _describe(source: Source) -> Draft:
    head = _head_name(source)
    return Draft(
        heads=(Head((Layer(f"{head}.weight"),)),),
        text=training_text(source),
        taps=(Tap("last", "last_mask"),),
        normalise=_normalise(source.raw),
        reasons={
            "heads": f"value_head_prefix is {source.raw.get('value_head_prefix')!r} in config.json; the head is {head}",
            "text": "RewardDataset: the EOS is appended as text, and forced as the last id after the cut",
            "taps": "RewardModel.forward reads the last position whose attention mask is 1",
            "normalise": "config.json's mean and std; used only when asked for, as in OpenRLHF",
        },
    )


def _head_name(source: Source) -> str:
    prefix = source.raw.get("value_head_prefix")
    if prefix is not None:
        return str(prefix)
    return "score" if "score.weight" in source.stored or "value_head.weight" not in source.stored else "value_head"


def training_text(source: Source) -> TextRule:
    """Return the rule of OpenRLHF's RewardDataset: template, rstrip, " " + EOS, cut, last id forced to EOS."""
    eos, eos_id = source.tokenizer.eos_token, source.tokenizer.eos_token_id
    if eos is None or eos_id is None:
        raise CheckpointError("the tokenizer has no eos_token; OpenRLHF trains every text to end with one")
    return TextRule(
        source="chat_template" if source.chat_template is not None else "concatenate",
        strip_tail="\n",
        append_if_missing=str(eos),
        append_prefix=" ",
        add_special_tokens=False,
        overwrite_last=int(eos_id),
    )


def _normalise(config: dict[str, Any]) -> Affine | None:
    mean, std = config.get("mean"), config.get("std")
    if mean is None and std is None:
        return None
    numbers = [value[0] if isinstance(value, list) and len(value) == 1 else value for value in (mean, std)]
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in numbers):
        raise CheckpointError(f"config.json: mean {mean!r} and std {std!r} are not two numbers")
    affine = Affine(*map(float, numbers))  # type: ignore[arg-type]
    if not affine.std > 0 or affine.std == float("inf") or affine.mean != affine.mean:
        raise CheckpointError(f"config.json: mean {mean!r}, std {std!r}: expected a finite mean and a positive std")
    return affine


OPENRLHF = Family(
    name="openrlhf",
    title="OpenRLHF reward model",
    examples=("OpenRLHF/Llama-3-8b-rm-mixture", "OpenRLHF/Llama-3-8b-rm-700k"),
    head="linear without bias, named by config.json's value_head_prefix, otherwise score or value_head",
    tap="last token",
    eos='" " + EOS is appended if missing; after the cut the last id becomes EOS',
    output="raw; (r - mean) / std on request",
    maths="r = w . h[last]",
    matches=_matches,
    describe=_describe,
)
