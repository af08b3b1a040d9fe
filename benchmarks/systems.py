"""What is compared: the graphs of a bundle, and other ways to score with the same checkpoint on the same machine."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rewardrt.bundle.manifest import Bundle
from rewardrt.checks.bench import list_candidates, model_command

PEERS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class System:
    """One process that holds one model, and the loops over the texts that it is asked for."""

    name: str
    kind: Literal["ours", "torch", "peer"]
    precision: str
    command: tuple[str, ...]
    loops: tuple[
        str, ...
    ]  # "file", "sorted": padded chunks of 8; "single": one by one; "all": the system's own business


@dataclass(frozen=True)
class Environment:
    """A virtual environment of a peer; `without` is what its requirements bring along and cannot be imported."""

    name: str
    requirements: tuple[str, ...]
    without: tuple[str, ...] = ()

    def python(self, cache: Path) -> str:
        """Return the path of its python."""
        return str(cache / f"venv-{self.name}" / "bin" / "python")

    def make(self, cache: Path) -> None:
        """Install it where that was not done yet; raises CalledProcessError."""
        done = cache / f"venv-{self.name}" / "installed"
        if done.is_file():
            return
        subprocess.run([sys.executable, "-m", "venv", str(done.parent)], check=True)
        pip = [self.python(cache), "-m", "pip", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", *self.requirements], check=True, stdout=sys.stderr)
        if self.without:
            subprocess.run([*pip, "uninstall", "-y", *self.without], check=True, stdout=sys.stderr)
        done.touch()


OPTIMUM = Environment("optimum", ("torch==2.13.0", "optimum-onnx[onnxruntime]"))
SENTENCE_TRANSFORMERS = Environment("sentence-transformers", ("torch==2.13.0", "sentence-transformers[onnx]"))
OPENVINO = Environment("openvino", ("torch==2.13.0", "optimum-intel[openvino]", "nncf"), without=("torchvision",))
ENVIRONMENTS = (OPTIMUM, SENTENCE_TRANSFORMERS, OPENVINO)


def list_own(bundle: Bundle) -> list[System]:
    """Return every graph of a bundle, with and without the reuse of prefixes, fp32 first."""
    return [
        System(f"rewardrt {name}{suffix}", "ours", name, tuple(model_command(bundle.path, chosen)), ("all",))
        for name, (_, options) in list_candidates(bundle).items()
        for suffix, chosen in (("", options), (", no reuse", options | {"prefix_reuse": False}))
    ]


def list_peers(checkpoint: Path, cache: Path) -> list[System]:
    """Return the other systems; `checkpoint` is the sequence-classification one that all of them load."""

    def peer(name: str, precision: str, python: str, script: str, folder: str, *more: str) -> System:
        command = (python, str(PEERS / script), str(checkpoint), str(cache / folder), *more)
        return System(name, "peer", precision, command, ("sorted", "single"))

    def torch(precision: str, *loops: str) -> System:
        command = (sys.executable, str(PEERS / "torch_loop.py"), str(checkpoint), precision)
        return System(f"torch {precision}", "torch", precision, command, loops)

    optimum, sentence = OPTIMUM.python(cache), SENTENCE_TRANSFORMERS.python(cache)
    openvino = OPENVINO.python(cache)
    return [
        torch("bfloat16", "file", "sorted", "single"),
        torch("float32", "sorted", "single"),
        peer("transformers OnnxExporter", "fp32", sys.executable, "onnx_exporter.py", "onnx-exporter"),
        peer("optimum-onnx fp32", "fp32", optimum, "optimum_onnx.py", "optimum-fp32", "fp32"),
        peer("optimum-onnx int8", "int8", optimum, "optimum_onnx.py", "optimum-int8", "int8"),
        peer(
            "sentence-transformers int8",
            "int8",
            sentence,
            "sentence_transformers_onnx.py",
            "sentence-transformers-int8",
        ),
        peer("OpenVINO bf16", "bf16", openvino, "openvino_intel.py", "openvino-bf16", "bf16"),
        peer("OpenVINO int8", "int8", openvino, "openvino_intel.py", "openvino-int8", "int8"),
    ]


def lean_command(cache: Path, root: Path) -> list[str]:
    """Return the command of a rewardrt that is installed with the extra `cpu` and nothing else, as it is now.

    Raises CalledProcessError.
    """
    folder = cache / "venv-lean"
    pip = [str(folder / "bin" / "python"), "-m", "pip", "-q", "--disable-pip-version-check", "install"]
    if not folder.is_dir():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([*pip, f"{root}[cpu]"], check=True, stdout=sys.stderr)
    subprocess.run([*pip, "--no-deps", "--force-reinstall", str(root)], check=True, stdout=sys.stderr)
    return [str(folder / "bin" / "rewardrt")]
