"""transformers' *ForSequenceClassification on an encoder: a pair of texts, and a small head on CLS or on the mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rewardrt.bundle.spec import Activation, Head, Layer, Tap, TextRule
from rewardrt.errors import CheckpointError
from rewardrt_export.families.draft import Draft, Family

if TYPE_CHECKING:
    from rewardrt_export.source.folder import Source

# transformers' names of activations -> the spec's names of the same functions.
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "relu": "relu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "selu": "selu",
    "silu": "silu",
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "linear": "none",
}


def _activation(config: Any, field: str) -> Activation:
    name = getattr(config, field)
    if name not in _ACTIVATIONS:
        raise CheckpointError(f"config.json: {field} {name!r}; expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _linear(name: str, activation: Activation = "none") -> Layer:
    return Layer(f"{name}.weight", f"{name}.bias", activation)


def _pooled(pooler: str) -> Callable[[Any], tuple[Layer, ...]]:
    """Return a head like BERT's: the backbone's pooler on the first token, and a linear layer."""
    return lambda config: (_linear(pooler, "tanh"), _linear("classifier"))


def _dense(activation: Activation | None) -> Callable[[Any], tuple[Layer, ...]]:
    """Return a head like RoBERTa's: two linear layers with this activation between; None takes the backbone's."""

    def head(config: Any) -> tuple[Layer, ...]:
        between = activation or _activation(config, "hidden_act")
        return (_linear("classifier.dense", between), _linear("classifier.out_proj"))

    return head


def _deberta_head(config: Any) -> tuple[Layer, ...]:
    return (_linear("pooler.dense", _activation(config, "pooler_hidden_act")), _linear("classifier"))


def _distilbert_head(config: Any) -> tuple[Layer, ...]:
    return (_linear("pre_classifier", "relu"), _linear("classifier"))


def _eurobert_head(config: Any) -> tuple[Layer, ...]:
    return (_linear("dense", "gelu"), _linear("classifier"))


def _mobilebert_head(config: Any) -> tuple[Layer, ...]:
    pooler = (_linear("mobilebert.pooler.dense", "tanh"),) if config.classifier_activation else ()
    return (*pooler, _linear("classifier"))


def _summary_head(config: Any) -> tuple[Layer, ...]:
    if not config.summary_use_proj or not config.summary_proj_to_labels:
        raise CheckpointError(
            "config.json: summary_use_proj and summary_proj_to_labels are not both set; expected them"
        )
    name = config.summary_activation
    if name not in (None, "", *_ACTIVATIONS):
        raise CheckpointError(f"config.json: summary_activation {name!r}; expected one of {', '.join(_ACTIVATIONS)}")
    return (_linear("sequence_summary.summary", _ACTIVATIONS[name] if name else "none"),)


def modernbert_dense(config: Any) -> Layer:
    """Return the first layer of ModernBERT's head, for an encoder or a decoder: dense, with a norm."""
    return Layer(
        "head.dense.weight",
        "head.dense.bias" if config.classifier_bias else None,
        _activation(config, "classifier_activation"),
        norm="head.norm.weight",
        norm_bias="head.norm.bias" if config.norm_bias else None,
        norm_eps=config.norm_eps,
    )


# Poolers that classes before transformers 4 saved, and that *ForSequenceClassification never uses.
_POOLERS = tuple(
    f"{pooler}.{name}" for pooler in ("roberta.pooler.dense", "bert.pooler") for name in ("weight", "bias")
)

