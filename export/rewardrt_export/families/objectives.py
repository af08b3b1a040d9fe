"""The names of the objectives of reward models with several."""

from __future__ import annotations

from typing import Any

HELPSTEER = (
    "helpsteer-helpfulness",
    "helpsteer-correctness",
    "helpsteer-coherence",
    "helpsteer-complexity",
    "helpsteer-verbosity",
)
# In the order of the rows of regression_layer in ArmoRM and QRM; from their model cards.
ARMORM = (
    *HELPSTEER,
    "ultrafeedback-overall_score",
    "ultrafeedback-instruction_following",
    "ultrafeedback-truthfulness",
    "ultrafeedback-honesty",
    "ultrafeedback-helpfulness",
    "beavertails-is_safe",
    "prometheus-score",
    "argilla-overall_quality",
    "argilla-judge_lm",
    "code-complexity",
    "code-style",
    "code-explanation",
    "code-instruction-following",
    "code-readability",
)


def label_names(config: dict[str, Any], count: int, known: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the names of `count` outputs: config.json's, else the family's `known` names, else LABEL_0 and so on.

    LABEL_0, LABEL_1, ... in config.json are transformers' defaults, and count as no names.
    """
    default = tuple(f"LABEL_{index}" for index in range(count))
    stated = config.get("id2label")
    if isinstance(stated, dict) and sorted(stated) == sorted(map(str, range(count))):
        names = tuple(str(stated[str(index)]) for index in range(count))
        if names != default:
            return names
    return known if len(known) == count else default
