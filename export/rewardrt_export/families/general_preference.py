"""The general preference model: a vector for each answer, compared by a skew product weighted by the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rewardrt.bundle.spec import Combine, Head, Layer, Tap, TextRule
from rewardrt.errors import CheckpointError
from rewardrt_export.families.draft import Draft, Family
from rewardrt_export.families.openrlhf import is_its_own

if TYPE_CHECKING:
    from rewardrt_export.source.folder import Source

VALUES, GATE = "value_head.weight", "prompt_head.weight"


def _matches(source: Source) -> str | None:
    if GATE in source.stored:
        return f"it has {GATE}"
    if VALUES not in source.stored or (source.stored[VALUES].shape[:1] == (1,) and is_its_own(source)):
        return None  # OpenRLHF's head may have this name too; its config.json shows that it is OpenRLHF's
    outputs = source.stored[VALUES].shape[:1]
    return f"it has {VALUES} with {'one output' if outputs == (1,) else 'several outputs'}"


def _describe(source: Source) -> Draft:
    gated = GATE in source.stored
    if not gated and VALUES in source.stored and source.stored[VALUES].shape[:1] == (1,):
        raise CheckpointError(
            f"{VALUES}: one output, which compares nothing: a Bradley-Terry model of this trainer is described with "
            "--spec (its text has the tokenizer's special tokens), one of OpenRLHF's exported with --family openrlhf"
        )
    end, values = Tap("last"), Head((Layer(VALUES),))
    return Draft(
        input="pairwise",
        heads=(values, Head((Layer(GATE),), taps=("prompt",))) if gated else (values,),
        text=_training_text(source),
        taps=(end, Tap("prompt", "prompt_end")) if gated else (end,),
        combine=Combine("skew", unit=True),
        unused={"lm_head.weight": "the language model that the class is made of; its reward never reads it"},
        reasons={
            "heads": f"value_head gives the vector; {'prompt_head weighs its pairs' if gated else 'no prompt_head'}",
            "text": "GeneralRewardDataset: the template, the tokenizer's special tokens, the last id forced to EOS",
            "combine": "the published models divide each vector by its length",
        },
    )


def _training_text(source: Source) -> TextRule:
    """Return the training text's rule.

    The text that the chat template gives is tokenized like any other: if both template and tokenizer add a BOS, there
    are two.
    """
    eos, eos_id = source.tokenizer.eos_token, source.tokenizer.eos_token_id
    if eos is None or eos_id is None:
        raise CheckpointError("the tokenizer has no eos_token; a general preference model is trained to end with one")
    if source.chat_template is not None:
        return TextRule("chat_template", add_special_tokens=True, overwrite_last=int(eos_id))
    return TextRule(
        "format",
        format="{prompt} {response}",
        append_if_missing=str(eos),
        append_prefix=" ",
        add_special_tokens=True,
        overwrite_last=int(eos_id),
    )


GENERAL_PREFERENCE = Family(
    name="general-preference",
    title="General preference model (GPM)",
    examples=("general-preference/GPM-Llama-3.1-8B", "general-preference/GPM-Gemma-2B"),
    head="linear `value_head` without bias, an even number of outputs; `prompt_head` with half as many, or none",
    tap="last token; the gate at the end of the first message",
    eos="the template's own; after the cut the last id becomes EOS",
    output="comparison of two answers; an answer's reward is the mean of its comparisons with all answers of the row",
    maths="v = W h[last] / |W h[last]|, g = softmax(G h[prompt end]); "
    "s(i, j) = sum_k g[k] (v_i[2k] v_j[2k+1] - v_i[2k+1] v_j[2k])",
    matches=_matches,
    describe=_describe,
)
