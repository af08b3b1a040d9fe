"""Export, start to end: one screen that says what happens to a checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import onnx_ir as ir

import rewardrt
from rewardrt.bundle import hub
from rewardrt.bundle.manifest import (
    CHAT_TEMPLATE,
    FORMAT_VERSION,
    GOLDEN,
    MANIFEST,
    TOKENIZER,
    Bundle,
    Manifest,
    Provenance,
    Variant,
    read_bundle,
    record_file,
    write_manifest,
)
from rewardrt.bundle.precisions import PRECISIONS
from rewardrt.bundle.spec import PoolingRule
from rewardrt.checks.verify import write_golden
from rewardrt.errors import ExportError
from rewardrt.graph.shapes import Profile
from rewardrt_export.certificate.certify import GoldenSet, certify, measure_fidelity, score_golden
from rewardrt_export.certificate.encode import encode_probes, encode_texts
from rewardrt_export.certificate.memory import check_memory
from rewardrt_export.certificate.reference import score_with_torch, spread
from rewardrt_export.checkpoint import Checkpoint, read_checkpoint
from rewardrt_export.model.backbone import meta_backbone
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

Progress = Callable[[str], None]
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS)
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
    progress: Progress = lambda stage: None,
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
    nothing, except the texts of `calibrate`: the bundle has no golden texts and says that it is uncertified. Where the
    torch model in float32 does not fit in memory, it scores layer by layer, fewer texts, and int8 is not calibrated.

    Raises a RewardRTError and leaves nothing behind when anything fails. An existing `target` is replaced only with
    `force`, and only once the new bundle is whole.
    """
    precisions = chosen_precisions(precisions)
    calibrated = any(PRECISIONS[name].calibrated for name in precisions)
    if golden is not None and not certified:
        raise ExportError("golden texts are to certify on, and this export is not to be certified; leave one out")
    target = Path(target)
    with contextlib.suppress(OSError):  # a name that the file system does not take: said when it is made
        _check_target(target, force)  # before anything is downloaded
    folder = find_checkpoint(source, progress)
    below = find_checkpoint(base, progress) if base is not None else None
    progress("reading the checkpoint")
    checkpoint = read_checkpoint(
        folder,
        base=below,
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
        progress(f"{name}: {choice}")
    own_texts = calibrated and calibrate is not None
    by_layer = (certified or own_texts) and not check_memory(
        checkpoint, precisions if certified else (), calibrates=own_texts
    )
    with _workplace(target, force) as folder:
        progress(f"tracing {checkpoint.source.architecture} ({checkpoint.spec.backbone})")
        graph = _make_graph(checkpoint, token_rewards)
        _write_text_files(checkpoint, folder)
        calibration = Calibration() if calibrated and (certified or own_texts) and not by_layer else None
        golden_set = GoldenSet()
        if certified:
            progress(f"scoring the golden texts with torch{', layer by layer' if by_layer else ''}")
            golden_set = score_golden(checkpoint, folder, golden, None if own_texts else calibration, by_layer=by_layer)
            if calibration is not None:
                calibration.reward_std = golden_set.reward_std
        else:
            # Compares template and tokenizer with transformers' all the same.
            encode_texts(checkpoint, folder, None)
            encode_probes(checkpoint, folder, ())
        if calibration is not None and own_texts:
            progress(f"calibrating on {calibrate}")
            seen = [cut(text) for text in encode_texts(checkpoint, folder, calibrate)[1]]
            every = -(-sum(text.needed for text in seen) // KEPT_TOKENS)  # of so many texts, one: no more are kept
            seen_rewards = score_with_torch(checkpoint, seen[::every], calibration=calibration)
            calibration.reward_std = spread(seen_rewards)
        variants = write_graphs(graph, precisions, calibration, folder, progress)
        variants = [build_engine(each, folder, Profile.of(checkpoint.spec.max_length), progress) for each in variants]
        if certified:
            # After the weights, whose reader says which of them are not finite.
            write_golden(folder / GOLDEN, golden_set.every)
        manifest = _make_manifest(checkpoint, variants, folder, certified)
        write_manifest(folder, manifest)
        certificates = []
        for precision in precisions if certified else ():
            progress(f"certifying the {precision} graph against torch")
            fidelity = None
            if PRECISIONS[precision].rounds:
                fidelity = measure_fidelity(checkpoint, folder, precision, golden_set, by_layer=by_layer)
            certificates.append(certify(checkpoint, folder, precision, fidelity, by_layer=by_layer))
        write_manifest(folder, dataclasses.replace(manifest, certificates=tuple(certificates)))
        return _move(folder, target)


def _make_graph(checkpoint: Checkpoint, token_rewards: bool) -> ir.Model:
    head, config = checkpoint.head(), checkpoint.source.config
    backbone = meta_backbone(config, attention_name(config, checkpoint.spec.causal), EXPERTS)
    model = trace(backbone, head, every_token=token_rewards)
    weights = {f"backbone.{name}": source.read for name, source in checkpoint.backbone.sources.items()}
    return lower(model, weights | {f"head.{name}": read for name, read in head.sources.items()})


def _write_text_files(checkpoint: Checkpoint, folder: Path) -> None:
    assert checkpoint.source.trained is not None
    # Not its own save(), which says of a full disk neither the file nor that it is an OSError.
    (folder / TOKENIZER).write_text(checkpoint.source.trained.backend.to_str(pretty=True), encoding="utf-8")
    if checkpoint.source.chat_template is not None:
        (folder / CHAT_TEMPLATE).write_text(checkpoint.source.chat_template, encoding="utf-8")


def _make_manifest(checkpoint: Checkpoint, variants: Sequence[Variant], folder: Path, certified: bool) -> Manifest:
    """Describe what is in the folder; the certificates are not there yet."""
    names = [
        # Each once: two graphs may read one file of weights.
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


@contextlib.contextmanager
def _workplace(target: Path, force: bool) -> Iterator[Path]:
    """Give a fresh folder beside the target, gone at the end unless it was moved into place."""
    try:
        _check_target(target, force)
    except OSError as error:  # a name that the file system does not take
        raise ExportError(f"{target}: cannot be written ({error.strerror})") from error
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ExportError(f"{target}: cannot be written ({error.strerror})") from error
    folder.chmod(0o777 & ~_umask())  # mkdtemp makes private folders; a bundle is to be read by others
    try:
        yield folder
    except OSError as error:
        raise ExportError(_say_os_error(error, target)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):  # not empty: the bundle is in it
                parent.rmdir()


def _check_target(target: Path, force: bool) -> None:
    if target.exists() or target.is_symlink():
        if not force:
            raise ExportError(f"{target}: exists already; choose another folder, or replace it with --force")
        if not (target / MANIFEST).is_file() and not (target.is_dir() and not any(target.iterdir())):
            raise ExportError(f"{target}: is not a bundle; --force replaces bundles only")


def _say_os_error(error: OSError, target: Path) -> str:
    """Say what the system refused; of a disk that is full, where."""
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in FULL or error.errno is None:  # numpy has no number for a write that was cut short
        return (
            f"{target}: cannot be written whole ({reason}); nothing was left behind: make room, or choose another disk"
        )
    return f"the export was stopped by the system: {reason}{f' ({error.filename})' if error.filename else ''}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _move(folder: Path, target: Path) -> Bundle:
    if target.exists():
        shutil.rmtree(target)
    folder.rename(target)
    return read_bundle(target, check_hashes=False)
