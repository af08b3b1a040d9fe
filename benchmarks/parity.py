"""A bundle's rewards against torch on real texts: the largest difference, in standard deviations of the reward.

    python benchmarks/parity.py CHECKPOINT BUNDLE FILE.jsonl [--texts 200] [--max-length 4096]

The reference is transformers' forward in float32, eager attention, one text at a time; exit status 1 over 1e-4.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import numpy as np
import torch

from rewardrt import RewardModel, RewardRTError
from rewardrt.data.lines import read_lines
from rewardrt.text.rows import parse_row
from rewardrt.text.tokens import EncodedText
from rewardrt_export.certificate.reference import score_with_torch
from rewardrt_export.checkpoint import read_checkpoint


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--texts", default=200, show_default=True)
@click.option("--max-length", default=4096, show_default=True)
def main(checkpoint: Path, bundle: Path, file: Path, texts: int, max_length: int) -> None:
    """Print the figures, and fail over the fp32 tolerance."""
    model = RewardModel.load(bundle, provider="cpu")
    with file.open("rb") as stream:
        items = [item for line in read_lines(stream) for item in parse_row(line.row).items][:texts]
    encoded = [text for text in model.answers.encode(items, max_length=max_length) if isinstance(text, EncodedText)]
    scored = model.runner.run(encoded)
    del model
    torch_rewards = score_with_torch(read_checkpoint(checkpoint), encoded)
    for values in scored:
        if isinstance(values, RewardRTError):
            raise values
    found = np.concatenate([values[: len(wanted)] for values, wanted in zip(scored, torch_rewards, strict=True)])
    expected = np.concatenate(torch_rewards)
    lengths = [len(text.ids) for text in encoded]
    off = np.abs(found - expected).max() / expected.std()
    print(
        f"{bundle.name} on {file.name}: {len(encoded)} texts of {min(lengths)} to {max(lengths)} tokens, torch "
        f"{torch.__version__}: largest difference {np.abs(found - expected).max():.2e} = {off:.2e} standard deviations"
    )
    sys.exit(0 if off <= 1e-4 else 1)


if __name__ == "__main__":
    main()
