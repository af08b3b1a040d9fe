"""The model card of a bundle: a README.md for its page on the Hub, made from the manifest alone."""

from __future__ import annotations

from collections.abc import Iterable

from rewardrt.bundle import hub
from rewardrt.bundle.certificate import Certificate
from rewardrt.bundle.manifest import Bundle, Variant
from rewardrt.bundle.precisions import PRECISIONS
from rewardrt.bundle.spec import Head, Spec, Tap
from rewardrt.display import visible

_TAPS = {
    "last_mask": "the last token",
    "last_not_id": "the last token that is not padding",
    "before_first_id": "the token before the first padding",
    "last_id": "the last of a special token",
    "pattern_start": "the beginning of a pattern of tokens",
    "all_ids": "the end of every step",
    "first": "the first token",
    "mean": "the mean of the tokens",
    "only_id": "a special token",
    "prompt_end": "the end of the prompt",
}
_COMBINED = {
    "none": "",
    "dot": "The reward is a weighted sum of the head's outputs.",
    "gate": "The reward is the sum of the objectives' values, each times its weight from a gate, a second head.",
    "difference": "The reward is the first value minus the second.",
    "skew": "The values are a vector, and two answers are compared by a skew product of their vectors.",
}
_OUTPUTS = {
    "identity": "Nothing is done to it: rewards are raw, and may be any number.",
    "sigmoid": "A sigmoid makes it a number between 0 and 1.",
    "softmax": "A softmax over the outputs makes it a probability, between 0 and 1.",
    "log_odds": "It is the logarithm of the odds of a softmax over the outputs.",
    "negate": "Its sign is turned round, so that a higher reward is better.",
}


def model_card(bundle: Bundle, repository: str) -> str:
    """Return a bundle's card in Markdown, with the metadata that the Hub reads; `repository` is ORG/NAME."""
    manifest = bundle.manifest
    spec, origin = manifest.spec, manifest.provenance
    base = _base_models(origin.checkpoint)
    ranks = "rerank" in spec.family or spec.family.startswith("zerank")
    tags = ["reward-model", "onnx", "rewardrt", spec.family, spec.backbone]
    return "\n".join(
        [
            "---",
            "library_name: rewardrt",
            f"pipeline_tag: {'text-ranking' if ranks else 'text-classification'}",
            *(["base_model:", *(f"- {name}" for name in base)] if base else []),
            "tags:",
            *(f"- {_yaml(tag)}" for tag in dict.fromkeys(tags)),
            "# license: the checkpoint's own; fill it in, nothing here knows it",
            "---",
            "",
            f"# {repository.partition('/')[2]}",
            "",
            f"A reward model as a bundle of RewardRT: `{spec.backbone}`, "
            f"{origin.parameters:,} parameters, of the family `{spec.family}`. It scores text with onnxruntime and a "
            "tokenizer, without torch.",
            "",
            "| | |",
            "| --- | --- |",
            f"| checkpoint | {_cell(origin.checkpoint)} ({_cell(origin.architecture)}, "
            f"{_cell(', '.join(origin.stored_dtypes))}) |",
            f"| exported | {_cell(origin.created)}, rewardrt {_cell(origin.versions.get('rewardrt', 'unknown'))} |",
            f"| longest text | {spec.max_length} tokens; what is longer is cut, and the result says by how much |",
            *([f"| objectives | {_cell(', '.join(spec.output.labels))} |"] if spec.output.labels else []),
            "",
            "## What the reward is",
            "",
            _formula(spec),
            "",
            "## Precisions",
            "",
            *_precisions(bundle),
            "",
            "## Use",
            "",
            "```",
            "pip install 'rewardrt[cpu,hub]'",
            f"rewardrt score {hub.PREFIX}{repository} rows.jsonl",
            *([] if manifest.uncertified else [f"rewardrt verify {hub.PREFIX}{repository}"]),
            "```",
            "",
            "```python",
            "from rewardrt import RewardModel",
            "",
            f'rm = RewardModel.load("{hub.PREFIX}{repository}")',
            *_example(spec),
            "```",
            "",
            "## License",
            "",
            "Not stated here: it is that of the checkpoint. Fill in `license` at the top of this file.",
            "",
        ]
    )


