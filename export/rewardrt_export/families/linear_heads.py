"""One linear layer on a decoder, under the names and text rules of its trainers: nine families in one table.

Most families have a head with a name of its own, but several use `v_head`: InternLM2, Athene, Starling, DeepSpeed-Chat
and trlx are distinguished by model_type, architecture and the prefix of the backbone's tensors.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rewardrt.bundle import hub
from rewardrt.bundle.spec import Affine, Head, Layer, Tap, TextRule
from rewardrt.errors import CheckpointError
from rewardrt_export.families.draft import Draft, Family

if TYPE_CHECKING:
    from rewardrt_export.source.folder import Source

LAST_BY_MASK = "its forward reads the last position whose attention mask is 1"
ONE_BIASLESS = "linear without bias"


def _linear(source: Source, name: str, tap: str = "last") -> tuple[Head, ...]:
    bias = f"{name}.bias"
    return (Head((Layer(f"{name}.weight", bias if bias in source.stored else None),), (tap,)),)


def _token(source: Source, name: str) -> str:
    """Return one of the tokenizer's named tokens, as text."""
    token = getattr(source.tokenizer, name)
    if not token:
        raise CheckpointError(f"{source.folder}: the tokenizer has no {name}, which this family's text needs")
    return str(token)


def _before_first(source: Source, trained: int | None, skip: int = 0) -> Tap:
    """Return the tap before the first padding token, or the last token if the tokenizer has no such token.

    `trained` is the id with which the family's own code pads, whatever config.json says; --pad-token takes precedence.
    """
    token_id = trained if source.padding.given is None else source.pad_id
    return Tap("last", "last_mask") if token_id is None else Tap("last", "before_first_id", (token_id,), skip=skip)


def _has_prefix(source: Source, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in source.stored)


def _match_eurus(source: Source) -> str | None:
    return "it has regression_head.weight" if "regression_head.weight" in source.stored else None


# The model cards' text formats by model_type, for tokenizers without a chat template.
_OPENBMB_TEXTS = {
    "mistral": "[INST] {prompt} [/INST] {response}",  # Eurus
    "llama": "Human: {prompt}\n\nAssistant: {response}",  # UltraRM
}


def _describe_eurus(source: Source) -> Draft:
    if source.chat_template is not None:
        text = TextRule("chat_template")
    elif source.config.model_type in _OPENBMB_TEXTS:
        text = TextRule("format", _OPENBMB_TEXTS[source.config.model_type], add_special_tokens=True)
    else:
        known = ", ".join(_OPENBMB_TEXTS)
        raise CheckpointError(
            f"{source.folder}: no chat template, and the eurus family knows its text for {known} only, "
            f"not {source.config.model_type}; add a chat template to the tokenizer"
        )
    return Draft(
        heads=_linear(source, "regression_head"),
        text=text,
        reasons={
            "heads": "EurusRewardModel and LlamaRewardModel call their head regression_head",
            "text": "the tokenizer's chat template, else the model card's text with the tokenizer's special tokens",
            "taps": LAST_BY_MASK,
        },
    )


EURUS = Family(
    name="eurus",
    title="Eurus and UltraRM",
    examples=("openbmb/Eurus-RM-7b", "openbmb/UltraRM-13b"),
    head=f"{ONE_BIASLESS}, regression_head",
    tap="last token",
    eos="none; the chat template, otherwise [INST] ... [/INST] (Mistral) or Human: ... Assistant: ... (Llama)",
    output="raw",
    maths="r = w . h[last]",
    matches=_match_eurus,
    describe=_describe_eurus,
)


def _match_starling(source: Source) -> str | None:
    if "v_head.weight" in source.stored and _has_prefix(source, "transformer.layers."):
        return "it has v_head.weight, and its backbone stands under transformer.layers"
    return None


def _describe_starling(source: Source) -> Draft:
    if source.architecture == "LlamaForSequenceClassification" and source.chat_template is not None:
        text = TextRule("chat_template")
    else:
        bos, eos = _token(source, "bos_token"), _token(source, "eos_token")
        form = f"{bos}[INST] {{prompt}} {eos} [/INST] {{response}}{eos}"
        text = TextRule("format", form, add_special_tokens=True)
    return Draft(
        heads=_linear(source, "v_head"),
        text=text,
        taps=(_before_first(source, source.tokenizer.unk_token_id),),
        backbone_prefix="transformer.",
        reasons={
            "heads": "GPTRewardModel calls its head v_head, and the backbone transformer",
            "text": "the model card's Llama-2 text, tokenized as there with the tokenizer's special tokens; "
            "of a checkpoint with an architecture of its own (34B) the chat template",
            "taps": "GPTRewardModel reads before the first padding token, which is the tokenizer's unk_token",
        },
    )


