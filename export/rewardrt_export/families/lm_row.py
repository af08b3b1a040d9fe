"""A causal language model trained so that one logit of the next token is the reward."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rewardrt.bundle.spec import Tap
from rewardrt_export.families.draft import Draft, Family
from rewardrt_export.families.language_model_head import token_head
from rewardrt_export.families.sequence_classification import text_rule

if TYPE_CHECKING:
    from rewardrt_export.source.folder import Source

ROW = 0


def _describe(source: Source) -> Draft:
    head = token_head(source, (ROW,))
    return Draft(
        heads=(head,),
        text=text_rule(source),
        taps=(Tap("last", "last_mask"),),
        reasons={
            "heads": f"the reward is the logit of token {ROW}: that row of {head.layers[0].weight}",
            "text": "the chat template as it is, with no generation prompt after the answer",
            "taps": "the logit of the first token that the model would generate",
        },
    )


LM_ROW = Family(
    name="nemotron-lm-row",
    title="A row of the LM head",
    examples=("nvidia/Llama-3.1-Nemotron-70B-Reward-HF",),
    head=f"row {ROW} of `lm_head`, or of the embeddings if they are tied. Only with --family: its files are "
    "those of any language model",
    tap="last token; no generation prompt",
    eos="the template's own",
    output="raw logit",
    maths=f"r = (W_lm h[last])[{ROW}]",
    matches=lambda source: None,
    describe=_describe,
)
