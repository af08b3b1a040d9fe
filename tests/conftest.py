from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

# Set before torch is imported: the tests' models are so small that threads only cost, and test files run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # some tests import onnxruntime before rewardrt

from tiers import reaches_torch

ROOT = Path(__file__).parent.parent
TINY = ROOT / "models" / "tiny"
EXPORTING = {"tiny_bundle"}
TRACED = "REWARDRT_TRACED_GRAPHS"  # a folder that several runs share traced graphs by; a run has one of its own without
_DRAWN: dict[str, list[tuple[np.random.Generator, Any]]] = {}  # generators of test modules, each with its first state


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="only tests that neither export nor are marked slow")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files that need torch, unread: importing it takes longer than many a test."""
    if config.getoption("--fast") and collection_path.name.startswith("test_") and collection_path.suffix == ".py":
        return True if reaches_torch(collection_path) else None
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--fast"):
        return
    slow = [
        item for item in items if item.get_closest_marker("slow") or EXPORTING & set(getattr(item, "fixturenames", ()))
    ]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> None:
    """Let a fixture draw the same numbers whichever tests ran before, in this worker or in another.

    From where a test can change code on, after the fixtures that several tests share, it leaves no traced graphs.
    """
    _draw_anew(getattr(request, "module", None))
    if fixturedef.argname == "monkeypatch":
        _share_graphs(request.node, writes=False)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """As above, for a test."""
    _draw_anew(getattr(item, "module", None))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let the exports of a run share traced graphs, unless the test is about tracing."""
    _share_graphs(item)


def _share_graphs(node: pytest.Item | pytest.Session, writes: bool = True) -> None:
    if "rewardrt_export.pipeline" in sys.modules:
        from traced_graphs import share

        folder = Path(os.environ.get(TRACED) or _run_folder(node.config) / "traced")
        share(not node.get_closest_marker("traces"), folder, writes=writes)


def _run_folder(config: pytest.Config) -> Path:
    """Return the temporary folder that the workers of a run share."""
    own: Path = config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own  # each worker's folder lies in the run's


def _draw_anew(module: ModuleType | None) -> None:
    """Put torch's generator and those that a test module has at their beginning; a module's is as its import left it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    if module is not None:
        if module.__name__ not in _DRAWN:
            found = [value for value in vars(module).values() if isinstance(value, np.random.Generator)]
            _DRAWN[module.__name__] = [(each, each.bit_generator.state) for each in found]
        for generator, state in _DRAWN[module.__name__]:
            generator.bit_generator.state = state


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Look at what happened: a test of the fast tier that imported torch by a way that `tiers` does not see fails."""
    if item.config.getoption("--fast"):
        assert "torch" not in sys.modules, f"{item.nodeid} imported torch: mark it slow, or let it score tests/bundles"


@pytest.fixture(scope="session")
def tiny_bundle(request: pytest.FixtureRequest) -> Path:
    """models/tiny, exported once for all tests of a run; copy it before changing anything in it."""
    shared = _run_folder(request.config)
    target = shared / "tiny"
    with (shared / "tiny.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first worker exports, the others wait for it
        if not (target / "reward.json").exists():
            from rewardrt_export.pipeline import export

            _share_graphs(request.node)
            export(TINY, target)
    return target
