"""RM-Bench (THU-KEG/RM-Bench): three chosen and three rejected answers in three styles, all compared with each other.

A file is a JSON array of objects with id, prompt, chosen and rejected (three strings each: concise, detailed, detailed
with markdown), and in total_dataset.json also domain. Rows in files of one domain, such as chat_filtered.json, have no
domain; then the beginning of the file's name is used.

There are 3 x 3 comparisons of chosen answer i with rejected answer j; one is right if the chosen answer's reward is
higher (`compute_accuracy` in scripts/utils.py). Those with i < j are hard, because the chosen answer has the plainer
style; those with i = j are normal and those with i > j easy. A domain's score is the mean of its three levels. The
domains are chat, math, code and safety (safety-refuse and safety-response together). Easy, normal, hard and the score
are means over the domains.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rewardrt.errors import RowError
from rewardrt.evaluate.layouts import Layout, Need, Question, id_of, prompt_of, texts_of, unit_of
from rewardrt.evaluate.measures import OVERALL, Key, Mean, Measures, Values, tied, weighted
from rewardrt.evaluate.results import Results

DOMAINS = ("chat", "math", "code", "safety")
STYLES = 3
_LEVELS = {"easy": -1, "normal": 0, "hard": 1}


def read(row: dict[str, Any], file: str) -> Question:
    """Return the question of a row, with the chosen answers first, then the rejected ones."""
    right, wrong, prompt = texts_of(row, "chosen"), texts_of(row, "rejected"), prompt_of(row)
    if len(right) != STYLES or len(wrong) != STYLES:
        raise RowError(f"{len(right)} chosen and {len(wrong)} rejected: expected {STYLES} of each, one of each style")
    domain = row.get("domain")
    named = domain if isinstance(domain, str) else file
    subset = next((each for each in DOMAINS if named.startswith(each)), domain if isinstance(domain, str) else "")
    flags = (True,) * STYLES + (False,) * STYLES
    return Question(prompt | {"responses": right + wrong}, flags, subset, id_of(row, "id"), unit_of(prompt["prompt"]))


def measure(results: Results) -> Measures:
    """Return easy, normal and hard for each domain and over all domains, and their means."""
    rewards = results.rewards.reshape(-1, 2, STYLES)
    right = (rewards[:, 0, :, None] > rewards[:, 1, None, :]).astype(np.float64)  # [rows, chosen, rejected]
    order = np.sign(np.arange(STYLES)[None, :] - np.arange(STYLES)[:, None])
    levels = {name: right[:, order == sign].mean(axis=1) for name, sign in _LEVELS.items()}
    domains = sorted(results.subset_names)
    means = {
        Key("part", _named(domain, level)): Mean(values, results.in_subset(domain))
        for domain in domains
        for level, values in levels.items()
    }

    def derive(values: Values) -> Values:
        found: Values = {}
        for domain in filter(None, domains):
            found[Key("subset", domain)] = weighted([values[Key("part", _named(domain, level))] for level in _LEVELS])
        for level in _LEVELS:
            each = weighted([values[Key("part", _named(domain, level))] for domain in domains])
            found[Key("section", level)] = each
        return {OVERALL: weighted([found[Key("section", level)] for level in _LEVELS])} | found

    return Measures(means, derive, right.mean(axis=(1, 2)), tied(results))


def _named(domain: str, level: str) -> str:
    return f"{domain or 'all'} {level}"


LAYOUT = Layout(
    "rm-bench",
    "RM-Bench",
    (Need("id", "id"), Need("prompt", "prompt"), Need("chosen", "three"), Need("rejected", "three")),
    read,
    measure,
)
