"""Which bundle a model was loaded from and how, so that it can be opened again elsewhere; and which of its graphs."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from rewardrt.bundle.manifest import Bundle, Manifest, Variant, read_bundle
from rewardrt.bundle.spec import to_json
from rewardrt.errors import BundleError, ProviderError
from rewardrt.machine.processor import read_processor
from rewardrt.machine.providers import Provider, ProviderChoice


@dataclass(frozen=True)
class LoadOptions:
    """The options of `RewardModel.load`, which says what they mean."""

    provider: ProviderChoice = "auto"
    precision: str = "auto"
    threads: int | None = None
    batch_tokens: int | None = None
    padding: bool | None = None
    prefix_reuse: bool = True
    prefix_cache_mb: int = 0
    check_hashes: bool = True


@dataclass(frozen=True)
class Opening:
    """How a model was loaded: by which it is loaded again in a process that it was sent to, or that was forked.

    `path` is absolute, `manifest` the digest of what the bundle's manifest says.
    """

    path: str
    manifest: str
    options: LoadOptions

    @classmethod
    def of(cls, bundle: Bundle, options: LoadOptions) -> Opening:
        """Return how a bundle that was just read is opened again."""
        return cls(os.path.abspath(bundle.path), _digest(bundle.manifest), options)

    def read(self) -> Bundle:
        """Read the bundle again; raises BundleError if it is gone, or is another one now."""
        try:
            bundle = read_bundle(Path(self.path), check_hashes=self.options.check_hashes)
        except BundleError as error:
            raise BundleError(f"the bundle of a loaded model cannot be opened again: {error}") from error
        if _digest(bundle.manifest) != self.manifest:
            raise BundleError(
                f"{self.path}: holds another bundle than when the model was loaded; load the model from it anew"
            )
        return bundle


def choose_variant(bundle: Bundle, precision: str, provider: Provider) -> Variant:
    """Return the graph to load on a provider; one that was made for some processors is for no other.

    Raises BundleError or ProviderError.
    """
    variant = bundle.variant(precision, provider)
    if not variant.runs_on("cpu", read_processor().instruction_sets or ()):
        raise BundleError(
            f"{bundle.path}: the {variant.precision} graph needs a CPU with {' or '.join(variant.needs)}; "
            "score with another precision"
        )
    if variant.needs and provider != "cpu":
        raise ProviderError(f"{bundle.path}: the {variant.precision} graph is for CPUs; score with the provider 'cpu'")
    return variant


def _digest(manifest: Manifest) -> str:
    """Return the SHA-256 of what a manifest says; it names the SHA-256 of every file."""
    return hashlib.sha256(json.dumps(to_json(manifest), sort_keys=True).encode()).hexdigest()
