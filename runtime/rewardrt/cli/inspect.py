"""`rewardrt inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rewardrt.cli.options import example, json_option
from rewardrt.cli.output import show, show_json
from rewardrt.display import visible


@click.command(short_help="Show what is in a bundle.", epilog=example("rewardrt inspect bundle"))
@click.argument("bundle", type=click.Path(path_type=Path))
@json_option
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what is in a bundle: the model, its text rule, its files, its certificate.

    Checks the hash of every file in a folder. Of hf://ORG/NAME only the manifest is downloaded.
    """
    from rewardrt.bundle.opening import open_bundle
    from rewardrt.bundle.spec import to_json

    opened = open_bundle(bundle)
    if as_json:
        show_json(to_json(opened.manifest))
        return
    show(describe_manifest(opened.name, opened.manifest))
    if opened.absent:
        show("  only the manifest was downloaded; files are checked when they are used")


def describe_manifest(name: str, manifest: Any) -> str:
    """Format a manifest as text."""
    spec, origin = manifest.spec, manifest.provenance
    rule = spec.text
    taps = ", ".join(tap.rule + (f" {list(tap.ids)}" if tap.ids else "") for tap in spec.taps)
    affine = spec.normalise
    normalise = "none in the checkpoint"
    if affine is not None:
        default = "default" if spec.normalise_by_default else "on request; raw is the default"
        normalise = f"(reward - {affine.mean:g}) / {affine.std:g}, {default}"
    origin_of = _describe_reference(manifest.normalised_on) if manifest.normalised_on is not None else []
    steps = [_describe_source(rule)]
    steps += [_describe_steps(rule)] if rule.step_token else []
    steps += [f"strip {rule.strip_tail!r} at the end"] if rule.strip_tail else []
    steps += [f"append {rule.append_prefix + rule.append_if_missing!r} if missing"] if rule.append_if_missing else []
    steps += ["tokenizer's special tokens" if rule.add_special_tokens else "no special tokens added"]
    steps += [f"cut to {spec.max_length} tokens"]
    steps += [f"last id becomes {rule.overwrite_last}"] if rule.overwrite_last is not None else []
    named = [f"  objectives {', '.join(spec.output.labels)}"] if spec.output.labels else []
    lines = [
        f"{name}: {spec.family}, {spec.backbone}, {origin.parameters:,} parameters",
        f"  from       {origin.checkpoint} ({origin.architecture}, {', '.join(origin.stored_dtypes)}), "
        f"{origin.created}",
        f"  text       {' -> '.join(steps)}",
        f"  pooling    {taps}",
        *(f"  chosen     {name}: {choice}" for name, choice in origin.choices.items()),
        *named,
        f"  normalise  {normalise}",
        *origin_of,
    ]
    for certificate in manifest.certificates:
        worst = max(certificate.single.max_std, certificate.batched.max_std)
        lines.append(
            f"  certified  {certificate.precision}: within {worst:.1e} std of torch on {certificate.texts} texts, "
            f"pair order {certificate.pair_order_agreement:.1%} ({certificate.reference})"
        )
        if certificate.longest is not None:
            beyond = f"; not compared beyond {', '.join(certificate.beyond)}" if certificate.beyond else ""
            lines.append(f"             texts of up to {certificate.longest} tokens{beyond}")
        if certificate.fidelity is not None:
            near = certificate.fidelity
            lines.append(
                f"             rms {near.rms_std:.3f} std, pair order {near.pair_order_agreement:.1%} on {near.texts} "
                f"texts unseen in calibration (torch bfloat16: {near.bf16_rms_std:.3f}, "
                f"{near.bf16_pair_order_agreement:.1%})"
            )
    lines += [f"  built      {variant.precision}: {variant.built}" for variant in manifest.variants if variant.built]
    if not manifest.certificates:
        lines.append("  uncertified: never compared with torch (exported with --no-certify)")
    lines += [f"  {record.bytes:>13,}  {record.path}" for record in manifest.files]
    return "\n".join(map(visible, lines))


def _describe_reference(data: Any) -> list[str]:
    cut = f", {data.truncated:,} of them cut" if data.truncated else ""
    measured = f"of {data.texts:,} rewards of {data.rows:,} rows{cut}; {data.precision} on {data.provider}"
    files = [f"             {name}, SHA-256 {digest}" for name, digest in data.files.items()]
    return [f"             measured {measured}, {data.created}", *files]


def _describe_source(rule: Any) -> str:
    if rule.source == "segments":
        return " + ".join(map(repr, rule.segments))
    if rule.format:
        return repr(rule.format) + (
            " as the user's turn of the chat template" if rule.source == "chat_template" else ""
        )
    return "chat template" if rule.source == "chat_template" else "prompt + response"


def _describe_steps(rule: Any) -> str:
    if rule.step_layout == "turns":
        return f"every step a turn of the user, answered {rule.step_token!r}"
    return f"{rule.step_token!r} after every step" + (", each by itself" if rule.step_layout == "apart" else "")