STARLING = Family(
    name="starling",
    title="Starling-RM",
    examples=("berkeley-nest/Starling-RM-7B-alpha", "Nexusflow/Starling-RM-34B"),
    head=f"{ONE_BIASLESS}, v_head",
    tap="token before the first unk, which is its padding; the last token if there is none",
    eos="BOS [INST] {prompt} EOS [/INST] {response}EOS; the chat template for the 34B",
    output="raw",
    maths="r = w . h[before the first padding]",
    matches=_match_starling,
    describe=_describe_starling,
)


def _match_internlm2(source: Source) -> str | None:
    if source.architecture == "InternLM2ForRewardModel":
        return "its architecture is InternLM2ForRewardModel"
    if source.raw.get("model_type") == "internlm2" and "v_head.weight" in source.stored:
        return "its model_type is internlm2, and it has v_head.weight"
    return None


def _describe_internlm2(source: Source) -> Draft:
    names = (hub.name_of(source.folder).rpartition("/")[2], str(source.raw.get("_name_or_path", "")).rsplit("/", 1)[-1])
    if any(name.lower().startswith("polar") for name in names):
        raise CheckpointError(
            f"{source.folder}: POLAR compares an answer with a reference answer, and a row has no reference; "
            "it cannot be exported"
        )
    reward_id = source.raw.get("reward_token_id")
    if not isinstance(reward_id, int) or isinstance(reward_id, bool) or not 0 <= reward_id < source.config.vocab_size:
        raise CheckpointError(
            f"{source.folder / 'config.json'}: reward_token_id {reward_id!r}: expected the id of a token, at which "
            "InternLM2 reads the reward"
        )
    if source.chat_template is None:
        raise CheckpointError(f"{source.folder}: the tokenizer has no chat template, which InternLM2's text needs")
    return Draft(
        heads=_linear(source, "v_head"),
        text=_reward_token_text(source, reward_id),
        reasons={
            "heads": "InternLM2ForRewardModel calls its head v_head",
            "text": "get_score: the chat template, then the reward token unless it ends so already; after a cut too",
            "taps": LAST_BY_MASK + ", which is the reward token's",
        },
    )


def _reward_token_text(source: Source, reward_id: int) -> TextRule:
    """Return the rule that appends the reward token as text, unless the template already ends with it."""
    token: Any = source.tokenizer.convert_ids_to_tokens(reward_id) if reward_id < len(source.tokenizer) else None
    if token and source.tokenizer.encode(token, add_special_tokens=False) == [reward_id]:
        return TextRule("chat_template", append_if_missing=token, overwrite_last=reward_id)
    return TextRule("chat_template", append_ids=(reward_id,))  # no text contains it, so always append


INTERNLM2_REWARD = Family(
    name="internlm2-reward",
    title="InternLM2 reward model",
    examples=("internlm/internlm2-7b-reward", "internlm/internlm2-1_8b-reward", "internlm/internlm2-20b-reward"),
    head=f"{ONE_BIASLESS}, v_head",
    tap="last token, which is the reward token",
    eos="config.json's reward_token_id is appended if missing, and is the last id after a cut",
    output="raw",
    maths="r = w . h[reward token]",
    matches=_match_internlm2,
    describe=_describe_internlm2,
)


def _match_athene(source: Source) -> str | None:
    if source.architecture == "AtheneForSequenceClassification":
        return "its architecture is AtheneForSequenceClassification"
    return None


def _describe_athene(source: Source) -> Draft:
    if source.chat_template is None:
        raise CheckpointError(f"{source.folder}: the tokenizer has no chat template, which Athene's text needs")
    cls_id = source.token_id(_token(source, "cls_token"))
    return Draft(
        heads=_linear(source, "v_head"),
        text=TextRule("chat_template", add_special_tokens=True, append_ids=(cls_id,)),
        reasons={
            "heads": "AtheneForSequenceClassification calls its head v_head",
            "text": "AtheneRewardPipeline: the chat template and cls_token, tokenized with the tokenizer's special "
            "tokens (a template that writes BOS gets a second one, as there); cls_token stays after a cut",
            "taps": "the last cls_token, which is the last token",
        },
    )


ATHENE = Family(
    name="athene",
    title="Athene-RM",
    examples=("Nexusflow/Athene-RM-8B", "Nexusflow/Athene-RM-70B"),
    head=f"{ONE_BIASLESS}, v_head",
    tap="last token, which is cls_token",
    eos="cls_token appended after the cut",
    output="raw",
    maths="r = w . h[cls]",
    matches=_match_athene,
    describe=_describe_athene,
)


