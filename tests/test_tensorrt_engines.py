"""TensorRT's own parser and builder take the graph of every backbone and every family whole. They need no GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from every_family import EVERY_BACKBONE, EVERY_FAMILY
from rewardrt.errors import ExportError
from rewardrt.graph.shapes import Profile
from rewardrt_export.families import FAMILIES
from rewardrt_export.pipeline import export
from rewardrt_export.precisions import engine
from tensorrt_table import measure

TINY = Path(__file__).parent.parent / "models" / "tiny"
installed = pytest.mark.skipif(engine.missing() is not None, reason=str(engine.missing()))
# A family whose checkpoint here is one of a backbone's is not exported twice.
CASES = EVERY_BACKBONE | {
    name: case for name, case in EVERY_FAMILY.items() if case not in EVERY_BACKBONE.values() and name != "encoder"
}


def test_there_is_a_checkpoint_of_every_family() -> None:
    assert EVERY_FAMILY.keys() == set(FAMILIES)


@installed
@pytest.mark.parametrize("name", CASES)
def test_the_whole_graph_is_one_engine(name: str) -> None:
    row = measure(name, CASES[name], certified=False)
    assert row.refused == ""
    assert 0.5 < row.megabytes < 20 and row.seconds < 120


@installed
def test_an_export_says_in_the_manifest_what_was_built(tmp_path: Path) -> None:
    made = export(TINY, tmp_path / "bundle", precisions=("tensorrt",), certified=False)
    built = made.manifest.variants[0].built
    assert built.startswith("parsed and built by TensorRT-RTX 1.")
    assert built.endswith(" MB, 1-64 texts of 1-2,048 tokens")


@installed
def test_a_refusal_has_the_node_and_the_reason_and_leaves_no_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewardrt_export.precisions.tensorrt.drop_past", lambda model: None)
    with pytest.raises(ExportError) as caught:
        export(TINY, tmp_path / "bundle", precisions=("tensorrt",), certified=False)
    said = str(caught.value)
    assert said.startswith("model.tensorrt.onnx: TensorRT-RTX 1.") and "\n" not in said
    assert "node_attention" in said and "only supports Attention nodes with one output" in said
    assert said.endswith("export without --precision tensorrt, or report it")
    assert not (tmp_path / "bundle").exists()


@installed
@pytest.mark.parametrize("content", [b"", b"no graph", b"\x08\x0a"])
def test_a_file_that_is_no_graph_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ExportError, match=r"^model\.onnx: TensorRT-RTX ") as caught:
        engine.build(tmp_path / "model.onnx", Profile(1, 16))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("done", "expected"),
    [
        (
            subprocess.CompletedProcess("", -11, b"", b"Segmentation fault\n"),
            "was ended by signal 11 (Segmentation fault)",
        ),
        (subprocess.CompletedProcess("", 1, b"", b"a\nImportError: x\n"), "ended with 1 (ImportError: x)"),
        (subprocess.CompletedProcess("", 0, b"chatter\n", b""), "ended with 0"),
    ],
)
def test_a_process_of_tensorrt_that_dies_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, done: Any, expected: str
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(ExportError) as caught:
        engine.build(tmp_path / "model.onnx", Profile(1, 16))
    assert str(caught.value).startswith(f"model.onnx: the process of TensorRT-RTX {expected}; export without")


def test_a_process_of_tensorrt_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(_sleeper(tmp_path)))
    with pytest.raises(ExportError, match=r"TensorRT-RTX built no engine within 0\.2 s"):
        engine.build(tmp_path / "model.onnx", Profile(1, 16), timeout=0.2)


def _sleeper(folder: Path) -> Path:
    script = folder / "sleeper"
    script.write_text("#!/bin/sh\nexec sleep 600\n")
    script.chmod(0o755)
    return script


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert engine.missing() == (
        "TensorRT-RTX is not installed (no onnxruntime_ep_nv_tensorrt_rtx and tensorrt_rtx_bindings): "
        "`pip install 'rewardrt[export,tensorrt]'`"
    )
