"""What a mixture of experts takes at a real layer's size: memory above its weights, its certificate, its speed.

    python benchmarks/mixture.py FOLDER [--layers 2] [--tokens 512]

Writes a random Qwen3-MoE into FOLDER (2.5 GB in float32 with 2 layers): 32 experts of width 768, 8 a token, hidden size
2,048. It is exported in fp32 and int8 with the certificate, in a process of its own whose memory is watched, and scored
beside torch's eager classes of transformers, in turns. Prints the figures, and deletes what it wrote.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

TINY = Path(__file__).parent.parent / "models" / "tiny"
EXPORT = [sys.executable, "-c", "from rewardrt.cli.app import main; main()", "export"]
SIZES: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 768,
    "moe_intermediate_size": 768,
    "num_experts": 32,
    "num_experts_per_tok": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "vocab_size": 4096,
    "max_position_embeddings": 4096,
}


def write_mixture(folder: Path, layers: int) -> int:
    """Write a random reward model in float32; returns the bytes of its weights."""
    import torch
    from transformers import AutoModelForSequenceClassification, Qwen3MoeConfig

    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SIZES, num_hidden_layers=layers, num_labels=1, pad_token_id=0)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TINY / name, folder / name)
    return sum(parameter.numel() * 4 for parameter in model.parameters())


def rss(process: int | str, kind: str = "VmRSS") -> int:
    """Return the bytes of memory that a process holds."""
    for line in Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(kind):
            return 1024 * int(line.split()[1])
    return 0


def watched(command: list[str]) -> tuple[float, int]:
    """Run a command; return its seconds and the most memory that it held."""
    began, most = time.perf_counter(), 0
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.extend(process.stderr or ()))
        reader.start()
        while process.poll() is None:
            try:
                most = max(most, rss(process.pid))
            except OSError:  # it has just ended
                break
            time.sleep(0.02)
        reader.join()
    if process.returncode:
        raise SystemExit("".join(lines))
    return time.perf_counter() - began, most


def measure(bundle: Path, precision: str, tokens: int) -> None:
    """Print what a process that scores one text holds above what it held once loaded, as JSON: a process of its own."""
    from rewardrt import RewardModel
    from rewardrt.text.tokens import EncodedText

    model = RewardModel.load(bundle, provider="cpu", precision=precision)
    rng = np.random.default_rng(0)
    text = EncodedText(rng.integers(10, 1000, tokens), 0, np.array([tokens - 1]))
    loaded = rss("self")
    most = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, rss("self"))
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model.runner.run([text])
    done.set()
    watcher.join()
    print(json.dumps({"loaded": loaded, "above": most - loaded}))


def seconds_of(run: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def compare(checkpoint: Path, bundle: Path, tokens: int, rounds: int = 7) -> dict[str, float]:
    """Return tokens/s, medians of calls taken in turns: torch eager, and the bundle in fp32 and int8."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from rewardrt import RewardModel
    from rewardrt.text.tokens import EncodedText

    ids = np.random.default_rng(0).integers(10, 1000, tokens)
    model = AutoModelForSequenceClassification.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    bundles = {name: RewardModel.load(bundle, provider="cpu", precision=name) for name in ("fp32", "int8")}
    text = EncodedText(ids, 0, np.array([tokens - 1]))
    inputs = torch.from_numpy(ids).unsqueeze(0)

    def by_torch() -> None:
        with torch.inference_mode():
            model(input_ids=inputs, use_cache=False)

    runs: dict[str, Callable[[], object]] = {"torch eager fp32": by_torch}
    runs |= {f"bundle {name}": lambda each=each: each.runner.run([text]) for name, each in bundles.items()}  # type: ignore[misc]
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            taken = seconds_of(run)
            if turn:  # the first warms up
                found[name].append(tokens / taken)
    return {name: statistics.median(values) for name, values in found.items()}


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--layers", default=2, show_default=True)
@click.option("--tokens", default=512, show_default=True, help="Of the text that is scored.")
@click.option("--precision", hidden=True)
def main(folder: Path, layers: int, tokens: int, precision: str | None) -> None:
    """Measure a mixture in FOLDER, which must not exist."""
    checkpoint, bundle = folder / "checkpoint", folder / "bundle"
    if precision is not None:
        measure(bundle, precision, tokens)
        return
    folder.mkdir(parents=True)
    try:
        weights = write_mixture(checkpoint, layers)
        print(f"{layers} layers, {weights / 1e9:.2f} GB of weights in float32, a text of {tokens} tokens")
        again = [sys.executable, __file__, str(folder), "--tokens", str(tokens)]
        for name in ("fp32", "int8"):
            out = ["--force", str(checkpoint), str(folder / f"alone-{name}"), "--precision", name]
            taken, most = watched([*EXPORT, *out])
            print(f"export and certificate, {name}: {taken:.0f} s, {most / 1e9:.2f} GB at most")
        shutil.rmtree(folder / "alone-int8")
        shutil.rmtree(folder / "alone-fp32")
        watched([*EXPORT, str(checkpoint), str(bundle), "--precision", "fp32", "--precision", "int8"])
        for name in ("fp32", "int8"):
            done = subprocess.run([*again, "--precision", name], check=True, capture_output=True, text=True)
            held = json.loads(done.stdout.splitlines()[-1])
            size = sum(path.stat().st_size for path in bundle.glob(f"model{'' if name == 'fp32' else '.int8'}.onnx*"))
            print(
                f"{name}: {held['loaded'] / 1e6:,.0f} MB once loaded (a file of {size / 1e6:,.0f} MB), "
                f"{held['above'] / 1e6:,.0f} MB more while it scores"
            )
        for name, rate in compare(checkpoint, bundle, tokens).items():
            print(f"{name}: {rate:,.0f} tokens/s")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
