"""A checkpoint by its name: a local folder, or a repository on the Hub, of which only the needed files are downloaded.

Which files are needed is decided by the rules for folders, applied to the repository's list of files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from rewardrt.bundle import hub
from rewardrt.bundle.manifest import MANIFEST
from rewardrt.errors import CheckpointError, HubError
from rewardrt.steps import Progress, Step, silent
from rewardrt_export.places import find_repository
from rewardrt_export.source.adapter_config import ADAPTER_CONFIG
from rewardrt_export.source.adapters import ADAPTER_FILES
from rewardrt_export.source.chat_template import FOLDER, JINJA, PROCESSOR_FILES
from rewardrt_export.source.config import CONFIG_FILE
from rewardrt_export.source.folder import FILES_BESIDE_ADAPTERS, VALUE_HEAD_FILES
from rewardrt_export.source.text_files import LOGIT_SCORE, read_json
from rewardrt_export.source.tokenizer_files import SETTINGS, VOCABULARIES
from rewardrt_export.source.weights import (
    BIN_FILE,
    BIN_INDEX,
    HEAD_LAYER_FILES,
    SAFETENSORS_FILE,
    SAFETENSORS_INDEX,
    shorten,
)

_TEXT = (CONFIG_FILE, ADAPTER_CONFIG, *SETTINGS, *VOCABULARIES, JINJA, *PROCESSOR_FILES)
_BELOW = (f"{FOLDER}/*.jinja", LOGIT_SCORE)  # in subfolders of the checkpoint


def find_checkpoint(name: str | Path, progress: Progress = silent) -> Path:
    """Return the folder of a checkpoint: the local one, or the one to which `ORG/NAME[@REVISION]` was downloaded.

    Raises CheckpointError, HubError, or MissingExtraError.
    """
    repository = find_repository(name)
    return Path(name) if repository is None else _download(repository, progress)


def wanted_files(files: Collection[str]) -> list[str]:
    """Return the files of a repository that an export reads, except the shards that an index lists.

    These are config, tokenizer, templates, and the weights: safetensors, or else files written by `torch.save`. Code is
    never read.
    """
    wanted = [name for name in files if "/" not in name and any(fnmatchcase(name, each) for each in _TEXT)]
    wanted += [name for name in files if any(fnmatchcase(name, each) for each in _BELOW)]
    if ADAPTER_CONFIG in files:
        return wanted + _first(ADAPTER_FILES, files) + _first(FILES_BESIDE_ADAPTERS, files)
    wanted += _first((SAFETENSORS_INDEX, SAFETENSORS_FILE, BIN_INDEX, BIN_FILE), files)
    return wanted + _first(VALUE_HEAD_FILES, files) + [name for name in HEAD_LAYER_FILES if name in files]


def _first(names: Iterable[str], files: Collection[str]) -> list[str]:
    return [name for name in names if name in files][:1]


def _download(asked: hub.Repository, progress: Progress) -> Path:
    repository, files = hub.list_files(asked)
    wanted = wanted_files(files)
    _check_listing(repository, files, wanted)
    for index in (name for name in wanted if name in (SAFETENSORS_INDEX, BIN_INDEX)):
        shards = read_json(_fetch(repository, index)).get("weight_map")
        named = set(map(str, shards.values())) if isinstance(shards, dict) else set()
        wanted = [*wanted, *sorted(name for name in named if name in files and "/" not in name)]
    wanted = list(dict.fromkeys(wanted))
    size = sum(files[name] for name in wanted)
    progress(Step(f"downloading {repository} or taking it from the cache ({len(wanted)} files, {size / 1e6:,.1f} MB)"))
    found = {name: _fetch(repository, name) for name in wanted}
    name, path = found.popitem()
    return path.parents[name.count("/")]


def _fetch(repository: hub.Repository, name: str) -> Path:
    found = hub.fetch(repository, name)
    if found is None:
        raise HubError(f"{repository}: lists {name} and does not have it; try again later")
    return found


def _check_listing(repository: hub.Repository, files: Collection[str], wanted: Collection[str]) -> None:
    if MANIFEST in files:
        raise CheckpointError(f"{repository}: is a bundle already; score with it: rewardrt score {repository}")
    weights = (SAFETENSORS_INDEX, SAFETENSORS_FILE, BIN_INDEX, BIN_FILE, *ADAPTER_FILES)
    if not any(name in weights for name in wanted):
        found = sorted(name for name in files if not name.startswith("."))
        raise CheckpointError(
            f"{repository}: no weights that an export reads; expected {SAFETENSORS_FILE} or {BIN_FILE}, or an "
            f"adapter's, found {shorten(found, 5) or 'nothing'}"
        )
