"""The reward-model families. Each family is one entry of this table, made in a module of its own.

No code outside this package asks for a checkpoint's family: the rest of the export sees a Draft, which is also the
contents of a --spec file. The formula of each family is in docs/families.md.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rewardrt.errors import CheckpointError
from rewardrt_export.families.draft import Draft, Family
from rewardrt_export.families.encoder import ENCODER
from rewardrt_export.families.gated import ARMORM, QRM
from rewardrt_export.families.general_preference import GENERAL_PREFERENCE
from rewardrt_export.families.guards import GUARDS
from rewardrt_export.families.ldl import LDL
from rewardrt_export.families.linear_heads import LINEAR_HEADS
from rewardrt_export.families.lm_row import LM_ROW
from rewardrt_export.families.mlp_head import MLP_HEAD
from rewardrt_export.families.openrlhf import OPENRLHF
from rewardrt_export.families.pair_preference import PAIR_PREFERENCE
from rewardrt_export.families.pairrm import PAIRRM
from rewardrt_export.families.process import MATH_SHEPHERD, QWEN_PRM, RLHFLOW_PRM, SKYWORK_PRM, TRL_PRM
from rewardrt_export.families.rerankers import RERANKERS
from rewardrt_export.families.sequence_classification import ODIN, SEQUENCE_CLASSIFICATION
from rewardrt_export.families.token_logit import TOKEN_LOGIT
from rewardrt_export.families.urm import URM
from rewardrt_export.families.value_head import VALUE_HEAD

if TYPE_CHECKING:
    from rewardrt_export.source.folder import Source

__all__ = ["FAMILIES", "Draft", "Family", "choose_family", "matching_families"]

# Names of parts of backbones, for a message: other tensors may be a head.
BACKBONE = re.compile(r"(layers?|h|blocks)\.\d+\.|embed|norm|wte|wpe|ln_f")

# Classes of known scoring models that no spec can describe, and why.
NOT_ONE_TEXT = {
    "JinaForRanking": "it reads all documents of a query in one text, and a document's score depends on the others "
    "(jina-reranker-v3); a bundle scores each text by itself",
    "Qwen3ForGuardModel": "it labels every token of a stream, and its verdict is of two tokens in a row "
    "(Qwen3Guard-Stream); a bundle has one reward for a text: Qwen3Guard-Gen can be exported",
    "LayerWiseMiniCPMForCausalLM": "it has a head for each layer over a backbone that transformers does not have "
    "(bge-reranker-v2-minicpm-layerwise)",
    "CostWiseGemmaForCausalLM": "it merges tokens of the document between its layers "
    "(bge-reranker-v2.5-gemma2-lightweight); transformers has no such backbone",
}

FAMILIES = {
    family.name: family
    for family in (
        OPENRLHF,
        SEQUENCE_CLASSIFICATION,
        VALUE_HEAD,
        *LINEAR_HEADS,
        ODIN,
        MLP_HEAD,
        ARMORM,
        QRM,
        LDL,
        URM,
        ENCODER,
        QWEN_PRM,
        TRL_PRM,
        MATH_SHEPHERD,
        RLHFLOW_PRM,
        SKYWORK_PRM,
        PAIRRM,
        PAIR_PREFERENCE,
        GENERAL_PREFERENCE,
        LM_ROW,
        TOKEN_LOGIT,
        *RERANKERS,
        *GUARDS,
    )
}


def choose_family(source: Source, override: str | None = None) -> Family:
    """Return the one family that a checkpoint's files match, or the one named by `override`.

    Raises CheckpointError if none or several match, because a guess could give a wrong reward.
    """
    if (reason := NOT_ONE_TEXT.get(source.architecture)) is not None:
        raise CheckpointError(f"{source.architecture}: {reason}")
    if override is not None:
        if override not in FAMILIES:
            raise CheckpointError(f"no family {override!r}; expected one of {', '.join(FAMILIES)}")
        return FAMILIES[override]
    matching = matching_families(source)
    if len(matching) == 1:
        return FAMILIES[next(iter(matching))]
    if matching:
        said = "; ".join(f"{name}: {reason}" for name, reason in matching.items())
        readings = "; ".join(f"{name} reads {_reading(FAMILIES[name])}" for name in matching)
        raise CheckpointError(
            f"{source.architecture} matches {len(matching)} families ({said}); choose one with --family: {readings}"
        )
    beside = sorted(name for name in source.stored if not BACKBONE.search(name))
    raise CheckpointError(
        f"{source.architecture} is not a reward model of a known family (`rewardrt families` lists them): "
        f"beside the backbone it has {', '.join(beside[:6]) or 'nothing'}; {_where_heads_get_lost(source)}"
        + (_of_a_language_model() if _is_causal_lm(source) else "")
    )


def matching_families(source: Source) -> dict[str, str]:
    """Return the families that a checkpoint's files match, with the reason for each."""
    reasons = {family.name: family.matches(source) for family in FAMILIES.values()}
    return {name: reason for name, reason in reasons.items() if reason}


def _reading(family: Family) -> str:
    """Say how the family reads its reward, which differs between families with the same tensors."""
    return f"{family.tap.partition(';')[0]} (end of text: {family.eos})"


def _where_heads_get_lost(source: Source) -> str:
    if source.adapter is not None:
        saved = ", ".join(source.adapter.saved_modules) or "nothing"
        return f"the adapter lost its head (modules_to_save: {saved}), and no value_head file is beside it"
    return "a head trained with LoRA, or saved in a file of its own (value_head.safetensors), is easily lost in a merge"


def _of_a_language_model() -> str:
    names = ", ".join(family.name for family in FAMILIES.values() if family.with_options and family is not TOKEN_LOGIT)
    return (
        f"; if logits of its LM head are the reward, say which: --tokens yes,no, or --family {LM_ROW.name}; a reranker "
        f"or a guard is one of {names}"
    )


def _is_causal_lm(source: Source) -> bool:
    return source.architecture.endswith("ForCausalLM")
