"""Write the tiny random models that pages show commands on: `python -m shown_checkpoints [--export] NAME...`.

Each is written to the folder NAME; with --export the folder is a bundle, made of it in the same process.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from checkpoints import add_tensors, edit_json, make_tokenizer, read_tensors, write_sequence_classification
from checkpoints_pairwise import write_general_preference
from checkpoints_process import write_trl_prm
from checkpoints_token_logits import QWEN_SPECIAL, QWEN_TEMPLATE, byte_level, write_language_model
from rewardrt_export.pipeline import export

TINY = Path(__file__).parent.parent / "models" / "tiny"


def _attributes(folder: Path) -> None:
    """Three outputs with names."""
    write_sequence_classification(folder, labels=3, num_hidden_layers=1)
    labels = {"0": "helpfulness", "1": "correctness", "2": "verbosity"}
    edit_json(folder / "config.json", id2label=labels, label2id=None)


def _preferences(folder: Path) -> None:
    """A model that compares answers."""
    write_general_preference(folder, tokenizer=make_tokenizer())


def _steps(folder: Path) -> None:
    """A process reward model."""
    write_trl_prm(folder)


def _ranker(folder: Path) -> None:
    """A head that no family has."""
    write_sequence_classification(folder, num_hidden_layers=1)
    edit_json(folder / "config.json", architectures=["MyRanker"])
    _without(folder, "score.weight")
    add_tensors(folder, {"judge.up": torch.randn(24, 32), "judge.down": torch.randn(3, 24)})


def _nohead(folder: Path) -> None:
    """models/tiny as a save without its head leaves it."""
    shutil.copytree(TINY, folder)
    _without(folder, "score.weight")


def _judge(folder: Path) -> None:
    """A language model with words to answer in."""
    write_language_model(
        folder, "qwen3", byte_level(QWEN_SPECIAL, bos=None, template=QWEN_TEMPLATE), num_hidden_layers=1
    )


def _without(folder: Path, name: str) -> None:
    kept = {key: tensor for key, tensor in read_tensors(folder).items() if key != name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


WRITERS: dict[str, Callable[[Path], None]] = {
    "attributes": _attributes,
    "preferences": _preferences,
    "steps": _steps,
    "ranker": _ranker,
    "nohead": _nohead,
    "judge": _judge,
}
OPTIONS: dict[str, dict[str, Any]] = {"attributes": {"weights": (0.5, 0.3, -0.2)}}


def main() -> None:
    """Write what the command line names."""
    bundles = sys.argv[1] == "--export"
    for name in sys.argv[1 + bundles :]:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as scratch:
            written = Path(scratch) / name if bundles else Path(name)
            WRITERS[name](written)
            if bundles:
                export(written, name, **OPTIONS.get(name, {}))


if __name__ == "__main__":
    main()
