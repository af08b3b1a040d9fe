"""The layout is the data's path: a module imports only from its left, and the runtime never imports the export."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import rewardrt

ROOT = Path(__file__).parent.parent
# Modules of one group may not import each other unless the order inside the group says so.
ORDER = {
    "rewardrt": [
        "telemetry", "display", "errors", "strict_json", "spec", "processor", "graph_file", "bundle", "providers", "kernels", "denormals", "session", "template_limits", "chat_template", "text", "tokens", "batching", "prefix", "fields", "rows", "pairwise", "reward_model",
        "verify", "formats", "files", "workers", "bench", "doctor", "server", "toplevel", "cli",
    ],
    "rewardrt_export": [
        "operators", "foreign", "weights", "tokenizer", "adapters", "backbone", "layouts", "padding", "chat_template", "tokenizer_files", "source", "heads", "families", "checkpoint", "explain", "attention_masks", "trace", "lower",
        "rounding", "calibrate", "smoothing", "fuse", "quantize", "storage", "half", "precision", "golden", "published_class", "certify", "pipeline", "cli",
    ],
}  # fmt: skip
FOLDERS = {"rewardrt": ROOT / "runtime" / "rewardrt", "rewardrt_export": ROOT / "export" / "rewardrt_export"}
FORBIDDEN_IN_RUNTIME = {
    "torch",
    "transformers",
    "rewardrt_export",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "optimum",
    "safetensors",
}
HOMES = {"onnxruntime": {"providers"}, "tokenizers": {"tokens"}}


def imported(path: Path) -> set[str]:
    """Return the dotted names that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


def imported_by(module: Path) -> set[str]:
    """Return what a module imports, or all modules of a package."""
    paths = module.glob("*.py") if module.is_dir() else [module.with_suffix(".py")]
    return {name for path in paths for name in imported(path)}


@pytest.mark.parametrize("package", ORDER)
def test_every_module_stands_in_the_order_and_imports_only_from_its_left(package: str) -> None:
    folder = FOLDERS[package]
    modules = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    modules -= {"__init__"}
    assert modules == set(ORDER[package])
    for position, module in enumerate(ORDER[package]):
        left = set(ORDER[package][:position])
        used = {name.split(".")[1] for name in imported_by(folder / module) if name.startswith(f"{package}.")}
        used -= {module} if (folder / module).is_dir() else set()  # the files of a package know each other
        assert used <= left | {"__version__", "RewardModel"}, f"{package}.{module} imports from its right"


def test_the_runtime_never_imports_torch_or_the_export() -> None:
    for path in FOLDERS["rewardrt"].glob("*.py"):
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & FORBIDDEN_IN_RUNTIME, path.name


@pytest.mark.parametrize("library", HOMES)
def test_a_heavy_library_has_one_home(library: str) -> None:
    users = {
        path.stem for path in FOLDERS["rewardrt"].glob("*.py") if library in {n.split(".")[0] for n in imported(path)}
    }
    assert users <= HOMES[library]


def test_the_folders_above_the_packages_are_no_packages() -> None:
    assert not (ROOT / "export" / "__init__.py").exists()
    assert not (ROOT / "runtime" / "__init__.py").exists()


def test_the_public_names_are_these() -> None:
    expected = ["Ranked", "RewardModel", "RewardRTError", "RowError", "Scored", "TruncationWarning"]
    assert rewardrt.__all__ == expected
    assert all(hasattr(rewardrt, name) for name in expected)
