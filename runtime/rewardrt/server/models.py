"""The bundles of a server by the names that clients use, and how they are loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rewardrt.bundle.manifest import GOLDEN, MANIFEST, manifest_sha256
from rewardrt.bundle.opening import locate
from rewardrt.bundle.precisions import PRECISIONS
from rewardrt.checks.verify import read_golden
from rewardrt.errors import BundleError, InferenceError, RewardRTError
from rewardrt.machine.providers import ProviderChoice
from rewardrt.reward_model import RewardModel
from rewardrt.scoring.batching import BATCH_TOKENS
from rewardrt.server.engine import Engine, Turn
from rewardrt.server.options import ServerOptions
from rewardrt.server.problem import Problem


@dataclass
class Uses:
    """The number of requests that may still use the bundles of one period; counted only on the event loop."""

    count: int = 0


@dataclass(frozen=True)
class Served:
    """One loaded bundle and its engine; `sha256` is that of the loaded manifest, which covers all files."""

    name: str
    path: Path
    model: RewardModel
    engine: Engine
    options: ServerOptions
    sha256: str
    created: int  # time of loading, Unix time in seconds
    files: Mapping[Path, tuple[int, int, int]]  # inode, size and modification time of each file at loading

    @property
    def max_length(self) -> int:
        """How many tokens of a text are scored, unless a request says otherwise."""
        return min(self.model.spec.max_length, self.options.max_length or self.model.spec.max_length)

    @property
    def changed_on_disk(self) -> bool:
        """Whether the files on disk differ from what was loaded."""
        return any(_stamp(path) != stamp for path, stamp in self.files.items())

    def describe(self) -> dict[str, Any]:
        """Return the model's description for clients: what was loaded, and what really runs."""
        model, manifest = self.model, self.model.bundle.manifest
        certificate = manifest_certificate(model)
        return {
            "name": self.name,
            "sha256": self.sha256,
            "checkpoint": manifest.provenance.checkpoint,
            "parameters": manifest.provenance.parameters,
            "family": model.spec.family,
            "input": model.spec.input,
            "provider": model.provider,
            "precision": model.precision,
            "max_length": self.max_length,
            "objectives": list(model.spec.output.labels),
            "token_rewards": model.session.has_token_rewards,
            # The default instruction, "" if the model reads one but has no default; null if it reads none.
            "instruction": model.spec.text.instruction if model.spec.text.takes_instruction else None,
            "normalisation": model.spec.normalise is not None,
            "changed_on_disk": self.changed_on_disk,
            "fault": self.engine.fault,
            "certificate": certificate,
        }


class Models:
    """All served bundles by name; the first is used if a request names none."""

    def __init__(self, served: Mapping[str, Served]) -> None:
        self._served = dict(served)
        self.uses = Uses()  # counts the requests since a bundle was last replaced

    def choose(self, name: str | None) -> Served:
        """Return the bundle with this name, or raise Problem("unknown_model")."""
        if name is None:
            return next(iter(self._served.values()))
        if name not in self._served:
            known = ", ".join(self._served)
            raise Problem("unknown_model", f"model {name[:80]!r} is not served here; expected {known}")
        return self._served[name]

    def for_hosted_name(self, name: str | None) -> Served:
        """Like `choose`, but if there is only one bundle and the operator did not name it, any name selects it.

        Clients of hosted rerankers and reward models send the hosted model's name.
        """
        first = next(iter(self._served.values()))
        if name in self._served or first.options.named or len(self.each) > 1:
            return self.choose(name)
        return first

    def replace(self, new: Mapping[str, Served]) -> Uses:
        """Replace the bundles of these names; return the counter of requests that may still use the old ones."""
        before, self.uses = self.uses, Uses()
        self._served = {name: new.get(served.name, served) for name, served in self._served.items()}
        return before

    @property
    def names(self) -> list[str]:
        """All names, those of the first bundle first."""
        return list(self._served)

    @property
    def each(self) -> list[Served]:
        """Every bundle once."""
        return list({id(served): served for served in self._served.values()}.values())


