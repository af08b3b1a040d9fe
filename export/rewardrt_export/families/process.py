"""Process reward models: a reward for every step of an answer, read at the token that ends the step.

The families differ in that token, in how steps become text, and in the head: a classifier with two labels, two rows of
a language model's head, or a value head. The caller decides how to combine the rewards of the steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rewardrt.bundle.spec import Head, Layer, Output, Tap, TextRule
from rewardrt.errors import CheckpointError
from rewardrt_export.families.draft import Draft, Family
from rewardrt_export.families.encoder import ENCODERS
from rewardrt_export.families.language_model_head import NAME as LM_HEAD
from rewardrt_export.families.language_model_head import token_head
from rewardrt_export.families.objectives import label_names

if TYPE_CHECKING:
    from rewardrt_export.source.folder import Source

STEP = "step"  # the name of the tap
QWEN_STEP = "<extra_0>"
SEPARATOR = "\n"  # TRL's default, and Skywork's; a checkpoint does not say which one it was trained with
SHEPHERD_STEP = " ки\n"
GOOD, BAD = "+", "-"


def _matches_qwen(source: Source) -> str | None:
    if source.architecture.endswith("ForProcessRewardModel"):
        return f"its architecture is {source.architecture}"
    return None


def _describe_qwen(source: Source) -> Draft:
    head = source.stored.get("score.2.weight")
    if head is not None and head.shape[:1] != (2,):
        raise CheckpointError(f"score.2.weight: expected two labels, wrong and right, found shape {list(head.shape)}")
    return Draft(
        heads=(
            Head((Layer("score.0.weight", "score.0.bias", "relu"), Layer("score.2.weight", "score.2.bias")), (STEP,)),
        ),
        input="steps",
        text=TextRule(source="chat_template", step_token=QWEN_STEP),
        taps=(Tap(STEP, "all_ids", (source.token_id(QWEN_STEP),)),),
        output=Output("softmax", 1),
        unused=_unused_language_model_head(source),
        reasons={
            "heads": "Qwen2ForProcessRewardModel: score is Linear, ReLU, Linear",
            "text": "the model card: <extra_0> after every step, the steps are the assistant's turn",
            "taps": f"the model card reads at {QWEN_STEP}",
            "output": "the probability of the second label, that the step is right",
        },
    )


def _matches_trl(source: Source) -> str | None:
    head = next((source.stored[name] for name in ("score.weight", "classifier.weight") if name in source.stored), None)
    if source.config.model_type in ENCODERS or head is None or head.shape[:1] != (2,):
        return None
    if source.architecture.endswith("ForTokenClassification") and not _names_labels(source):
        return f"its architecture is {source.architecture}, with two labels"
    if source.says_base_model and "score.weight" in source.stored:
        return f"its head has two labels, and config.json says {source.architecture}"
    return None


def _names_labels(source: Source) -> bool:
    """Whether the two labels have names; PRMTrainer leaves transformers' defaults."""
    return label_names(source.raw, 2) != label_names({}, 2)


def _describe_trl(source: Source) -> Draft:
    name = "classifier" if "classifier.weight" in source.stored else "score"
    bias = f"{name}.bias" if f"{name}.bias" in source.stored else None
    separator = _ids(source, SEPARATOR)
    bos = source.tokenizer.bos_token_id
    return Draft(
        heads=(Head((Layer(f"{name}.weight", bias),), (STEP,)),),
        input="steps",
        text=TextRule(
            source="concatenate",
            step_token=SEPARATOR,
            step_layout="apart",
            prepend_ids=() if bos is None else (int(bos),),
        ),
        taps=(Tap(STEP, "all_ids", separator, offset=len(separator) - 1),),
        output=Output("softmax", 1),
        reasons={
            "heads": "transformers' name for the head of this architecture",
            "text": "PRMTrainer: prompt, steps and separators are tokenized each by itself, BOS before them all",
            "taps": "PRMTrainer puts a step's label on the last token of its separator",
            "output": "the probability of label 1, that the step is right",
        },
    )


