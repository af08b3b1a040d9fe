"""The export from start to end: what happens to a checkpoint, on one screen."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

import rewardrt
from rewardrt.bundle import hub
from rewardrt.bundle.manifest import (
    CHAT_TEMPLATE,
    FORMAT_VERSION,
    GOLDEN,
    TOKENIZER,
    Bundle,
    Manifest,
    Provenance,
    Variant,
    record_file,
    write_manifest,
)
from rewardrt.bundle.precisions import PRECISIONS
from rewardrt.bundle.spec import PoolingRule
from rewardrt.checks.verify import write_golden
from rewardrt.errors import ExportError
from rewardrt.graph.shapes import Profile
from rewardrt.steps import Progress, Step, begin, silent
from rewardrt_export.certificate.certify import GoldenSet, certify, measure_fidelity, score_golden
from rewardrt_export.certificate.encode import encode_probes, encode_texts
from rewardrt_export.certificate.memory import check_memory
from rewardrt_export.certificate.reference import score_with_torch, spread
from rewardrt_export.checkpoint import Checkpoint, read_checkpoint
from rewardrt_export.model.backbone import meta_backbone
from rewardrt_export.places import check_target
from rewardrt_export.precisions.calibrate import KEPT_TOKENS, Calibration, cut
from rewardrt_export.precisions.table import chosen_precisions
from rewardrt_export.precisions.writing import build_engine, write_graphs
from rewardrt_export.source.repository import find_checkpoint
from rewardrt_export.source.tokenizer import TokenizerChoice
from rewardrt_export.token_options import TokenOptions
from rewardrt_export.tracing.attention import attention_name
from rewardrt_export.tracing.experts import EXPERTS
from rewardrt_export.tracing.lower import lower
from rewardrt_export.tracing.trace import trace
from rewardrt_export.workplace import move, workplace

VERSIONED = ("torch", "transformers", "tokenizers", "onnx-ir", "onnxscript", "onnxruntime")


def export(
    source: str | Path,
    target: str | Path,
    *,
    base: str | Path | None = None,
    family: str | None = None,
    spec_file: Path | None = None,
    pooling: PoolingRule | None = None,
    pad_token: str | None = None,
    chat_template: str | None = None,
    max_length: int | None = None,
    weights: Sequence[float] = (),
    normalise: bool = False,
    tokenizer: TokenizerChoice | None = None,
    token_options: TokenOptions | None = None,
    precisions: Sequence[str] = ("fp32",),
    token_rewards: bool = False,
    golden: Path | None = None,
    calibrate: Path | None = None,
    certified: bool = True,
    force: bool = False,
    progress: Progress = silent,
) -> Bundle:
    """Export the reward model `source` to the bundle folder `target`, and certify it.

    `source` is a folder, or `ORG/NAME` or `hf://ORG/NAME`, with `@REVISION` or without, of which what an export reads
    is downloaded from the Hugging Face Hub. It may be a LoRA adapter; `base` is then its base, a folder or a name as
    well, unless adapter_config.json names a folder that is here.
    `tokenizer` "file" takes the ids of the saved tokenizer.json, and "transformers" those of what transformers makes of
    the folder; None takes the file's, with a word where the two differ.
    `pad_token` is the token, or its id, that training padded with, where the files allow two;
    `chat_template` one of several templates by its name, or a file. `token_options` say how the logits of tokens are
    read, of a model whose reward they are.
    `precisions` are names in `rewardrt.bundle.precisions`: a graph each. int8 is calibrated on the texts of the JSONL
    file `calibrate`, or else on every other one of the golden texts. With `token_rewards` the graphs also give the
    reward after every token, where a model reads one answer at one token. Without `certified` the torch model scores
    nothing, except the texts of `calibrate`: the bundle has no golden texts and says that it is uncertified. If the
    torch model in float32 does not fit in memory, it scores layer by layer, and fewer texts; int8 is then calibrated
    only on the texts of `calibrate`.
    `progress` is called with each step (`rewardrt.steps.Step`) as it begins, and with each text, weight or activation
    of those that count them; `str(step)` is a line for people.

    `tokenizer` "file" uses the ids of the saved tokenizer.json, and "transformers" those of the tokenizer that
    transformers builds; None uses the file's, with a note if the two differ. `pad_token` is the token, or its id, that
    training padded with, if the files allow two. `chat_template` is the name of one of several templates, or a file.
    `token_options` say how the logits of tokens are read, for a model whose reward they are.

    `precisions` are names in `rewardrt.bundle.precisions`, with one graph for each. int8 is calibrated on the texts of
    the JSONL file `calibrate`, or else on every other golden text. With `token_rewards` the graphs also output the
    reward after every token, for models that read one answer at one token. Without `certified`, the torch model scores
    nothing except the texts of `calibrate`; the bundle has no golden texts and is marked as uncertified. If the torch
    model in float32 does not fit into memory, it scores layer by layer, with fewer texts, and int8 is not calibrated.

    `progress` is called with each step (`rewardrt.steps.Step`) when it begins, and with each text, weight or activation
    if the step counts them; `str(step)` is a line for people.

    Raises a RewardRTError and leaves nothing behind if anything fails. An existing `target` is replaced only with
    `force`, and only when the new bundle is complete. A KeyboardInterrupt says what was left behind.
    """
    precisions = chosen_precisions(precisions)
    calibrated = any(PRECISIONS[name].calibrated for name in precisions)
    if golden is not None and not certified:
        raise ExportError("golden texts are to certify on, and this export is not to be certified; leave one out")
    target = Path(target)
    check_target(target, force=force)  # before anything is downloaded
    found, *below = (find_checkpoint(name, progress) for name in (source, base) if name is not None)
    progress(Step("reading the checkpoint"))
    checkpoint = read_checkpoint(
        found,
        base=below[0] if below else None,
        family=family,
        spec_file=spec_file,
        pooling=pooling,
        pad_token=pad_token,
        chat_template=chat_template,
        max_length=max_length,
        weights=weights,
        normalise=normalise,
        tokenizer=tokenizer,
        token_options=token_options,
    )
    if not checkpoint.spec.padded and any(PRECISIONS[name].engine for name in precisions):
        raise ExportError(
            f"{checkpoint.spec.backbone}: TensorRT has texts padded to few lengths, and this backbone's rewards change "
            "with padding; export it in another precision"
        )
    for name, choice in checkpoint.source.choices.items():
        progress(Step(f"{name}: {choice}", note=True))
    own_texts = calibrated and calibrate is not None
    by_layer = (certified or own_texts) and not check_memory(checkpoint, precisions if certified else ())
    with workplace(target, force=force) as folder:
        progress(Step(f"tracing {checkpoint.source.architecture} ({checkpoint.spec.backbone})"))
        graph = _make_graph(checkpoint, token_rewards)
        _write_text_files(checkpoint, folder)
        # Layer by layer, calibration takes hours at 8B parameters: on texts that were named, or not at all.
        calibration = _begin_calibration(folder) if own_texts or (calibrated and certified and not by_layer) else None
        golden_set = GoldenSet()
        if certified:
            count = begin(
                progress, f"scoring the golden texts with torch{', layer by layer' if by_layer else ''}", "text"
            )
            seen_here = None if own_texts else calibration
            golden_set = score_golden(checkpoint, folder, golden, seen_here, by_layer=by_layer, count=count)
            if calibration is not None:
                calibration.reward_std = golden_set.reward_std
        else:
            # This still compares the template and the tokenizer with transformers'.
            encode_texts(checkpoint, folder, None)
            encode_probes(checkpoint, folder, ())
        if calibration is not None and own_texts:
            count = begin(progress, f"calibrating on {calibrate}", "text")
            seen = [cut(text) for text in encode_texts(checkpoint, folder, calibrate)[1]]
            every = -(-sum(text.needed for text in seen) // KEPT_TOKENS)  # of so many texts, one: no more are kept
            seen_rewards = score_with_torch(
                checkpoint, seen[::every], calibration=calibration, by_layer=by_layer, count=count
            )
            calibration.reward_std = spread(seen_rewards)
        variants = write_graphs(graph, precisions, calibration, folder, progress)
        variants = [build_engine(each, folder, Profile.of(checkpoint.spec.max_length), progress) for each in variants]
        if certified:
            # After the weights, because reading those reports any that are not finite.
            write_golden(folder / GOLDEN, golden_set.every)
        manifest = _make_manifest(checkpoint, variants, folder, certified)
        write_manifest(folder, manifest)
        certificates = []
        for precision in precisions if certified else ():
            fidelity = None
            if PRECISIONS[precision].rounds:
                count = begin(progress, f"measuring what the {precision} graph rounds off", "text")
                fidelity = measure_fidelity(checkpoint, folder, precision, golden_set, by_layer=by_layer, count=count)
            count = begin(progress, f"certifying the {precision} graph against torch", "text")
            certificates.append(certify(checkpoint, folder, precision, fidelity, by_layer=by_layer, count=count))
        write_manifest(folder, dataclasses.replace(manifest, certificates=tuple(certificates)))
        return move(folder, target)


def _begin_calibration(bundle: Path) -> Calibration:
    """Return a calibration that keeps what it sees beside the folder of the new bundle, until the export ends."""
    folder = bundle.with_name("calibration")
    folder.mkdir()
    return Calibration(folder)


def _make_graph(checkpoint: Checkpoint, token_rewards: bool) -> ir.Model:
    head, config = checkpoint.head(), checkpoint.source.config
    backbone = meta_backbone(config, attention_name(config, checkpoint.spec.causal), EXPERTS)
    model = trace(backbone, head, every_token=token_rewards)
    weights = {f"backbone.{name}": source.read for name, source in checkpoint.backbone.sources.items()}
    return lower(model, weights | {f"head.{name}": read for name, read in head.sources.items()})


def _write_text_files(checkpoint: Checkpoint, folder: Path) -> None:
    assert checkpoint.source.trained is not None
    # Not the library's save(): on a full disk its error is no OSError and does not name the file.
    (folder / TOKENIZER).write_text(checkpoint.source.trained.backend.to_str(pretty=True), encoding="utf-8")
    if checkpoint.source.chat_template is not None:
        (folder / CHAT_TEMPLATE).write_text(checkpoint.source.chat_template, encoding="utf-8")


def _make_manifest(checkpoint: Checkpoint, variants: Sequence[Variant], folder: Path, certified: bool) -> Manifest:
    """Return the manifest for the files in the folder, without certificates."""
    names = [
        # Each name once, because two graphs may share one file of weights.
        *dict.fromkeys(name for variant in variants for name in (variant.graph, *variant.data)),
        TOKENIZER,
        *([GOLDEN] if certified else []),
        *([CHAT_TEMPLATE] if checkpoint.source.chat_template is not None else []),
    ]
    return Manifest(
        format_version=FORMAT_VERSION,
        spec=checkpoint.spec,
        variants=tuple(variants),
        files=tuple(record_file(folder, name) for name in names),
        provenance=_provenance(checkpoint),
        certificates=(),
        uncertified=not certified,
    )


def _provenance(checkpoint: Checkpoint) -> Provenance:
    adapter, name = checkpoint.source.adapter, hub.name_of(checkpoint.source.folder)
    return Provenance(
        checkpoint=name if adapter is None else f"{name} on {hub.name_of(adapter.base)}",
        architecture=checkpoint.source.architecture,
        parameters=checkpoint.source.parameters,
        stored_dtypes=tuple(
            sorted({str(tensor.dtype).removeprefix("torch.") for tensor in checkpoint.source.stored.values()})
        ),
        versions={"rewardrt": rewardrt.__version__} | {name: importlib.metadata.version(name) for name in VERSIONED},
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        choices=checkpoint.source.choices,
    )