@dataclass(frozen=True)
class Loader:
    """How bundles are loaded, at the start and at a reload."""

    options: ServerOptions
    provider: ProviderChoice
    precision: str
    threads: int | None
    observe: Callable[[str, Turn], None]
    report: Callable[[str], None]

    def load_all(self, bundles: Sequence[tuple[tuple[str, ...], Path]]) -> Models:
        """Load bundles, each under its names, and start their engines. Raises RewardRTError."""
        served: dict[str, Served] = {}
        for names, path in bundles:
            one = self.load(names[0], path)
            for name in names:
                if name in served:
                    raise RewardRTError(f"two bundles are called {name!r}; name each by --bundle name=path")
                served[name] = one
        return Models(served)

    def load(self, name: str, path: Path, *, check: bool = False) -> Served:
        """Load one bundle and start its engine; with `check`, only if a golden text gets torch's reward here."""
        address, folder = locate(path)
        digest = _manifest_sha256(folder)
        model = RewardModel.load(
            address,
            provider=self.provider,
            precision=self.precision,
            threads=self.threads,
            prefix_cache_mb=self.options.prefix_cache_mb,
        )
        if _manifest_sha256(folder) != digest:
            raise BundleError(f"{path}: changed while it was loaded; start again once it is whole")
        try:
            model.answers.check_options(normalize=self.options.normalize)
        except RewardRTError as error:
            raise type(error)(f"{path}: {error}") from error
        # Score a text now, so that the first client does not wait for what it sets up (templates, kernels).
        model.score_rows([{"prompt": "a", "response": "b"}])
        model.session.warm(BATCH_TOKENS)  # make a TensorRT engine's kernels before clients come
        if check:
            check_golden_text(model)
        engine = Engine(
            model,
            max_queue_tokens=self.options.max_queue_tokens,
            observe=lambda turn: self.observe(name, turn),
            report=lambda line: self.report(f"{line}: {name}"),
        )
        files = [folder / MANIFEST, *(folder / name for name in model.bundle.listed)]
        stamps = {file: stamp for file in files if (stamp := _stamp(file)) is not None}
        return Served(name, path, model, engine, self.options, digest, int(time.time()), stamps)


def check_golden_text(model: RewardModel) -> None:
    """Raise BundleError unless the shortest golden text gets torch's reward within the tolerance of `verify`."""
    path = model.bundle.name
    if model.bundle.manifest.uncertified or model.precision not in PRECISIONS:
        return
    texts = read_golden(model.bundle.file(GOLDEN))
    std = float(np.std([reward for text in texts for reward in text.rewards]))
    text = min(texts, key=lambda each: len(each.ids))
    found = model.runner.run([text.encoded])[0]
    if isinstance(found, InferenceError):
        raise BundleError(f"{path}: a golden text cannot be scored: {found}")
    worst = float(np.abs(found[: len(text.rewards)] - np.array(text.rewards)).max())
    if not worst <= PRECISIONS[model.precision].tolerance_std * std:
        raise BundleError(
            f"{path}: a golden text's reward is {worst:.2g} off torch's; run `rewardrt verify` on the bundle"
        )


def _manifest_sha256(path: Path) -> str:
    try:
        return manifest_sha256(path)
    except OSError:
        return ""  # loading then reports the error


def _stamp(path: Path) -> tuple[int, int, int] | None:
    with contextlib.suppress(OSError):
        found = os.stat(path)
        return found.st_ino, found.st_size, found.st_mtime_ns
    return None


def manifest_certificate(model: RewardModel) -> dict[str, Any] | None:
    """Return the certificate of the running graph as JSON, or None."""
    found = model.bundle.certificate(model.precision)
    return None if found is None else dataclasses.asdict(found)