def _match_beaver(source: Source) -> str | None:
    if "score_head.weight" in source.stored and source.raw.get("score_type", "reward") != "cost":
        return "it has score_head.weight"
    return None


def _match_beaver_cost(source: Source) -> str | None:
    if "score_head.weight" in source.stored and source.raw.get("score_type") == "cost":
        return "it has score_head.weight, and its score_type is cost"
    return None


def _describe_beaver(source: Source) -> Draft:
    score_type = source.raw.get("score_type", "reward")
    if score_type not in ("reward", "cost"):
        raise CheckpointError(
            f"{source.folder / 'config.json'}: score_type {score_type!r}: expected reward or cost; a critic scores the "
            "tokens of a policy in training, not texts"
        )
    eos = _token(source, "eos_token")
    form = f"BEGINNING OF CONVERSATION: USER: {{prompt}} ASSISTANT:{{response}}{eos}"
    return Draft(
        heads=_linear(source, "score_head"),
        text=TextRule("format", form, add_special_tokens=True),
        normalise=_running_normaliser(source, centred=score_type == "reward"),
        unused={name: "its value is in normalise" for name in source.stored if name.startswith("normalizer.")},
        reasons={
            "heads": "ScoreModelMixin calls its head score_head",
            "text": "safe-rlhf's preference dataset: its prompt format, the answer, EOS",
            "taps": LAST_BY_MASK,
            "normalise": "its running normaliser: (r - mean) / (sqrt(var) + 1e-8), for costs without the mean; "
            "used only when asked for, whatever do_normalize says",
        },
    )


def _running_normaliser(source: Source, *, centred: bool) -> Affine | None:
    """Return safe-rlhf's normaliser from its saved buffers or config.json; None if it was never updated."""
    values = {}
    for name, untouched in (("mean", 0.0), ("var", 1.0)):
        stored, listed = source.stored.get(f"normalizer.{name}"), source.raw.get(name)
        found = stored.read().tolist() if stored is not None else untouched if listed is None else listed
        number = found[0] if isinstance(found, list) and len(found) == 1 else found
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise CheckpointError(f"{source.folder}: the normaliser's {name} is {found!r}; expected one finite number")
        values[name] = float(number)
    if values == {"mean": 0.0, "var": 1.0}:
        return None
    if values["var"] <= 0:
        raise CheckpointError(f"{source.folder}: the normaliser's var is {values['var']}; expected a positive number")
    return Affine(values["mean"] if centred else 0.0, math.sqrt(values["var"]), 1e-8)


_BEAVER_EOS = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}EOS"

BEAVER = Family(
    name="beaver",
    title="Beaver reward model (safe-rlhf)",
    examples=("PKU-Alignment/beaver-7b-v1.0-reward", "PKU-Alignment/beaver-7b-v2.0-reward"),
    head="linear, with or without bias, score_head",
    tap="last token",
    eos=_BEAVER_EOS,
    output="raw; (r - mean) / (sqrt(var) + 1e-8) on request",
    maths="r = w . h[last] + b",
    matches=_match_beaver,
    describe=_describe_beaver,
)

BEAVER_COST = Family(
    name="beaver-cost",
    title="Beaver cost model (safe-rlhf)",
    examples=("PKU-Alignment/beaver-7b-v1.0-cost", "PKU-Alignment/beaver-7b-v2.0-cost"),
    head="linear, with or without bias, score_head",
    tap="last token",
    eos=_BEAVER_EOS,
    output="raw cost: HIGHER IS MORE HARMFUL, so rankings are reversed unless a --spec negates it; "
    "c / (sqrt(var) + 1e-8) on request",
    maths="c = w . h[last] + b",
    matches=_match_beaver_cost,
    describe=_describe_beaver,
)


def _match_openassistant(source: Source) -> str | None:
    if source.config.model_type == "gpt_neox" and "out_proj.weight" in source.stored:
        return "it has out_proj.weight on GPT-NeoX"
    if source.architecture == "GPTNeoXRewardModel":
        return "its architecture is GPTNeoXRewardModel"
    return None


def _describe_openassistant(source: Source) -> Draft:
    pooling = source.raw.get("pooling") or "last"
    if pooling not in ("last", "mean"):
        raise CheckpointError(f"{source.folder / 'config.json'}: pooling {pooling!r}; expected last or mean")
    eos = _token(source, "eos_token")
    return Draft(
        heads=_linear(source, "out_proj", pooling),
        text=TextRule("format", f"<|prompter|>{{prompt}}{eos}<|assistant|>{{response}}{eos}", add_special_tokens=True),
        taps=(Tap("last", "last_mask") if pooling == "last" else Tap("mean", "mean"),),
        reasons={
            "heads": "GPTNeoXRewardModel calls its head out_proj",
            "text": "the model card's text: every turn with its role's token, closed with EOS",
            "taps": f"config.json says pooling {pooling}",
        },
    )