def _needs_naming(source: Source) -> str | None:
    """Match nothing: the files of such a language model do not show that it was trained to reward steps."""
    return None


def _describe_shepherd(source: Source) -> Draft:
    rows = _ids(source, f"{GOOD} {BAD}")
    if len(rows) != 2:
        raise CheckpointError(f"the tokenizer makes {len(rows)} tokens of '+ -'; math-shepherd reads the logits of two")
    step = _ids(source, SHEPHERD_STEP.strip())[-1]
    rule = TextRule(
        source="format",
        format="{prompt} {response}",
        strip_tail="\n",
        add_special_tokens=True,
        step_token=SHEPHERD_STEP,
    )
    probe = _ids(source, f"a{SHEPHERD_STEP}b{SHEPHERD_STEP}")
    if probe.count(step) != 2:
        raise CheckpointError(f"the tokenizer makes no token of its own of {SHEPHERD_STEP.strip()!r} after a step")
    return Draft(
        heads=(token_head(source, rows, (STEP,)),),
        input="steps",
        text=rule,
        taps=(Tap(STEP, "all_ids", (step,)),),
        output=Output("softmax", 0),
        reasons={
            "heads": f"the model card compares the logits of {GOOD!r} and {BAD!r}, ids {list(rows)}",
            "text": "the model card: question, a space, and the steps as lines that end with ки",
            "taps": f"the model card reads at ки, id {step}",
            "output": "the probability of '+' against '-'",
        },
    )


def _describe_rlhflow(source: Source) -> Draft:
    if source.chat_template is None:
        raise CheckpointError("the tokenizer has no chat template; RLHFlow's steps are turns of a conversation")
    rows = (_ids(source, GOOD)[-1], _ids(source, BAD)[-1])
    answer = _answer_ids(source)
    return Draft(
        heads=(token_head(source, rows, (STEP,)),),
        input="steps",
        text=TextRule(source="chat_template", step_token=GOOD, step_layout="turns"),
        taps=(Tap(STEP, "all_ids", answer, offset=len(answer) - 2),),
        output=Output("softmax", 0),
        reasons={
            "heads": f"prm_evaluate.py compares the logits of {GOOD!r} and {BAD!r}, ids {list(rows)}",
            "text": "prm_evaluate.py: every step is a user's turn, the first after the question, and '+' its answer",
            "taps": "the token before the assistant's '+', which predicts it",
            "output": "the probability of '+' against '-'",
        },
    )


def _answer_ids(source: Source) -> tuple[int, ...]:
    """Return the ids of the template's text between a user turn and the assistant's answer, and of the answer '+'.

    A '+' alone would not be enough, because steps of mathematics contain many.
    """
    turns = [{"role": "user", "content": "step"}, {"role": "assistant", "content": GOOD}]
    text = str(source.tokenizer.apply_chat_template(turns, chat_template=source.chat_template, tokenize=False))
    end = text.rfind(GOOD)
    between = text[text.rfind("step", 0, end) + len("step") : end]
    ids, whole = _ids(source, between + GOOD), _ids(source, text)
    found = [start for start in range(len(whole)) if whole[start : start + len(ids)] == ids]
    if len(ids) < 2 or len(found) != 1 or ids[-1] != _ids(source, GOOD)[-1]:
        raise CheckpointError(f"the chat template puts no tokens of their own between a step and its answer: {text!r}")
    return ids


def _matches_skywork(source: Source) -> str | None:
    if source.architecture.endswith("ForPrmModel"):
        return f"its architecture is {source.architecture}"
    return None


