"""The Hugging Face Hub: repositories by name, and their files in huggingface_hub's cache.

huggingface_hub's own settings apply: the token (HF_TOKEN, `hf auth login`), the address (HF_ENDPOINT), the cache
(HF_HOME), offline use (HF_HUB_OFFLINE) and progress bars. Its exceptions are turned into a HubError of one line that
says what to do. This module knows repositories and files; it knows neither bundles nor checkpoints.
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
_REVISION = re.compile(r"(?!/|.*(?:\.\.|//|@\{|/$|\.$))[^\x00-\x20\x7f~^:?*\[\\]+")  # a valid git reference name
# The network libraries that huggingface_hub uses: requests before 1.0, then httpx, and httpx2 from 2.0 on.
_NETWORK = ("requests", "urllib3", "httpx", "httpx2", "httpcore", "httpcore2", "ssl", "socket")


@dataclass(frozen=True)
class Repository:
    """A model repository on the Hub at one revision: a branch, a tag or a commit; "" means the main branch."""

    name: str  # ORG/NAME
    revision: str = ""

    def __str__(self) -> str:
        return f"{PREFIX}{self.name}{f'@{self.revision}' if self.revision else ''}"

    def at(self, commit: str) -> Repository:
        """Return the same repository at a commit, whose files never change."""
        return replace(self, revision=commit)


def parse(name: str | Path) -> Repository | None:
    """Return the repository named by `hf://ORG/NAME` or `hf://ORG/NAME@REVISION`, or None if `name` is a path.

    A `Path` made from such a name, which has lost one slash, is accepted too. Raises HubError for a malformed name.
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
    """Return the repository named by `ORG/NAME` or `ORG/NAME@REVISION`, or None if `text` is not such a name."""
    found = _NAME.fullmatch(text)
    if found is None or ".." in found[1] or "--" in found[1] or (found[2] and not _REVISION.fullmatch(found[2])):
        return None
    return Repository(found[1], found[2] or "")


def cached_repository(folder: Path) -> Repository | None:
    """Return the repository and commit of a folder in huggingface_hub's cache, read off its path, or None."""
    repository, snapshots, commit = ("", "", "", *folder.resolve().parts)[-3:]
    kind, _, name = repository.partition("--")
    if kind != "models" or snapshots != "snapshots" or not COMMIT.fullmatch(commit):
        return None
    return named(f"{name.replace('--', '/')}@{commit}")


def name_of(folder: Path) -> str:
    """Return a folder's name without paths of this machine: `ORG/NAME@COMMIT` in the Hub's cache, else its own name."""
    repository = cached_repository(folder)
    return folder.resolve().name if repository is None else str(repository).removeprefix(PREFIX)


def fetch(repository: Repository, file: str) -> Path | None:
    """Return the cached path of a file, downloading it if needed; None if the repository has no such file.

    The path lies in the cache's folder of the commit. If the revision is a commit and the file is cached, the Hub is
    not contacted. For a branch or tag, the cached version is used when the Hub cannot be reached. Raises HubError or
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
    """Return the repository at the commit of its revision, and the sizes of its files in bytes by name.

    Raises HubError or MissingExtraError.
    """
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
    """Upload files to a repository in one commit; return the address of its page, and the repository at that commit.

    Creates the repository and the branch named by `revision` if they do not exist. Keeps an existing README.md unless
    `new_card` is set. `hashes` are the SHA-256 values that the files must have, in hex by name. Raises HubError or
    MissingExtraError.
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
    """Hide progress bars of uploads unless stderr is a terminal, as downloads do; hide warnings about model cards."""
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
    """Turn what huggingface_hub raises into a HubError of one line."""
    try:
        yield
    except RewardRTError:
        raise
    except Exception as error:  # its own exceptions, and those of its network libraries, which differ by version
        raise HubError(f"{repository}: {_reason(repository, error)}") from error


def _reason(repository: Repository, error: Exception) -> str:
    hub = _library()
    errors, host = hub.errors, hub.constants.ENDPOINT
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the reason why the Hub was not reached says more than "not in the cache"
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
    """Say what an HTTP status means that huggingface_hub has no exception class for."""
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
    """Return the innermost cause's message, such as the operating system's; the libraries' own contain addresses."""
    while (below := error.__cause__ or error.__context__) is not None:
        error = below
    return _first_line(error)


def _first_line(said: object) -> str:
    text = " ".join(str(said).split())
    return text[:200] if text else type(said).__name__
