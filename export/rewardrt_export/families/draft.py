"""A family's description of a checkpoint: the part of the spec that backbone and tokenizer do not determine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rewardrt.bundle.spec import Affine, Combine, Head, InputKind, Output, Tap, TextRule

if TYPE_CHECKING:
    from rewardrt_export.source.folder import Source
    from rewardrt_export.token_options import TokenOptions


@dataclass(frozen=True)
class Draft:
    """An unfinished spec, and the format of a --spec file. Most fields are those of `rewardrt.bundle.spec.Spec`.

    `backbone_prefix` is the prefix of the backbone's tensors on disk, if it is not transformers' own. `unused` are
    tensors of the checkpoint that the reward does not use, each with the reason. `max_length` is the limit in training,
    in tokens, if neither config.json nor the tokenizer states it. `reasons` explains fields by name, for --explain.
    """

    heads: tuple[Head, ...]
    causal: bool = True
    input: InputKind = "single"
    text: TextRule = TextRule()
    taps: tuple[Tap, ...] = (Tap(),)
    combine: Combine = Combine()
    output: Output = Output()
    normalise: Affine | None = None
    backbone_prefix: str = ""
    unused: dict[str, str] = field(default_factory=dict)
    max_length: int | None = None
    padded: bool = True
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """One way in which reward models are trained and saved.

    `matches` returns the reason why a checkpoint is of this family, or None, from its files alone. `examples` are
    checkpoints that users know by name. `head`, `tap`, `eos` and `output` say in words what `describe` returns as a
    Draft, and `maths` is the formula; `rewardrt families` and docs/families.md show them. `with_options` describes a
    checkpoint of a family that reads logits of tokens, given the options of the command line.
    """

    name: str
    title: str
    examples: tuple[str, ...]
    head: str
    tap: str
    eos: str
    output: str
    maths: str
    matches: Callable[[Source], str | None]
    describe: Callable[[Source], Draft]
    with_options: Callable[[Source, TokenOptions], Draft] | None = None
