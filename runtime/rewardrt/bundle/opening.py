"""Open a bundle by its name, a folder or `hf://ORG/NAME`; choose its graph; open the same bundle again elsewhere.

Every file of a folder is checked before any is used. For a bundle on the Hub the manifest is downloaded first. It
determines which graph suits this machine; that graph's files and those of the tokenizer are then downloaded and
checked. So no file is used that was not compared with the manifest, and no other graph is downloaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rewardrt.bundle import hub
from rewardrt.bundle.manifest import MANIFEST, Bundle, Manifest, Variant, check_files, read_bundle, read_manifest
from rewardrt.bundle.precisions import PRECISIONS, in_words
from rewardrt.bundle.spec import to_json
from rewardrt.errors import BundleError, HubError, ProviderError
from rewardrt.machine.processor import read_processor
from rewardrt.machine.providers import Provider, ProviderChoice


@dataclass(frozen=True)
class LoadOptions:
    """The options of `RewardModel.load`, which explains them."""

    provider: ProviderChoice = "auto"
    precision: str = "auto"
    threads: int | None = None
    batch_tokens: int | None = None
    padding: bool | None = None
    prefix_reuse: bool = True
    prefix_cache_mb: int = 0
    check_hashes: bool = True
    share_weights: bool = False


@dataclass(frozen=True)
class Opening:
    """How a model was loaded, in order to load it again in a forked process or one that it was sent to.

    `address` is an absolute path or `hf://ORG/NAME@COMMIT`; `manifest` is the SHA-256 of the manifest's contents. Once
    there is a session, `options.precision` is the precision that was chosen.
    """

    address: str
    manifest: str
    options: LoadOptions

    @classmethod
    def of(cls, bundle: Bundle, options: LoadOptions) -> Opening:
        """Return how to open a bundle again that was just read."""
        return cls(bundle.address, _digest(bundle.manifest), options)

    def read(self) -> Bundle:
        """Open the bundle again, with its graph. Raises BundleError or HubError if it is gone or has changed."""
        try:
            bundle = open_bundle(self.address, check_hashes=self.options.check_hashes)
            if _digest(bundle.manifest) == self.manifest:
                return with_graphs(bundle, [bundle.variant(self.options.precision)])
        except (BundleError, HubError) as error:
            raise type(error)(f"the bundle of a loaded model cannot be opened again: {error}") from error
        raise BundleError(
            f"{self.address}: holds another bundle than when the model was loaded; load the model from it anew"
        )


def open_bundle(name: str | Path, *, check_hashes: bool = True) -> Bundle:
    """Read and check the bundle in a folder; of `hf://ORG/NAME[@REVISION]` read only the manifest (see `with_graphs`).

    Raises BundleError, HubError, or MissingExtraError.
    """
    address, folder = locate(name)
    if not address.startswith(hub.PREFIX):
        return read_bundle(name, check_hashes=check_hashes)
    if not check_hashes:
        raise BundleError(f"{address}: check_hashes=False is for folders; what was downloaded is always checked")
    bundle = Bundle(folder, read_manifest(folder), address)
    return replace(bundle, absent=frozenset(bundle.listed))


def locate(name: str | Path) -> tuple[str, Path]:
    """Return the name that opens a bundle again, `hf://ORG/NAME@COMMIT` or the path as given, and the bundle's folder.

    For a bundle on the Hub this downloads the manifest. Raises HubError, or BundleError if it is not a bundle.
    """
    repository = hub.parse(name)
    if repository is None:
        return str(name), Path(name)
    found = hub.fetch(repository, MANIFEST)
    if found is None:
        raise BundleError(f"{repository}: is no bundle (it has no {MANIFEST}){_what_else(repository)}")
    return str(repository.at(found.parent.name)), found.parent


def with_graphs(bundle: Bundle, variants: Sequence[Variant]) -> Bundle:
    """Return the bundle with the files of these graphs and of the tokenizer, downloaded and checked if necessary.

    Raises BundleError or HubError.
    """
    missing = [name for name in bundle.needed_files(variants) if name in bundle.absent]
    repository = hub.parse(bundle.source)
    if not missing or repository is None:
        return bundle
    for name in missing:
        if hub.fetch(repository, name) is None:
            raise BundleError(
                f"{repository}: has no {name}, which its {MANIFEST} lists; its owner has to push it again"
            )
    check_files(bundle, missing)
    return replace(bundle, absent=bundle.absent.difference(missing))


def _what_else(repository: hub.Repository) -> str:
    """Say how to make a bundle if the repository contains a checkpoint instead; otherwise return ""."""
    for name in ("config.json", "adapter_config.json"):
        if hub.fetch(repository, name) is not None:
            named = str(repository).removeprefix(hub.PREFIX)
            return f", but a checkpoint; export it: rewardrt export {named} BUNDLE"
    return ""


def choose_variant(bundle: Bundle, precision: str, provider: Provider) -> Variant:
    """Return the graph to load on a provider. A graph that needs certain CPUs is refused everywhere else.

    Raises BundleError or ProviderError.
    """
    variant = bundle.variant(precision, provider)
    if not variant.runs_on("cpu", read_processor().instruction_sets or ()):
        raise BundleError(
            f"{bundle.name}: the {variant.precision} graph needs a CPU with {' or '.join(variant.needs)}; "
            "score with another precision"
        )
    if variant.needs and provider != "cpu":
        raise ProviderError(f"{bundle.name}: the {variant.precision} graph is for CPUs; score with the provider 'cpu'")
    return variant


def check_shareable(bundle: Bundle, variant: Variant, provider: Provider) -> None:
    """Raise BundleError if a graph's weights cannot be used directly from the mapped file."""
    known = PRECISIONS.get(variant.precision)
    if provider != "cpu" or known is None or not known.shareable:
        kinds = in_words([each.name for each in PRECISIONS.values() if each.shareable])
        found = f"the {variant.precision} graph on {provider}"
        raise BundleError(f"{bundle.name}: share_weights is for an {kinds} graph on a CPU; this is {found}")


def _digest(manifest: Manifest) -> str:
    """Return the SHA-256 of a manifest's contents, which include the SHA-256 of every file."""
    return hashlib.sha256(json.dumps(to_json(manifest), sort_keys=True).encode()).hexdigest()
