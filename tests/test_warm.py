"""`rewardrt warm`, where engines are kept, and who prefers one that is warm."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from commands import run
from rewardrt import RewardModel
from rewardrt.bundle import engines
from rewardrt.bundle.engines import engine_request, warm_choice
from rewardrt.bundle.manifest import Bundle, Variant, read_bundle
from rewardrt.graph.session import GraphSession
from rewardrt.graph.shapes import Profile
from rewardrt.machine.engine_cache import CONTENTS, VARIABLE, Entry, Key
from rewardrt.machine.providers import onnxruntime_distributions

cpu_wheel = pytest.mark.skipif("onnxruntime" not in onnxruntime_distributions(), reason="asks what the CPU wheel does")
BUNDLE = Path(__file__).parent / "bundles" / "version-1"


@cpu_wheel
def test_warm_is_refused_with_the_reason_and_scores_nothing() -> None:
    done = run("warm", BUNDLE)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: provider 'tensorrt' cannot be had: ") and done.stderr.count("\n") == 1


@cpu_wheel
def test_where_there_is_no_engine_warm_says_so() -> None:
    done = run("warm", BUNDLE, "--provider", "cpu", "--precision", "fp32")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"{BUNDLE}: fp32 on cpu: there is no engine to build\n"


@pytest.mark.parametrize("command", ["warm", "score", "verify", "serve", "bench"])
def test_every_command_with_a_provider_takes_the_folder_of_engines(command: str) -> None:
    shown = run(command, "--help").stdout
    assert "--engine-cache DIR" in shown and "REWARDRT_ENGINE_CACHE" in shown


def offered(**changes: Any) -> Bundle:
    """A bundle with a tensorrt graph, made up."""
    bundle = read_bundle(BUNDLE)
    first = bundle.manifest.variants[0]
    variant = dataclasses.replace(first, precision="tensorrt", made_for=("tensorrt",), **changes)
    variants: tuple[Variant, ...] = (*bundle.manifest.variants, variant)
    return dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, variants=variants))


@pytest.fixture
def warm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose TensorRT starts, and an engine of the bundle that is kept for it; returns the entry's folder."""
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    request = engine_request(offered(), offered().manifest.variants[-1])
    key = Key((("gpu", "this one"), ("identity", request.identity)))
    monkeypatch.setattr(engines, "why_not", lambda provider: None)
    monkeypatch.setattr(type(request), "key", lambda self: key)
    folder = Entry.of(key).folder
    folder.mkdir()
    (folder / CONTENTS).write_text(json.dumps({"made_for": dict(key.parts), "files": {"engine.onnx": "0"}}))
    return folder


def test_auto_takes_tensorrt_where_its_engine_is_warm(warm: Path) -> None:
    assert warm_choice(offered(), "auto") == "tensorrt"


def test_auto_stays_auto_where_it_is_not(warm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert warm_choice(read_bundle(BUNDLE), "auto") == "auto"  # no graph for TensorRT
    monkeypatch.setattr(engines, "why_not", lambda provider: "there is no NVIDIA driver")
    assert warm_choice(offered(), "auto") == "auto"
    monkeypatch.setattr(engines, "why_not", lambda provider: None)
    found = json.loads((warm / CONTENTS).read_text())
    (warm / CONTENTS).rename(warm.parent / "kept")
    assert warm_choice(offered(), "auto") == "auto"  # not whole
    other = warm.parent / "another machine"
    other.mkdir()
    (other / CONTENTS).write_text(json.dumps(found))
    assert warm_choice(offered(), "auto") == "auto"  # of another GPU


@pytest.mark.parametrize("choice", ["cpu", "cuda", "tensorrt"])
def test_a_provider_that_is_named_is_that_provider(warm: Path, choice: Any) -> None:
    assert warm_choice(offered(), choice) == choice


def test_without_an_engine_auto_does_not_ask_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(provider: str) -> str:
        raise AssertionError("asked")

    monkeypatch.setenv(VARIABLE, str(tmp_path / "none"))
    monkeypatch.setattr(engines, "why_not", never)
    assert warm_choice(offered(), "auto") == "auto"


def test_an_engine_is_named_by_the_hashes_of_graph_and_weights_and_its_longest_text() -> None:
    bundle = read_bundle(BUNDLE)
    variant = bundle.manifest.variants[0]
    hashes = {record.path: record.sha256 for record in bundle.manifest.files}
    request = engine_request(bundle, variant)
    assert request.identity == "+".join(hashes[name] for name in (variant.graph, *variant.data))
    assert request.profile == Profile.of(bundle.manifest.spec.max_length)


def test_a_server_runs_every_shape_before_it_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("starlette")
    from rewardrt.server.models import Loader
    from rewardrt.server.options import ServerOptions

    warmed: list[int] = []
    monkeypatch.setattr(GraphSession, "warm", lambda self, batch_tokens: warmed.append(batch_tokens) or 0)
    loader = Loader(ServerOptions(), "cpu", "fp32", None, lambda name, turn: None, lambda line: None)
    served = loader.load("one", BUNDLE)
    served.engine.close()
    served.engine.join(5.0)
    assert warmed == [16_384]


def test_what_runs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = RewardModel.load(BUNDLE, provider="cpu", precision="fp32")
    assert model.session.runs_on == "cpu"