def _describe_skywork(source: Source) -> Draft:
    step = _ids(source, SEPARATOR)
    if len(step) != 1:
        raise CheckpointError(f"the tokenizer makes {len(step)} tokens of a line's end; skywork-prm reads at one")
    bos = source.tokenizer.bos_token
    return Draft(
        heads=(Head((Layer("v_head.summary.weight", "v_head.summary.bias"),), (STEP,)),),
        input="steps",
        text=TextRule(
            source="format",
            format=f"{bos or ''}{{prompt}}\n{{response}}",
            step_token=SEPARATOR,
            step_layout="apart",
        ),
        taps=(Tap(STEP, "all_ids", step),),
        output=Output("sigmoid"),
        unused=_unused_language_model_head(source),
        reasons={
            "heads": "PRM_MODEL's value head",
            "text": "prepare_input: BOS and the problem's line, then every step and its line's end by itself",
            "taps": "prepare_input flags the line's end after every step",
            "output": "the sigmoid of the value, as with return_probs",
        },
    )


def _ids(source: Source, text: str) -> tuple[int, ...]:
    return tuple(int(token) for token in source.tokenizer.encode(text, add_special_tokens=False))


def _unused_language_model_head(source: Source) -> dict[str, str]:
    return {LM_HEAD: "the language model's; no step's reward reads it"} if LM_HEAD in source.stored else {}


QWEN_PRM = Family(
    name="qwen-prm",
    title="Qwen2.5-Math process reward model",
    examples=("Qwen/Qwen2.5-Math-PRM-7B", "Qwen/Qwen2.5-Math-PRM-72B", "Qwen/Qwen2.5-Math-7B-PRM800K"),
    head="MLP `score.0`, ReLU, `score.2` with two labels",
    tap="every <extra_0>",
    eos="the template's own; <extra_0> after every step",
    output="a probability for each step: softmax, label 1",
    maths="r_i = softmax(W2 relu(W0 h[step i] + b0) + b2)[1]",
    matches=_matches_qwen,
    describe=_describe_qwen,
)

TRL_PRM = Family(
    name="trl-prm",
    title="TRL PRMTrainer: transformers *ForTokenClassification with two labels",
    examples=("trl-lib/Qwen2-0.5B-Reward-Math-Sheperd",),
    head="linear `score` or `classifier` with two labels",
    tap="last token of the separator after every step",
    eos="BOS first, a newline after every step, every piece tokenized by itself; no template",
    output="a probability for each step: softmax, label 1",
    maths="r_i = softmax(W h[step i] + b)[1]",
    matches=_matches_trl,
    describe=_describe_trl,
)

MATH_SHEPHERD = Family(
    name="math-shepherd",
    title="Math-Shepherd: a language model that says + or - after a step; only with --family",
    examples=("peiyi9979/math-shepherd-mistral-7b-prm",),
    head="the rows `+` and `-` of the language model's head",
    tap="every ки",
    eos="the tokenizer's BOS; every step is a line that ends with ' ки'",
    output="a probability for each step: + in the softmax over + and -",
    maths="r_i = softmax(W[+, -] h[step i])[0]",
    matches=_needs_naming,
    describe=_describe_shepherd,
)

RLHFLOW_PRM = Family(
    name="rlhflow-prm",
    title="RLHFlow: a language model that answers every step with + or -; only with --family",
    examples=("RLHFlow/Llama3.1-8B-PRM-Deepseek-Data", "RLHFlow/Llama3.1-8B-PRM-Mistral-Data"),
    head="the rows `+` and `-` of the language model's head",
    tap="the token before the assistant's answer `+` to every step",
    eos="the template's own; every step is a user turn, and + its answer",
    output="a probability for each step: + in the softmax over + and -",
    maths="r_i = softmax(W[+, -] h[before answer i])[0]",
    matches=_needs_naming,
    describe=_describe_rlhflow,
)

SKYWORK_PRM = Family(
    name="skywork-prm",
    title="Skywork-o1-Open process reward model",
    examples=("Skywork/Skywork-o1-Open-PRM-Qwen-2.5-1.5B", "Skywork/Skywork-o1-Open-PRM-Qwen-2.5-7B"),
    head="value head `v_head.summary` with bias",
    tap="the newline after every step",
    eos="BOS and the problem's line, a newline after every step, every piece tokenized by itself; no template",
    output="a probability for each step: sigmoid",
    maths="r_i = sigmoid(w . h[step i] + b)",
    matches=_matches_skywork,
    describe=_describe_skywork,
)
