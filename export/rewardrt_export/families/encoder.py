"""transformers *ForSequenceClassification on an encoder: a pair of texts in, a small head over CLS or the mean out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rewardrt.bundle.spec import Activation, Head, Layer, Tap, TextRule
from rewardrt.errors import CheckpointError
from rewardrt_export.families.draft import Draft, Family

if TYPE_CHECKING:
    from rewardrt_export.source.folder import Source

# transformers' names of activations, where the spec has the same function.
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "relu": "relu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "selu": "selu",
    "silu": "silu",
    "swish": "silu",
    "linear": "none",
}


def _activation(config: Any, field: str) -> Activation:
    name = getattr(config, field)
    if name not in _ACTIVATIONS:
        raise CheckpointError(f"config.json: {field} {name!r}; expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _linear(name: str, activation: Activation = "none") -> Layer:
    return Layer(f"{name}.weight", f"{name}.bias", activation)


def _bert_head(config: Any) -> tuple[Layer, ...]:
    return (_linear("bert.pooler.dense", "tanh"), _linear("classifier"))


def _roberta_head(config: Any) -> tuple[Layer, ...]:
    return (_linear("classifier.dense", "tanh"), _linear("classifier.out_proj"))


def _electra_head(config: Any) -> tuple[Layer, ...]:
    return (_linear("classifier.dense", "gelu"), _linear("classifier.out_proj"))


def _deberta_head(config: Any) -> tuple[Layer, ...]:
    return (_linear("pooler.dense", _activation(config, "pooler_hidden_act")), _linear("classifier"))


def _modernbert_head(config: Any) -> tuple[Layer, ...]:
    dense = Layer(
        "head.dense.weight",
        "head.dense.bias" if config.classifier_bias else None,
        _activation(config, "classifier_activation"),
        norm="head.norm.weight",
        norm_bias="head.norm.bias" if config.norm_bias else None,
        norm_eps=config.norm_eps,
    )
    return (dense, _linear("classifier"))


# Classes before transformers 4 saved a pooler that theirs never call.
_POOLERS = tuple(f"roberta.pooler.dense.{name}" for name in ("weight", "bias"))

# The head of each architecture's *ForSequenceClassification, by model_type.
ENCODERS: dict[str, Callable[[Any], tuple[Layer, ...]]] = {
    "bert": _bert_head,
    "deberta-v2": _deberta_head,  # v3 too
    "electra": _electra_head,
    "modernbert": _modernbert_head,
    "roberta": _roberta_head,
    "xlm-roberta": _roberta_head,
}


def _matches(source: Source) -> str | None:
    if source.architecture.endswith("ForSequenceClassification") and source.config.model_type in ENCODERS:
        return f"its architecture is {source.architecture}, of an encoder"
    return None


def _describe(source: Source) -> Draft:
    config = source.config
    if config.model_type not in ENCODERS:
        raise CheckpointError(f"model_type {config.model_type!r}: expected an encoder, one of {', '.join(ENCODERS)}")
    if getattr(config, "is_decoder", False):
        raise CheckpointError("config.json: is_decoder is set; expected an encoder, which reads in both directions")
    pooling = getattr(config, "classifier_pooling", "cls")  # ModernBERT alone has a choice
    return Draft(
        heads=(Head(ENCODERS[config.model_type](config), taps=(pooling,)),),
        causal=False,
        text=_text_rule(source),
        taps=(Tap(pooling, "mean" if pooling == "mean" else "first"),),
        unused={name: "the class reads the first token without it" for name in _POOLERS if name in source.stored},
        reasons={
            "heads": f"the head of transformers' {source.architecture}",
            "text": "the tokenizer's chat template"
            if source.chat_template is not None
            else "tokenizer(prompt, response): two texts, longest_first when they are too long",
            "taps": f"{source.architecture} reads {'the mean' if pooling == 'mean' else 'the first token'}",
        },
    )


def _text_rule(source: Source) -> TextRule:
    """A pair of texts; one rendered text where training left a chat template, as it brings its own special tokens."""
    if source.chat_template is not None:
        return TextRule(source="chat_template")
    kinds = getattr(source.config, "type_vocab_size", 0)
    told = kinds > 1 and "token_type_ids" in source.tokenizer.model_input_names
    return TextRule(source="pair", add_special_tokens=True, type_ids=told)


ENCODER = Family(
    name="encoder",
    title="transformers *ForSequenceClassification on an encoder (BERT, RoBERTa, XLM-R, DeBERTa, ELECTRA, ModernBERT)",
    examples=(
        "OpenAssistant/reward-model-deberta-v3-large-v2",
        "OpenAssistant/reward-model-deberta-v3-base",
        "cross-encoder/ms-marco-MiniLM-L6-v2",
    ),
    head="the class's own: dense, activation (ModernBERT: layer norm), then a linear layer with bias",
    tap="first token (CLS), or the mean over all tokens (ModernBERT's classifier_pooling)",
    eos="tokenizer(prompt, response) with its special tokens; {text}: tokenizer(text); no longer conversations",
    output="raw logit",
    maths="r = w . act(D h[first] + d) + b",
    matches=_matches,
    describe=_describe,
)
