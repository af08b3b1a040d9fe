"""The Hugging Face Hub: repositories by name, and their files in huggingface_hub's cache.

huggingface_hub has its own rules for the token (HF_TOKEN, `hf auth login`), the address (HF_ENDPOINT), the cache
(HF_HOME), offline use (HF_HUB_OFFLINE) and progress bars; all of them hold. What it raises becomes one line here that
says what to do. This module knows repositories and files, and neither bundles nor checkpoints.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rewardrt.errors import HubError, MissingExtraError, RewardRTError

PREFIX = "hf://"
OLDEST = (0, 27)  # of huggingface_hub
COMMIT = re.compile(r"[0-9a-f]{40}")
README = "README.md"
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(rf"({_PART}/{_PART})(?:@(.+))?")
_REVISION = re.compile(r"(?!/|.*(?:\.\.|//|@\{|/$|\.$))[^\x00-\x20\x7f~^:?*\[\\]+")  # what git takes for a name
# The libraries below huggingface_hub: requests before 1.0, httpx from then on, httpx2 from 2.0 on.
_NETWORK = ("requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2", "ssl", "socket")


@dataclass(frozen=True)
class Repository:
    """A repository of models on the Hub, and one of its revisions: a branch, a tag or a commit; "" is main."""

    name: str  # ORG/NAME
    revision: str = ""

    def __str__(self) -> str:
        return f"{PREFIX}{self.name}{f'@{self.revision}' if self.revision else ''}"

    def at(self, commit: str) -> Repository:
        """Return the same repository at a commit, which never changes."""
        return replace(self, revision=commit)


def parse(name: str | Path) -> Repository | None:
    """Return the repository that `hf://ORG/NAME` or `hf://ORG/NAME@REVISION` names; None for what is a path.

    A `Path` of such a name, which has one slash less, names it too. Raises HubError for a malformed name.
    """
    text = name if isinstance(name, str) else re.sub("^hf:/(?!/)", PREFIX, name.as_posix())
    if not text.startswith(PREFIX):
        return None
    found = named(text.removeprefix(PREFIX))
    if found is None:
        raise HubError(
            f"{text}: expected {PREFIX}ORG/NAME or {PREFIX}ORG/NAME@REVISION, as in the address of a model's page"
        )
    return found


def named(text: str) -> Repository | None:
    """Return the repository that `ORG/NAME` or `ORG/NAME@REVISION` names, or None for what cannot be such a name."""
    found = _NAME.fullmatch(text)
    if found is None or ".." in found[1] or "--" in found[1] or (found[2] and not _REVISION.fullmatch(found[2])):
        return None
    return Repository(found[1], found[2] or "")


def cached_repository(folder: Path) -> Repository | None:
    """Return the repository and commit that a folder of huggingface_hub's cache holds, as its path says."""
    repository, snapshots, commit = ("", "", "", *folder.resolve().parts)[-3:]
    kind, _, name = repository.partition("--")
    if kind != "models" or snapshots != "snapshots" or not COMMIT.fullmatch(commit):
        return None
    return named(f"{name.replace('--', '/')}@{commit}")


def name_of(folder: Path) -> str:
    """Return what a folder is called on other machines: its name, or `ORG/NAME@COMMIT` of one of the Hub's cache."""
    repository = cached_repository(folder)
    return folder.resolve().name if repository is None else str(repository).removeprefix(PREFIX)


def fetch(repository: Repository, file: str) -> Path | None:
    """Return the path of a file in the cache, downloaded if it is not there; None where the repository has none.

    It lies in the folder of the commit. A revision that is a commit asks nothing of the Hub for a file that is in the
    cache; another one falls back to what the cache has for it where the Hub cannot be reached. Raises HubError, or
    MissingExtraError.
    """
    hub = _library()
    with _explained(repository):
        try:
            return Path(hub.hf_hub_download(repository.name, file, revision=repository.revision or None))
        except hub.errors.LocalEntryNotFoundError:
            raise
        except hub.errors.EntryNotFoundError:
            return None


def list_files(repository: Repository) -> tuple[Repository, dict[str, int]]:
    """Return the repository at the commit of its revision, and its files there by name, with their sizes in bytes."""
    hub = _library()
    with _explained(repository):
        info = hub.HfApi().model_info(repository.name, revision=repository.revision or None, files_metadata=True)
        files = {each.rfilename: each.size or 0 for each in info.siblings or ()}
    return repository.at(str(info.sha)), files


