"""Measure mean and std of a model's rewards on your own data, and write a bundle that normalises by them."""

from __future__ import annotations

import datetime
import os
import secrets
import shutil
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

import numpy as np

from rewardrt.bundle.manifest import FORMAT_VERSION, Bundle, read_bundle, write_manifest
from rewardrt.bundle.opening import with_graphs
from rewardrt.bundle.reference_data import ReferenceData
from rewardrt.bundle.spec import Affine
from rewardrt.data.files import Summary, score_file
from rewardrt.data.lines import Line
from rewardrt.data.readers import RowReader
from rewardrt.errors import BundleError, RewardRTError
from rewardrt.evaluate.sources import sha256_of
from rewardrt.reward_model import RewardModel
from rewardrt.scoring.scored import ScoredRow

LEAST = 2  # fewest rewards that have a standard deviation


@dataclass(frozen=True)
class Measured:
    """What was measured: the normalisation, the data, and the rows that failed."""

    affine: Affine
    data: ReferenceData
    failed: int
    first_error: str


def measure(model: RewardModel, reader: RowReader, progress: Callable[[Summary], None] | None = None) -> Measured:
    """Return mean and standard deviation of the raw rewards of all texts of the rows, or of all steps.

    The standard deviation divides by n - 1, as torch's `std` does, which OpenRLHF uses for its own. Rows that cannot be
    scored are left out. Raises RewardRTError if there are fewer than two rewards, or if all are equal.
    """
    check(model)
    rewards, cut = array("d"), array("q")

    def collect(lines: Sequence[Line], results: Sequence[ScoredRow | RewardRTError], summary: Summary) -> list[bytes]:
        for line, result in zip(lines, results, strict=True):
            summary.count(line, result)
            if isinstance(result, RewardRTError):
                errors.append(str(result)) if not errors else None
                continue
            for answer in result.answers:
                rewards.extend(answer.steps or (answer.reward,))
                cut.append(answer.truncated > 0)
        return []

    errors: list[str] = []
    summary = score_file(
        model.answers.prepare,
        lambda ready: model.score_prepared(ready, normalize=False),
        reader.lines(),
        lambda data: None,
        encode=collect,
        progress=progress,
    )
    values, names = np.array(rewards, dtype=np.float64), ", ".join(file.name for file in reader.files)
    if len(values) < LEAST:
        raise RewardRTError(f"{names}: {len(values)} rewards; expected at least {LEAST} to measure mean and std")
    mean, std = float(values.mean()), float(values.std(ddof=1))
    if not std > 0:
        raise RewardRTError(f"{names}: all {len(values)} rewards are {mean:g}; a std of 0 normalises nothing")
    data = ReferenceData(
        files={PurePath(file.name).name: sha256_of(file) for file in reader.files},
        rows=summary.scored,
        texts=len(values),
        truncated=int(sum(cut)),
        precision=model.precision,
        provider=model.provider,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    return Measured(Affine(mean, std), data, summary.failed, errors[0] if errors else "")


def check(model: RewardModel) -> None:
    """Raise RewardRTError for a model whose rewards depend on the other answers in the row."""
    if model.spec.input == "pairwise":
        raise RewardRTError(
            f"{model.bundle.name}: compares answers; a reward is of a group of answers, and has no mean and std of data"
        )


def write_normalised(bundle: Bundle, measured: Measured, target: Path) -> tuple[Bundle, bool]:
    """Write a copy of a bundle with this normalisation; return it, and whether its files are hard links.

    Files are hard links to those of the other bundle if the disk supports them, else copies. The folder gets its name
    when everything is there. Raises BundleError.
    """
    if target.exists() or target.is_symlink():
        raise BundleError(f"{target}: exists already; choose another folder")
    bundle = with_graphs(bundle, bundle.manifest.variants)  # of a Hub bundle only one graph was downloaded
    manifest = replace(
        bundle.manifest,
        format_version=FORMAT_VERSION,
        spec=replace(bundle.manifest.spec, normalise=measured.affine),
        normalised_on=measured.data,
    )
    folder, linked = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part"), True
    try:
        folder.mkdir(parents=True)
        for record in manifest.files:
            place = folder / record.path
            place.parent.mkdir(parents=True, exist_ok=True)
            linked &= _share((bundle.path / record.path).resolve(), place)
        write_manifest(folder, manifest)
        folder.rename(target)
    except OSError as error:
        raise BundleError(f"{target}: cannot be written ({error.strerror}); nothing was left behind") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return read_bundle(target, check_hashes=not linked), linked


def _share(source: Path, place: Path) -> bool:
    with suppress(OSError):  # another disk, a file system without hard links, or too many links
        os.link(source, place)
        return True
    shutil.copyfile(source, place)
    return False
