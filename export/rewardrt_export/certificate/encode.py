"""Tokenize golden texts and probes with the bundle's own tokenizer and template, and compare with transformers'."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from rewardrt.bundle.manifest import TOKENIZER
from rewardrt.errors import CertificateError, RowError
from rewardrt.text.chat_template import ChatTemplate
from rewardrt.text.items import RawText
from rewardrt.text.rendering import Renderer
from rewardrt.text.tokens import EncodedText, Tokenizer
from rewardrt_export.certificate.golden import MARGIN, Candidate, golden_texts, probe_texts
from rewardrt_export.checkpoint import Checkpoint
from rewardrt_export.source.tokenizer import special_tokens
from rewardrt_export.tracing.attention_masks import named_lengths

LONGEST_PROBE = 6144  # tokens; eager attention in torch needs too much memory for more
PROBE_WORK = 400_000_000_000  # most parameters x tokens of a probe: some seconds on one processor


def encode_texts(checkpoint: Checkpoint, bundle: Path, file: Path | None) -> tuple[list[Candidate], list[EncodedText]]:
    """Read texts to score with torch from a file or the default set, and tokenize them as the bundle will.

    Raises CertificateError if the bundle's template or tokenizer differs from transformers'.
    """
    renderer, tokenizer, template = _reader(checkpoint, bundle)
    candidates = golden_texts(renderer, tokenizer, checkpoint.spec, file)
    return candidates, [_encode(checkpoint, renderer, tokenizer, template, candidate) for candidate in candidates]


def encode_probes(
    checkpoint: Checkpoint, bundle: Path, lengths: Collection[int]
) -> tuple[list[Candidate], list[EncodedText]]:
    """Make the probes for this checkpoint, and tokenize them as the bundle will. Raises CertificateError."""
    renderer, tokenizer, template = _reader(checkpoint, bundle)
    source, spec = checkpoint.source, checkpoint.spec
    assert source.trained is not None
    candidates = probe_texts(
        renderer,
        tokenizer,
        spec,
        special_tokens=special_tokens(source.trained.backend),
        named_tokens=sorted(set(spec.special_tokens.values())),
        variables=template.variables if template is not None and spec.text.source == "chat_template" else (),
        lengths=lengths,
    )
    return candidates, [_encode(checkpoint, renderer, tokenizer, template, candidate) for candidate in candidates]


def certified_lengths(checkpoint: Checkpoint) -> list[int]:
    """Return the lengths named in config.json that a golden text can exceed in reasonable time."""
    most = min(checkpoint.spec.max_length, LONGEST_PROBE, PROBE_WORK // max(checkpoint.source.parameters, 1))
    return sorted({length for length in named_lengths(checkpoint.source.config).values() if length + MARGIN <= most})


def uncertified_lengths(checkpoint: Checkpoint, longest: int) -> tuple[str, ...]:
    """Return the lengths named in config.json, below the model's limit, that no golden text exceeds."""
    named = named_lengths(checkpoint.source.config).items()
    return tuple(f"{name} {length}" for name, length in named if longest <= length < checkpoint.spec.max_length)


def _reader(checkpoint: Checkpoint, bundle: Path) -> tuple[Renderer, Tokenizer, ChatTemplate | None]:
    """Return the renderer, tokenizer and template of the bundle that is being written."""
    spec, source = checkpoint.spec, checkpoint.source.chat_template
    template = (
        ChatTemplate(source, spec.special_tokens, generation_prompt=spec.text.generation_prompt) if source else None
    )
    renderer = Renderer(spec.text, template, with_prompt=spec.reads_prompt_end)
    return renderer, Tokenizer(bundle / TOKENIZER, spec), template


def _encode(
    checkpoint: Checkpoint,
    renderer: Renderer,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    candidate: Candidate,
) -> EncodedText:
    item = candidate.item
    if template is not None and checkpoint.spec.text.source == "chat_template" and not isinstance(item, RawText):
        messages = list(renderer.messages(item))
        inputs = renderer.inputs(item)
        theirs = checkpoint.source.tokenizer.apply_chat_template(
            template.as_read(messages),
            chat_template=checkpoint.source.chat_template,
            tokenize=False,
            add_generation_prompt=checkpoint.spec.text.generation_prompt,
            tools=list[Any](inputs.tools) if inputs.tools else None,
            documents=inputs.documents,
            **inputs.options,
        )
        if (ours := template.render(messages, inputs)) != theirs:
            raise CertificateError(f"the runtime's chat template gives {ours!r}, transformers' gives {theirs!r}")
    rendered = renderer.render(item)
    special = tokenizer.adds_special_tokens(rendered)
    assert checkpoint.source.trained is not None
    reference = checkpoint.source.trained.reference
    if rendered.pieces:
        expected = [token for piece in rendered.pieces for token in reference(piece, None, special)]
    else:
        expected = reference(rendered.text, rendered.pair, special)
    if tokenizer.encode_whole(rendered).tolist() != expected:
        raise CertificateError(
            f"the bundle's tokenizer gives other ids than the checkpoint's for {rendered.text[:80]!r}; this is a fault "
            "of the export: please report it"
        )
    try:
        return tokenizer.encode(rendered, max_length=candidate.max_length)
    except RowError as error:
        raise CertificateError(f"golden text {rendered.text[:80]!r}: {error}") from error
