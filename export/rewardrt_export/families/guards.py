"""Guards: language models whose first word says whether a text is harmful. The reward is the probability of harm.

Their long policies are in the checkpoint's own chat template, or in a file of the user's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rewardrt.errors import CheckpointError
from rewardrt.text.chat_template import ChatTemplate, Message
from rewardrt_export.families.draft import Draft, Family
from rewardrt_export.families.token_logit import Recipe, chat_rule, describe_with, format_rule, logit_family
from rewardrt_export.token_options import TokenOptions

if TYPE_CHECKING:
    from rewardrt_export.source.folder import Source

UNTOLD = ". Only with --family: its files are those of any language model"
WILDGUARD_CLOSE = "Harmful request:"
OUTPUT = "P(harm), 0 to 1: higher is worse; --function difference for its log-odds"


def _shield_gemma(source: Source) -> Recipe:
    text = chat_rule(source, instruction_variable="guideline")
    return Recipe(("Yes", "No"), "sigmoid", text, source="the model card: the chat template reads `guideline`")


def _llama_guard(source: Source) -> Recipe:
    text = chat_rule(source)
    # Guard 3 generates an empty line before the word, unless the template already ends with one.
    turns: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tokens = {name: str(token) for name, token in source.tokenizer.special_tokens_map.items()}
    template = ChatTemplate(source.chat_template or "", tokens, generation_prompt=True)
    ends = template.apply(template.as_read(turns)).endswith("\n\n")
    text = replace(text, close="" if ends else "\n\n")
    return Recipe(("unsafe", "safe"), "sigmoid", text, source="the model card: the probability of the first word")


def _qwen3_guard(source: Source) -> Recipe:
    text = chat_rule(source, close="Safety:")
    return Recipe(
        (" Unsafe", " Safe", " Controversial"), "softmax", text, source="github.com/QwenLM/Qwen3Guard, README"
    )


def _granite_guardian(source: Source) -> Recipe:
    return Recipe(("Yes", "No"), "sigmoid", chat_rule(source), source="github.com/ibm-granite/granite-guardian, 3.0")


def _wildguard(source: Source, options: TokenOptions) -> Draft:
    if not options.template:
        raise CheckpointError(
            "wildguard: its text is in github.com/allenai/wildguard, wildguard/utils.py; write it to a file with "
            "{prompt} and {response}, with the line break after <|assistant|>, and give --template @FILE"
        )
    text = replace(format_rule(source, options.template), close=WILDGUARD_CLOSE)
    return describe_with(Recipe(("yes", "no"), "sigmoid", text), source, replace(options, template=""))


GUARDS = (
    logit_family(
        "shieldgemma",
        "ShieldGemma",
        ("google/shieldgemma-2b", "google/shieldgemma-9b"),
        _shield_gemma,
        head='rows of the LM head for "Yes" and "No", with Gemma 2\'s softcap' + UNTOLD,
        output=OUTPUT,
        eos="the template with a generation prompt; the policy is the row's `instruction`, or --instruction",
        maths="r = sigmoid(l['Yes'] - l['No'])",
    ),
    logit_family(
        "llama-guard",
        "Llama Guard 3 and 4, for text",
        ("meta-llama/Llama-Guard-3-8B", "meta-llama/Llama-Guard-4-12B"),
        _llama_guard,
        head='rows of the LM head for "unsafe" and "safe"' + UNTOLD,
        output=OUTPUT,
        eos="the template with a generation prompt, and the empty line before the answer's first word",
        maths="r = sigmoid(l['unsafe'] - l['safe'])",
    ),
    logit_family(
        "qwen3guard-gen",
        "Qwen3Guard-Gen",
        ("Qwen/Qwen3Guard-Gen-0.6B", "Qwen/Qwen3Guard-Gen-8B"),
        _qwen3_guard,
        head='rows of the LM head for " Unsafe", " Safe" and " Controversial"' + UNTOLD,
        output=OUTPUT,
        eos='the template, then "Safety:"',
        maths="r = softmax(l[' Unsafe'], l[' Safe'], l[' Controversial'])[0]",
    ),
    logit_family(
        "granite-guardian",
        "Granite Guardian 3.0 and 3.1",
        ("ibm-granite/granite-guardian-3.1-8b",),
        _granite_guardian,
        head='rows of the LM head for "Yes" and "No", divided by Granite\'s logits_scaling' + UNTOLD,
        output=OUTPUT,
        eos="the template with a generation prompt; the risk is chat_template_kwargs.guardian_config",
        maths="r = sigmoid(l['Yes'] - l['No'])",
    ),
    Family(
        name="wildguard",
        title="WildGuard: whether the request is harmful",
        examples=("allenai/wildguard",),
        head='rows of the LM head for "yes" and "no". Only with --family, and --template @FILE with its text',
        tap="last token of the whole text",
        eos=f'"{WILDGUARD_CLOSE}"',
        output=OUTPUT,
        maths="r = sigmoid(l['yes'] - l['no'])",
        matches=lambda source: None,
        describe=lambda source: _wildguard(source, TokenOptions()),
        with_options=_wildguard,
    ),
)