def _base_models(checkpoint: str) -> list[str]:
    """Return the Hub repositories that the provenance names: the checkpoint's, and that of an adapter's base model."""
    found = [hub.named(part) for part in checkpoint.split(" on ")]
    return [each.name for each in found if each is not None and hub.COMMIT.fullmatch(each.revision)]


def _formula(spec: Spec) -> str:
    taps = {tap.name: tap for tap in spec.taps}
    said = [_head(head, taps, position) for position, head in enumerate(spec.heads)]
    said.append(_COMBINED[spec.combine.rule])
    if spec.combine.rule != "skew":
        said.append(_OUTPUTS[spec.output.function])
    if spec.input == "steps":
        said.append("Every step of an answer has a reward of its own.")
    if spec.input == "pairwise":
        said.append("Answers to one prompt are compared with each other; one answer alone has no reward.")
    if (affine := spec.normalise) is not None:
        when = "by default" if spec.normalise_by_default else "on request"
        said.append(f"Normalised, {when}, it is (reward - {affine.mean:g}) / {affine.std:g}.")
    return " ".join(filter(None, said))


def _head(head: Head, taps: dict[str, Tap], position: int) -> str:
    places = " and ".join(_TAPS[taps[name].rule] for name in head.taps)
    layers = "one linear layer" if len(head.layers) == 1 else f"{len(head.layers)} layers"
    if any(layer.rows for layer in head.layers):
        layers = "rows of the language model's head"
    which = "The" if position == 0 else "Another"
    text = f"{which} head, {layers}, reads the hidden state at {places}."
    if head.reduce == "mean":
        text += f" Every {head.group} outputs are averaged."
    if head.reduce == "expectation":
        text += f" Every {head.group} outputs are a distribution over {head.low:g} to {head.high:g}; its mean is taken."
    return text


def _precisions(bundle: Bundle) -> Iterable[str]:
    yield "| precision | for | MB | largest difference from torch | pairs in the same order | compared on |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for variant in bundle.manifest.variants:
        size = sum(each.bytes for each in bundle.manifest.files if each.path in (variant.graph, *variant.data)) / 1e6
        measured = _certificate(bundle.certificate(variant.precision))
        yield f"| `{_cell(variant.precision)}` | {_machine(variant)} | {size:,.1f} | {measured} |"
    if not bundle.manifest.certificates:
        return
    yield ""
    yield "Differences are in standard deviations of torch's rewards (float32)."
    for certificate in bundle.manifest.certificates:
        if (near := certificate.fidelity) is not None:
            yield (
                f"On {near.texts} texts that calibration did not see `{_cell(certificate.precision)}` is "
                f"{near.rms_std:.3f} off (rms) and orders {near.pair_order_agreement:.1%} of pairs as torch does. "
                f"Torch itself in bfloat16: {near.bf16_rms_std:.3f} and {near.bf16_pair_order_agreement:.1%}."
            )


def _certificate(found: Certificate | None) -> str:
    if found is None:
        return "not compared | | uncertified"
    worst = max(found.single.max_std, found.batched.max_std)
    longest = f" of up to {found.longest} tokens" if found.longest is not None else ""
    return f"{worst:.1e} | {found.pair_order_agreement:.1%} | {found.texts} texts{longest}"


def _machine(variant: Variant) -> str:
    known = PRECISIONS.get(variant.precision)
    where = "any machine"
    if variant.made_for:
        where = "GPUs: " + ", ".join(map(_cell, variant.made_for))
    if variant.needs:
        where = "CPUs with " + " or ".join(map(_cell, variant.needs))
    return f"{where}; {known.description}" if known is not None else where


def _example(spec: Spec) -> Iterable[str]:
    if spec.input == "steps":
        yield 'rm.score_rows([{"prompt": "2 + 2?", "steps": ["Add them.", "4"]}])'
    elif spec.input == "single":
        yield 'rm.score(prompt="Name a colour.", response="Blue.")'
    if spec.input != "steps":
        yield 'rm.rank(prompt="Name a colour.", responses=["Blue.", "Seven"])  # best first'


def _cell(text: str) -> str:
    """Return text from a manifest as a table cell: on one line, without Markdown or HTML markup."""
    return visible(text).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def _yaml(text: str) -> str:
    return text if text.replace("-", "").replace("_", "").isalnum() else '"' + _cell(text).replace('"', "'") + '"'