def upload(
    repository: Repository,
    files: Mapping[str, Path | bytes],
    hashes: Mapping[str, str],
    *,
    private: bool,
    message: str,
    new_card: bool,
) -> tuple[str, Repository]:
    """Put files into a repository in one commit; return the address of its page, and the repository at that commit.

    The repository, and the branch that `revision` names, are made if they are not there. A README.md stays as it is
    where there is one, unless `new_card`. `hashes` are the SHA-256 that files must have. Raises HubError.
    """
    hub = _library()
    api, branch = hub.HfApi(), repository.revision or None
    with _explained(repository), _quiet():
        api.create_repo(repository.name, private=private or None, exist_ok=True)
        if private and not api.model_info(repository.name).private:
            raise HubError(
                f"{repository}: is there already and is public, so nothing was uploaded; make it private in its "
                "settings, or leave out --private"
            )
        if branch is not None:
            api.create_branch(repository.name, branch=branch, exist_ok=True)
        if not new_card and api.file_exists(repository.name, README, revision=branch):
            files = {name: file for name, file in files.items() if name != README}
        added = [hub.CommitOperationAdd(name, file) for name, file in files.items()]
        for each in added:
            if hashes.get(each.path_in_repo, found := each.upload_info.sha256.hex()) != found:
                raise HubError(f"{each.path_in_repo}: changed while it was read; push the bundle again")
        info = api.create_commit(repository.name, added, commit_message=message, revision=branch)
        return f"{api.endpoint}/{repository.name}", repository.at(str(info.oid))


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors  # not there before 0.22
    except ImportError as error:
        raise MissingExtraError(f"the Hub needs huggingface_hub ({error}): pip install -U 'rewardrt[hub]'") from error
    found = huggingface_hub.__version__
    if tuple(map(int, found.split(".")[:2])) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise MissingExtraError(
            f"the Hub needs huggingface_hub {wanted} or later, found {found}: pip install -U 'rewardrt[hub]'"
        )
    return huggingface_hub


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep bars of uploads out of logs, as those of downloads keep themselves, and warnings about cards."""
    utils = _library().utils
    hidden = not sys.stderr.isatty() and not utils.are_progress_bars_disabled()
    if hidden:
        utils.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="huggingface_hub")
            yield
    finally:
        if hidden:
            utils.enable_progress_bars()


@contextmanager
def _explained(repository: Repository) -> Iterator[None]:
    """Make one line of ours of what huggingface_hub raises."""
    try:
        yield
    except RewardRTError:
        raise
    except Exception as error:  # its own kinds, and those of the libraries below it, which differ by version
        raise HubError(f"{repository}: {_reason(repository, error)}") from error


def _reason(repository: Repository, error: Exception) -> str:
    hub = _library()
    errors, host = hub.errors, hub.constants.ENDPOINT
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # why the Hub could not be asked: "not in the cache" alone says little
    has_token = hub.get_token() is not None
    log_in = "set HF_TOKEN, or run `hf auth login`"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return (
            f"not all of it is in the cache ({hub.constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE forbids to ask for it; "
            "unset HF_HUB_OFFLINE"
        )
    if isinstance(error, errors.GatedRepoError):
        return f"gated: accept its terms at {host}/{repository.name} first, then {log_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no revision {repository.revision or 'main'!r}; expected a branch, a tag or a commit"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"needs a token: {log_in}"
    if isinstance(error, errors.HFValidationError):
        return f"no name of a repository ({_first_line(error)})"
    if isinstance(error, errors.FileMetadataError):
        return f"{host} does not answer as a Hub does; check HF_ENDPOINT and the proxy"
    if isinstance(error, errors.RepositoryNotFoundError):
        why = "your token may not read it" if has_token else f"it is private: {log_in}"
        return f"no such repository at {host}, or {why}"
    if isinstance(error, errors.HfHubHTTPError):
        return _refusal(error, host, log_in, has_token)
    own = type(error).__module__.partition(".")[0]
    broken = isinstance(error, ConnectionError | TimeoutError) or own in _NETWORK
    if broken or "Xet" in type(error).__name__ or "Consistency check" in str(error):
        return (
            f"the connection to {host} failed ({_innermost(error)}); check network, proxy and HF_ENDPOINT, then run "
            "the same again: files that came whole are kept"
        )
    if isinstance(error, OSError) and error.strerror:
        return (
            f"cannot be kept in {hub.constants.HF_HUB_CACHE} ({error.strerror}); make room there, or name another "
            "folder by HF_HOME"
        )
    return f"huggingface_hub failed ({type(error).__name__}: {_first_line(error)})"


def _refusal(error: Any, host: str, log_in: str, has_token: bool) -> str:
    """Say what a status of HTTP means that huggingface_hub has no class for."""
    status = error.response.status_code if error.response is not None else 0
    said = f" ({_first_line(error.server_message)})" if getattr(error, "server_message", None) else ""
    if status == 401 and not has_token:
        return f"{host} asks for a token: {log_in}"
    if status == 401:
        return f"{host} does not know the token; {log_in}"
    if status == 403:
        return f"{host} does not allow it with this token{said}; take one that may, of an account that may"
    if status == 429:
        return f"{host} has had too many requests{said}; wait, and {log_in}"
    if status >= 500:
        return f"{host} has a fault of its own (HTTP {status}); try again later"
    return f"{host} refuses (HTTP {status}){said or f' ({_first_line(error)})'}"


def _innermost(error: BaseException) -> str:
    """Return what the system said, below the libraries' own words, which hold addresses."""
    while (below := error.__cause__ or error.__context__) is not None:
        error = below
    return _first_line(error)


def _first_line(said: object) -> str:
    text = " ".join(str(said).split())
    return text[:200] if text else type(said).__name__
