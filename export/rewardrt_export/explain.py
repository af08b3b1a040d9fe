"""What an export would do with a checkpoint: its spec as TOML with reasons, before anything is traced.

The text is a valid --spec file. For a checkpoint of no known family, the error names the closest family and what does
not fit.
"""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

import tomlkit

from rewardrt.bundle import hub
from rewardrt.errors import CheckpointError
from rewardrt_export.checkpoint import describe, rename_backbone
from rewardrt_export.families import FAMILIES, Draft
from rewardrt_export.model.backbone import bind, meta_backbone
from rewardrt_export.source.folder import Source
from rewardrt_export.token_options import TokenOptions


def explain(source: Source, family: str | None = None, options: TokenOptions | None = None) -> str:
    """Return the spec of a checkpoint as commented TOML, or raise CheckpointError naming the closest family."""
    try:
        name, draft = describe(source, family=family, options=options)
    except CheckpointError as error:
        if family is not None or (options is not None and options.given):
            raise  # the user's own choice does not fit
        raise CheckpointError(f"{error}; {closest(source)}") from error
    chosen = (
        line
        for what, choice in source.choices.items()
        for line in textwrap.wrap(f"{what}: {choice}", 110, initial_indent="# ", subsequent_indent="# ")
    )
    return "\n".join([f"# {hub.name_of(source.folder)}: {FAMILIES[name].title}", *chosen, to_toml(draft)])


def to_toml(draft: Draft) -> str:
    """Write a draft as a --spec file, with the reasons as comments.

    Fields that have their default and no reason are left out.
    """
    said = []
    for field in dataclasses.fields(draft):
        value = getattr(draft, field.name)
        if (
            field.name == "reasons"
            or value is None
            or (value in ({}, field.default) and field.name not in draft.reasons)
        ):
            continue
        if value != {}:
            said.append((field.name, _stated(value)))
    # Plain values come first, because in TOML everything after a table's header belongs to the table.
    said.sort(key=lambda named: _is_table(named[1]))
    parts = []
    for name, plain in said:
        comment = textwrap.wrap(draft.reasons.get(name, ""), 110, initial_indent="# ", subsequent_indent="# ")
        parts.append("\n".join([*comment, tomlkit.dumps({name: plain}).strip()]))
    return "\n\n".join(parts) + "\n"


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value))


def _stated(value: Any) -> Any:
    """Return a dataclass as plain values, without fields that have their default (TOML has no null).

    If all fields have their defaults, its text fields are shown, so that the reason above it refers to something.
    """
    if isinstance(value, tuple):
        return [_stated(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    found = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    changed = {
        field.name: found[field.name] for field in dataclasses.fields(value) if found[field.name] != field.default
    }
    shown = changed or {name: word for name, word in found.items() if isinstance(word, str) and word}
    return {name: _stated(item) for name, item in shown.items()}


def closest(source: Source) -> str:
    """Name the family closest to a checkpoint of no known family, and the tensors that do not fit it."""
    best: tuple[int, str] | None = None
    for family in FAMILIES.values():
        if family.with_options is not None:  # these fit any language model equally well
            continue
        try:
            draft = family.describe(source)
        except (CheckpointError, KeyError, TypeError, ValueError):  # not of this family, so anything may be missing
            continue
        wanted = {name for head in draft.heads for layer in head.layers for name in (layer.weight, layer.bias) if name}
        missing = sorted(wanted - source.stored.keys())
        extra = _left_over(source, draft, wanted)
        if best is None or len(missing) + len(extra) < best[0]:
            said = f"missing {', '.join(missing) or 'nothing'}; left over {', '.join(extra[:6]) or 'nothing'}"
            best = len(missing) + len(extra), f"the closest family is {family.name} ({said})"
    return best[1] if best else "no family comes close"


def _left_over(source: Source, draft: Draft, wanted: set[str]) -> list[str]:
    model = meta_backbone(source.config, "eager")
    rest = {name: tensor for name, tensor in source.stored.items() if name not in wanted}
    try:
        return sorted(bind(model, rename_backbone(rest, draft, model.base_model_prefix)).unused)
    except CheckpointError:  # parts of the backbone are missing too
        return sorted(rest)
