"""PairRM: a DeBERTa that reads a prompt and two answers, and scores each answer at the marker before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rewardrt.bundle.spec import Combine, Head, Layer, Tap, TextRule
from rewardrt.errors import CheckpointError
from rewardrt_export.families.draft import Draft, Family

if TYPE_CHECKING:
    from rewardrt_export.source.folder import Source

MARKERS = {"source": "source_prefix_id", "first": "cand1_prefix_id", "second": "cand2_prefix_id"}
HEAD = (Layer("head_layer.1.weight", "head_layer.1.bias", "tanh"), Layer("head_layer.4.weight", "head_layer.4.bias"))
# The limits of tokenize_pair in the model card: 1,224 tokens of the prompt and at least 412 of each answer.
MAX_LENGTH, SOURCE_LENGTH = 2048, 1224


def _matches(source: Source) -> str | None:
    if source.architecture == "DebertaV2PairRM":
        return f"its architecture is {source.architecture}"
    if all(name in source.raw for name in MARKERS.values()) and HEAD[1].weight in source.stored:
        return f"config.json has {', '.join(MARKERS.values())}"
    return None


def _describe(source: Source) -> Draft:
    ids = {name: _marker_id(source, field) for name, field in MARKERS.items()}
    tokens = {name: str(source.tokenizer.convert_ids_to_tokens(found)) for name, found in ids.items()}
    return Draft(
        input="pairwise",
        causal=False,
        heads=(Head(HEAD, ("source", "first")), Head(HEAD, ("source", "second"))),
        text=TextRule(
            "segments",
            segments=(f"{tokens['source']}{{prompt}}", f"{tokens['first']}{{first}}", f"{tokens['second']}{{second}}"),
            first_part=SOURCE_LENGTH / MAX_LENGTH,
            add_special_tokens=True,
        ),
        taps=tuple(Tap(name, "only_id", (found,)) for name, found in ids.items()),
        combine=Combine("difference"),
        backbone_prefix="pretrained_model.",
        max_length=MAX_LENGTH,
        reasons={
            "heads": "DebertaV2PairRM.forward: one head on [source; candidate] for each candidate, mean(left - right)",
            "text": "tokenize_pair of the model card: three texts, each with its own special tokens, in a row",
            "taps": f"config.json: {', '.join(f'{field} {source.raw.get(field)}' for field in MARKERS.values())}",
            "max_length": "the model card's limits: 1224 tokens of the prompt, 412 or more of each answer",
        },
    )


def _marker_id(source: Source, field: str) -> int:
    found = source.raw.get(field)
    if not isinstance(found, int) or not 0 <= found < len(source.tokenizer):
        raise CheckpointError(f"config.json: {field} is {found!r}; expected the id of a token, where PairRM reads")
    return found


PAIRRM = Family(
    name="pairrm",
    title="PairRM",
    examples=("llm-blender/PairRM-hf",),
    head="`head_layer`: Linear(2H, H), tanh, Linear(H, n) on [source; candidate], for each candidate",
    tap="at <|source|>, <|candidate1|> and <|candidate2|>",
    eos="prompt, first answer and second answer, each with the tokenizer's special tokens",
    output="comparison of two answers; an answer's reward is the mean of its comparisons with all answers of the row",
    maths="l(a, b) = mean(f([h_source; h_a]) - f([h_source; h_b])); s(a, b) = (l(a, b) - l(b, a)) / 2",
    matches=_matches,
    describe=_describe,
)
