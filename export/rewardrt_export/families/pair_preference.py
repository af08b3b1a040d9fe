"""SliC pair preference models: a causal language model that answers which of two responses is better, "A" or "B"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rewardrt.bundle.spec import Combine, TextRule
from rewardrt.errors import CheckpointError
from rewardrt_export.families.draft import Draft, Family
from rewardrt_export.families.language_model_head import token_head, token_id

if TYPE_CHECKING:
    from rewardrt_export.source.folder import Source

PROMPT = (
    "\n{% for message in messages %}{% if loop.index0 % 2 == 0 %}\n\n<turn> user\n {{ message['content'] }}"
    "{% else %}\n\n<turn> assistant\n {{ message['content'] }}{% endif %}{% endfor %}\n\n\n"
)
FORMAT = "[CONTEXT] {prompt} [RESPONSE A] {first} [RESPONSE B] {second} \n"


def _matches(source: Source) -> str | None:
    return None  # nothing tells it from any causal language model


def _describe(source: Source) -> Draft:
    if source.chat_template is None:
        raise CheckpointError(
            "the tokenizer has no chat template; a pair preference model reads the pair as a user turn"
        )
    head = token_head(source, (token_id(source, "A"), token_id(source, "B")))
    return Draft(
        input="pairwise",
        heads=(head,),
        text=TextRule(
            "chat_template",
            format=FORMAT,
            prompt_template=PROMPT,
            remove=str(source.tokenizer.bos_token or ""),
        ),
        combine=Combine("difference"),
        reasons={
            "heads": f'the rows of {head.layers[0].weight} for the tokens "A" and "B"',
            "text": "the model card: the pair is one user turn, without the BOS that the template writes",
        },
    )


PAIR_PREFERENCE = Family(
    name="pair-preference",
    title="SliC pair preference model",
    examples=("RLHFlow/pair-preference-model-LLaMA3-8B",),
    head='the rows of the language model\'s head for "A" and "B". Only with --family',
    tap="last token",
    eos="the template's own; its BOS is removed",
    output="comparison of two answers; an answer's reward is the mean of its comparisons with all answers of the row",
    maths="l(a, b) = logit['A'] - logit['B']; s(a, b) = (l(a, b) - l(b, a)) / 2",
    matches=_matches,
    describe=_describe,
)
