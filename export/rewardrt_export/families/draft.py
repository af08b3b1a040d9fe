"""What a family says of a checkpoint: the part of the spec that is not read off the backbone or the tokenizer."""

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
    """A spec in the making, and the format of a --spec file. Fields are those of `rewardrt.bundle.spec.Spec`.

    `backbone_prefix` stands before the backbone's tensors on disk where transformers' own prefix does not. `unused` are
    tensors that belong to the checkpoint and not to the reward, each with the reason. `max_length` is the limit in
    training where neither config.json nor the tokenizer has it. `reasons` says why, by field name, for --explain.
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

    `matches` says why a checkpoint is of this family, or None, from its files alone. `examples` are checkpoints that
    users know by name. `head`, `tap`, `eos` and `output` say in words what `describe` says in a Draft, and `maths` is
    the formula: they are what `rewardrt families` and docs/families.md show. `with_options` describes a checkpoint of a
    family that reads logits of tokens, with what the command line says of them.
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