# The head of each architecture's *ForSequenceClassification, by model_type.
ENCODERS: dict[str, Callable[[Any], tuple[Layer, ...]]] = {
    "albert": _pooled("albert.pooler"),
    "bert": _pooled("bert.pooler.dense"),
    "big_bird": _dense(None),
    "camembert": _dense("tanh"),
    "convbert": _dense(None),
    "data2vec-text": _dense("tanh"),
    "deberta": _deberta_head,
    "deberta-v2": _deberta_head,  # v3 too
    "distilbert": _distilbert_head,
    "electra": _dense("gelu"),
    "ernie": _pooled("ernie.pooler.dense"),
    "eurobert": _eurobert_head,
    "flaubert": _summary_head,
    "gte": _pooled("gte.pooler.dense"),
    "jina_embeddings_v3": _dense("tanh"),
    "luke": _pooled("luke.pooler.dense"),
    "megatron-bert": _pooled("bert.pooler.dense"),
    "mobilebert": _mobilebert_head,
    "modernbert": lambda config: (modernbert_dense(config), _linear("classifier")),
    "mpnet": _dense("tanh"),
    "nomic_bert": _pooled("nomic_bert.pooler.dense"),
    "rembert": _pooled("rembert.pooler.dense"),
    "roberta": _dense("tanh"),
    "roberta-prelayernorm": _dense("tanh"),
    "roc_bert": _pooled("roc_bert.pooler.dense"),
    "roformer": _dense(None),
    "squeezebert": _pooled("transformer.pooler.dense"),
    "ultrabert": lambda config: (_linear("classifier"),),
    "xlm": _summary_head,
    "xlm-roberta": _dense("tanh"),
    "xlm-roberta-xl": _dense("tanh"),
}
# Encoders that mix each token with its neighbours, including padding, so that padding would change a text's reward.
UNPADDED = {
    "convbert": "its convolutions reach over the text's end into the padding",
    "mobilebert": "every embedding is made of three tokens, the last one's of padding",
}
# Encoders that one graph cannot compute exactly, and why.
NO_GRAPH = {
    "canine": "it reads characters by hashes and pools four of them into one, from the start of a row of fixed length",
    "fnet": "its Fourier transforms are further from torch's, as onnxruntime computes them, than a certificate allows",
    "funnel": "it halves the number of tokens from block to block, and joins the last one of a text to the padding",
    "ibert": "it computes in integers with steps that it takes from each batch",
    "longformer": "its attention is over chunks whose number depends on where global tokens are in each text",
    "mra": "its attention is an approximation that chooses blocks of a row by their values",
    "nystromformer": "its attention is an approximation by averages over parts of a row, padding included",
    "xmod": "each text goes through the layers of its own language, which are chosen by its batch",
    "reformer": "its tokens attend within buckets of a random hash",
    "xlnet": "its class reads the last place of a row, where texts that are padded on the right have none",
    "yoso": "its attention is a sample: tokens meet where random hashes of them are equal",
}
# The config's names of the pooling over the last layer -> the pooling.
_POOLING = {"cls": "cls", "first": "cls", "bos": "cls", "mean": "mean"}


def _matches(source: Source) -> str | None:
    if source.architecture.endswith("ForSequenceClassification") and source.config.model_type in ENCODERS | NO_GRAPH:
        return f"its architecture is {source.architecture}, of an encoder"
    return None


def _describe(source: Source) -> Draft:
    config = source.config
    if (why := NO_GRAPH.get(config.model_type)) is not None:
        raise CheckpointError(f"{config.model_type}: {why}; one graph cannot compute that exactly")
    if config.model_type not in ENCODERS:
        raise CheckpointError(f"model_type {config.model_type!r}: expected an encoder, one of {', '.join(ENCODERS)}")
    if getattr(config, "is_decoder", False):
        raise CheckpointError("config.json: is_decoder is set; expected an encoder, which reads in both directions")
    asked = getattr(config, "classifier_pooling", None) or getattr(config, "summary_type", "cls")
    if asked not in _POOLING:
        raise CheckpointError(
            f"config.json: pooling {asked!r}: {source.architecture} then averages the rewards of all tokens, "
            f"or reads another token; expected one of {', '.join(_POOLING)}"
        )
    pooling = _POOLING[asked]
    return Draft(
        heads=(Head(ENCODERS[config.model_type](config), taps=(pooling,)),),
        causal=False,
        text=_text_rule(source),
        taps=(Tap(pooling, "mean" if pooling == "mean" else "first"),),
        padded=config.model_type not in UNPADDED,
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
    """Return the rule for a pair of texts, or for one rendered text if the tokenizer has a chat template.

    A chat template brings its own special tokens.
    """
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
    eos="tokenizer(prompt, response) with its special tokens; longer conversations only with a chat template",
    output="raw logit",
    maths="r = w . act(D h[first] + d) + b",
    matches=_matches,
    describe=_describe,
)
