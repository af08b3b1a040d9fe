"""Where only `.[cpu]` is installed, scoring works, and neither torch nor transformers is there to be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from rewardrt.machine import kernels

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # pip installs what it may have to download
ROOT = Path(__file__).parent.parent
# The runtime's own dependencies, and what tokenizers and onnxruntime bring along.
HEAVY = {"torch", "transformers", "onnx", "onnxscript", "onnx-ir", "optimum", "safetensors", "pandas", "scipy"}


@pytest.fixture(scope="module")
def lean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the project and its `cpu` extra; returns its bin folder."""
    folder = tmp_path_factory.mktemp("lean") / "venv"
    venv.create(folder)
    # By the pip and the hatchling that are here: what they make is the same, and neither has to be installed first.
    here = [sys.executable, "-m", "pip"]
    wheel = [*here, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder.parent), str(ROOT)]
    subprocess.run(wheel, check=True, capture_output=True, timeout=200)
    (built,) = folder.parent.glob("*.whl")
    install = [*pip(folder / "bin"), "install", "-q", "--no-compile", f"{built}[cpu]"]
    subprocess.run(install, check=True, capture_output=True, timeout=500)
    return folder / "bin"


def pip(lean: Path) -> list[str]:
    return [sys.executable, "-m", "pip", "--python", str(lean / "python")]


def command(lean: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([*map(str, arguments)], capture_output=True, text=True, check=False, env=clean, cwd=lean, timeout=120)  # fmt: skip


def test_score_and_verify_work_and_nothing_heavy_is_installed(lean: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    installed = json.loads(command(lean, *pip(lean), "list", "--format", "json").stdout)
    names = {package["name"].lower() for package in installed}
    assert {"rewardrt", "numpy", "tokenizers", "jinja2", "onnxruntime"} <= names
    assert not names & HEAVY
    (tmp_path / "in.jsonl").write_text('{"prompt": "hello", "response": "good day"}\n')
    scored = command(lean, lean / "rewardrt", "score", tiny_bundle, tmp_path / "in.jsonl")
    assert scored.returncode == 0, scored.stderr
    here = subprocess.run(
        [sys.executable, "-c", "from rewardrt.cli.app import main; main()", "score", tiny_bundle, tmp_path / "in.jsonl"],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert scored.stdout == here.stdout
    verified = command(lean, lean / "rewardrt", "verify", tiny_bundle)
    assert (verified.returncode, verified.stdout.splitlines()[-1]) == (0, "passed")


def test_the_wheel_has_the_kernels_that_are_compiled_here(lean: Path) -> None:
    report = json.loads(command(lean, lean / "rewardrt", "doctor", "--json").stdout)
    assert report["kernels"] == kernels.describe()


def test_both_packages_bring_their_types(lean: Path, tmp_path: Path) -> None:
    """py.typed is in the wheel, so that a user's mypy reads the types instead of taking everything for Any."""
    (tmp_path / "program.py").write_text(
        "from rewardrt import RewardModel\nimport rewardrt_export\nreveal_type(RewardModel.load('bundle').score(text='a'))\n"
    )
    mypy = [sys.executable, "-m", "mypy", "--strict", "--python-executable", lean / "python", tmp_path / "program.py"]
    done = subprocess.run(
        [*map(str, mypy), "--cache-dir", str(tmp_path)], capture_output=True, text=True, check=False, cwd=tmp_path, timeout=170,
        env={name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")},
    )  # fmt: skip
    assert 'Revealed type is "float"' in done.stdout.replace("builtins.", ""), done.stdout
    assert done.returncode == 0, done.stdout
    for package in ("rewardrt", "rewardrt_export"):
        code = f"import importlib.util as u; print(u.find_spec({package!r}).submodule_search_locations[0])"
        folder = Path(command(lean, lean / "python", "-c", code).stdout.strip())
        assert (folder / "py.typed").is_file() and lean.parent in folder.parents


def test_importing_and_scoring_load_neither_torch_nor_transformers_nor_the_export(
    lean: Path, tiny_bundle: Path
) -> None:
    code = (
        "import sys, rewardrt; rm = rewardrt.RewardModel.load(sys.argv[1]); rm.score(text='a'); import rewardrt.cli;"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'transformers', 'rewardrt_export'}))"
    )
    assert command(lean, lean / "python", "-c", code, tiny_bundle).stdout == "[]\n"
    traced = command(lean, lean / "python", "-X", "importtime", "-c", "import rewardrt").stderr
    assert "rewardrt.reward_model" in traced
    assert "torch" not in traced
    assert "transformers" not in traced


def test_export_without_its_extra_names_the_command_that_installs_it(lean: Path, tmp_path: Path) -> None:
    result = command(lean, lean / "rewardrt", "export", tmp_path, tmp_path / "bundle")
    assert result.returncode == 2
    assert result.stderr == (
        "error: export needs torch, transformers, onnxscript, onnx_ir, tomlkit: pip install 'rewardrt[export,cpu]'\n"
    )
