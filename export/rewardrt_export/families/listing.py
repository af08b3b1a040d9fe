"""The families as text, JSON and the page docs/families.md, all from one table."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from rewardrt_export.families.draft import Family

WORDS = ("head", "tap", "eos", "output", "maths")

INTRODUCTION = """\
# Reward-model families

A family is one way in which reward models are trained and saved. This page is for those who want to know whether their
checkpoint can be exported, and what its reward is.

`rewardrt export` finds the family from config.json and the tensor names. If several fit, it asks for `--family`.
`rewardrt export CHECKPOINT --explain` prints what it would do and why. A model of no family is described by a file: see
[A model of your own](spec-file.md).

Each table says:

- **head**: the tensors that turn a hidden state into the reward
- **tap**: the token whose hidden state the head reads
- **eos**: how the text ends, or the whole text where no chat template makes it. "The template" is the tokenizer's chat
  template, EOS its end token
- **output**: what the reward is. "Raw" is the head's value as it is; normalised rewards are given on request
- **maths**: the formula. `h[...]` is the last hidden state at a tap, `w` and `W` are weights, `b` is a bias, `l['x']`
  is the logit of token x, and `s(a, b)` is how much better answer a is than b

`rewardrt families --markdown` writes this page from the table that exports use.
"""


def as_rows(families: Iterable[Family]) -> list[dict[str, object]]:
    """Return each family's description, for JSON."""
    return [
        {"name": family.name, "title": family.title, "examples": list(family.examples)}
        | {word: getattr(family, word) for word in WORDS}
        for family in families
    ]


def as_text(families: Iterable[Family], width: int) -> str:
    """Return the listing for a terminal of `width` columns."""
    blocks = []
    for family in families:
        lines = textwrap.wrap(f"{family.name}: {family.title}", width, subsequent_indent="  ")
        for word, said in (("used by", ", ".join(family.examples)), *((word, getattr(family, word)) for word in WORDS)):
            wrapped = textwrap.wrap(said, width - 11, break_long_words=False, break_on_hyphens=False) or [""]
            lines += [f"  {word if index == 0 else '':8s} {line}" for index, line in enumerate(wrapped)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def as_markdown(families: Iterable[Family]) -> str:
    """Return docs/families.md."""
    parts = [INTRODUCTION]
    for family in families:
        rows = [("used by", ", ".join(f"`{example}`" for example in family.examples))]
        rows += [(word, getattr(family, word)) for word in WORDS[:-1]]
        rows += [("maths", f"`{family.maths}`")]
        table = "\n".join(f"| {word} | {said.replace('|', chr(92) + '|')} |" for word, said in rows)
        parts.append(f"## {family.name}\n\n{family.title}.\n\n| | |\n| --- | --- |\n{table}\n")
    return "\n".join(parts).rstrip("\n")