OPENASSISTANT_PYTHIA = Family(
    name="openassistant-pythia",
    title="OpenAssistant reward model on Pythia",
    examples=("OpenAssistant/oasst-rm-2.1-pythia-1.4b-epoch-2.5", "OpenAssistant/oasst-rm-2-pythia-6.9b-epoch-1"),
    head="linear with bias, out_proj",
    tap="last token, or the mean over all tokens (config.json's pooling)",
    eos="<|prompter|>{prompt}EOS<|assistant|>{response}EOS",
    output="raw",
    maths="r = w . h[last] + b, or r = w . mean(h) + b",
    matches=_match_openassistant,
    describe=_describe_openassistant,
)

END_OF_CONVERSATION = "<|endoftext|>"  # added as text, even if the tokenizer has no such token


def _match_deepspeed(source: Source) -> str | None:
    return "its backbone stands under rwtransformer" if _has_prefix(source, "rwtransformer.") else None


def _describe_deepspeed(source: Source) -> Draft:
    # DeepSpeed-Chat gives Llama tokenizers a pad token and pads all others with EOS, whatever config.json says.
    tokenizer = source.tokenizer
    pad = tokenizer.pad_token_id if source.config.model_type == "llama" else tokenizer.eos_token_id
    starts_padded = source.config.model_type == "opt"  # OPT's tokenizer begins every text with EOS
    return Draft(
        heads=_linear(source, "v_head"),
        text=TextRule("format", f"{{prompt}}{{response}}{END_OF_CONVERSATION}", add_special_tokens=True),
        taps=(_before_first(source, pad, skip=int(starts_padded)),),
        backbone_prefix="rwtransformer.",
        reasons={
            "heads": "RewardModel calls its head v_head, and the backbone rwtransformer",
            "text": f"create_dataset_split: prompt + answer + {END_OF_CONVERSATION!r}, no template",
            "taps": "RewardModel reads before the first padding token; num_padding_at_beginning is 1 for OPT alone",
        },
    )


DEEPSPEED_CHAT = Family(
    name="deepspeed-chat",
    title="DeepSpeed-Chat reward model",
    examples=("the output of DeepSpeed-Chat's step2_reward_model_finetuning",),
    head=f"{ONE_BIASLESS}, v_head",
    tap="token before the first EOS, which is its padding (for Llama the pad token); OPT's first token is skipped",
    eos="{prompt}{response}<|endoftext|>",
    output="raw",
    maths="r = w . h[before the first padding]",
    matches=_match_deepspeed,
    describe=_describe_deepspeed,
)


def _match_trlx(source: Source) -> str | None:
    if "v_head.weight" in source.stored and _has_prefix(source, "transformer.h."):
        return "it has v_head.weight, and its backbone stands under transformer.h"
    return None


def _describe_trlx(source: Source) -> Draft:
    form = f"<|startoftext|>{{prompt}}\n{{response}}{_token(source, 'eos_token')}"
    return Draft(
        heads=_linear(source, "v_head"),
        text=TextRule("format", form, add_special_tokens=True),
        taps=(_before_first(source, source.tokenizer.eos_token_id),),
        backbone_prefix="transformer.",
        reasons={
            "heads": "GPTRewardModel calls its head v_head, and the backbone transformer",
            "text": "summarize_rlhf: <|startoftext|>, the post, a line break, the summary, EOS",
            "taps": "GPTRewardModel reads before the first padding token, which is EOS",
        },
    )


TRLX = Family(
    name="trlx",
    title="trlx reward model",
    examples=("CarperAI/openai_summarize_tldr_rm_checkpoint",),
    head=f"{ONE_BIASLESS}, v_head",
    tap="token before the first EOS, which is its padding; --pooling last_mask for models that read at EOS (hh)",
    eos="<|startoftext|>{prompt} line break {response}EOS",
    output="raw",
    maths="r = w . h[before the first EOS]",
    matches=_match_trlx,
    describe=_describe_trlx,
)

LINEAR_HEADS = (
    EURUS,
    STARLING,
    INTERNLM2_REWARD,
    ATHENE,
    BEAVER,
    BEAVER_COST,
    OPENASSISTANT_PYTHIA,
    DEEPSPEED_CHAT,
    TRLX,
)
