from __future__ import annotations

import os
from pathlib import Path

import pytest

# Set before torch is imported: the tests' models are so small that threads only cost, and test files run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # some tests import onnxruntime before rewardrt

ROOT = Path(__file__).parent.parent
TINY = ROOT / "models" / "tiny"


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models/tiny, exported once for all tests; copy it before changing anything in it."""
    from rewardrt_export.pipeline import export

    target = tmp_path_factory.mktemp("bundles") / "tiny"
    export(TINY, target)
    return target
