"""The traced graphs that tests share are those that would be traced, and never those of other code or of other models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

import traced_graphs
from checkpoints import write_sequence_classification
from rewardrt_export import pipeline
from rewardrt_export.checkpoint import read_checkpoint
from rewardrt_export.model.backbone import meta_backbone
from rewardrt_export.pipeline import export
from rewardrt_export.tracing.attention import attention_name
from rewardrt_export.tracing.experts import EXPERTS


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder of this test's own for traced graphs; the next test's setup puts the run's back."""
    traced_graphs.share(True, tmp_path / "traced")
    yield tmp_path / "traced"
    traced_graphs.share(False, tmp_path)


def files(bundle: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in bundle.iterdir() if path.name.startswith(("model", "golden"))}


def test_a_shared_graph_makes_the_files_that_its_own_trace_makes(folder: Path, tmp_path: Path) -> None:
    write_sequence_classification(tmp_path / "rm", "qwen3_moe", num_hidden_layers=1)
    first = export(tmp_path / "rm", tmp_path / "first").path
    assert len(list(folder.iterdir())) == 1
    traced_graphs.share(False, folder)
    # A copy numbers its new nodes from 0, as a graph that was read does.
    pipeline.trace = lambda *args, **options: traced_graphs._trace(*args, **options).clone()
    alone = export(tmp_path / "rm", tmp_path / "alone").path
    assert files(alone) == files(first)


@pytest.fixture
def traced(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Take the graph of a model, whose trace is only counted; returns how many there were."""
    count = 0

    def trace(backbone: Any, head: Any, **options: Any) -> ir.Model:
        nonlocal count
        count += 1
        return ir.from_onnx_text(
            '<ir_version: 10, opset_import: ["": 23]> graph (float[2] x) => (float[2] y) { y = Abs(x) }'
        )

    def take(name: str = "llama", *, writes: bool = True, labels: int = 1, **changes: Any) -> int:
        target = tmp_path / str(len(list(tmp_path.iterdir())))
        write_sequence_classification(target, name, labels=labels, num_hidden_layers=1, **changes)
        checkpoint = read_checkpoint(target, weights=(1.0,) * labels)
        config = checkpoint.source.config
        traced_graphs.share(True, folder, writes=writes)
        backbone = meta_backbone(config, attention_name(config, checkpoint.spec.causal), EXPERTS)
        found = pipeline.trace(backbone, checkpoint.head())
        assert [node.op_type for node in found.graph] == ["Abs"]
        return count

    monkeypatch.setattr(traced_graphs, "_trace", trace)
    return take


def test_other_weights_share_a_graph_and_what_computes_otherwise_does_not(
    traced: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [traced(), traced()] == [1, 1]
    assert [traced(hidden_act="gelu"), traced(labels=2), traced("qwen2"), traced("mistral")] == [2, 3, 4, 5]
    assert [traced("mistral", sliding_window=64), traced("mistral", sliding_window=65)] == [6, 7]
    monkeypatch.setattr(traced_graphs, "_code", lambda: "another version")
    assert [traced(), traced()] == [8, 8]


def test_a_test_that_changes_code_reads_graphs_and_leaves_none(traced: Callable[..., int]) -> None:
    found = [traced(writes=writes) for writes in (False, False, True, False)]
    assert found == [1, 2, 3, 3]


def test_the_sources_and_the_libraries_are_in_what_a_graph_is_known_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("rewardrt", "rewardrt_export"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "module.py").write_text("a = 1\n")
        monkeypatch.setattr(f"{package}.__path__", [str(tmp_path / package)])
    found = [traced_graphs._code.__wrapped__()]
    (tmp_path / "rewardrt_export" / "module.py").write_text("a = 2\n")
    found.append(traced_graphs._code.__wrapped__())
    real = traced_graphs.importlib.metadata.version
    monkeypatch.setattr(
        traced_graphs.importlib.metadata, "version", lambda name: "0" if name == "torch" else real(name)
    )
    found.append(traced_graphs._code.__wrapped__())
    assert len(set(found)) == 3
