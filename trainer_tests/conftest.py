"""What the tests of trainers share: the bundle, its rewards as one process gives them, a server, the printed files."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Set before torch, transformers or datasets are imported: no test asks a hub for anything, and the models are tiny.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAY_USAGE_STATS_ENABLED": "0", "WANDB_MODE": "disabled"}

import numpy as np
import pytest

from rewardrt import RewardModel
from rewardrt.trainers.listing import find, printed

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from server_process import serving

BUNDLE = ROOT / "tests" / "bundles" / "version-1"
SHOWN = (
    "trl", "openrlhf", "verl", "ms-swift", "areal", "llamafactory", "verifiers",
    "rewardrt", "onnxruntime", "torch", "transformers", "ray", "tensordict", "aiohttp",
)  # fmt: skip


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which versions ran."""
    found = [f"python {sys.version.split()[0]}"]
    for name in SHOWN:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    terminalreporter.write_line(", ".join(found))


@pytest.fixture(scope="session")
def bundle() -> Path:
    return BUNDLE


@pytest.fixture(scope="session")
def offline() -> Callable[[list[dict[str, Any]]], list[float]]:
    """The rewards of rows as one process gives them, each a float32 as Python's float."""
    model = RewardModel.load(BUNDLE)
    return lambda rows: [float(reward) for reward in model.score_many(rows)]


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    with serving(BUNDLE) as running:
        yield running.url


@pytest.fixture(params=["bundle", "server"])
def where(request: pytest.FixtureRequest) -> str:
    """A bundle's folder, and the address of a server that has it."""
    return str(BUNDLE) if request.param == "bundle" else str(request.getfixturevalue("url"))


@pytest.fixture
def rewards_file(tmp_path: Path, where: str) -> Callable[[str], Path]:
    """The file that `rewardrt trainer NAME` prints, saved as rewards.py, with `where` in it."""

    def save(name: str) -> Path:
        path, found = tmp_path / "rewards.py", find(name)
        if where.startswith("http") and not found.lines:  # else it prints lines for a server
            path.write_text(printed(found, urls=[where]))
        else:
            path.write_text(printed(found, bundle=where))
        return path

    return save


def bits(values: Any) -> list[int]:
    """Return numbers as the bits of their float32."""
    return np.asarray(values, dtype=np.float32).view(np.int32).ravel().tolist()


def without_init(*packages: str) -> None:
    """Let modules of packages be imported without the packages' own, which import what trains on GPUs."""
    for name in packages:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.submodule_search_locations is not None
        package = sys.modules[name] = types.ModuleType(name)
        package.__path__ = list(spec.submodule_search_locations)


def stand_in(name: str, *names: str) -> None:
    """Put a module in the place of one that needs a GPU, with empty objects for what is imported from it."""
    module = sys.modules[name] = types.ModuleType(name)
    for each in names:
        setattr(module, each, object())
