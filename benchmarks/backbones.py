"""What experts and layers with a state cost at real sizes: memory above the weights, the certificate, the speed.

    python benchmarks/backbones.py FOLDER [--kind mixture] [--layers N] [--tokens 512]

Writes a random checkpoint into FOLDER (of the kinds in `KINDS`), exports it in fp32 and int8 with the certificate, in a
process of its own whose memory is watched, and scores a text with it and with transformers' class in torch, in turns.
Compares the bits of 24 texts that share beginnings, alone, together, with and without reuse of prefixes. Prints the
figures, and deletes what it wrote.
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
import numpy.typing as npt

from rewardrt.text.tokens import EncodedText

TINY = Path(__file__).parent.parent / "models" / "tiny"
EXPORT = [sys.executable, "-c", "from rewardrt.cli.app import main; main()", "export"]
COMMON: dict[str, Any] = {"vocab_size": 4096, "max_position_embeddings": 4096}
DELTA: dict[str, Any] = {
    "hidden_size": 768,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "linear_num_key_heads": 6,
    "linear_num_value_heads": 12,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2,
}
# Of each kind: transformers' type, its sizes, and how many layers.
KINDS: dict[str, tuple[str, dict[str, Any], int]] = {
    # 32 experts of width 768, 8 a token: 2.5 GB in float32.
    "mixture": (
        "qwen3_moe",
        {
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
        },
        2,
    ),
    # Three layers of the gated delta rule to one of attention, and 100 million parameters: dense, and with experts.
    "qwen3_5": ("qwen3_5_text", DELTA | {"intermediate_size": 3072}, 8),
    "qwen3_next": (
        "qwen3_next",
        DELTA
        | {
            "moe_intermediate_size": 160,
            "shared_expert_intermediate_size": 160,
            "num_experts": 20,
            "num_experts_per_tok": 4,
            "decoder_sparse_step": 1,
        },
        8,
    ),
}


def write_checkpoint(folder: Path, kind: str, layers: int) -> int:
    """Write a random reward model in float32; returns the number of its parameters."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification

    torch.manual_seed(0)
    name, sizes, _ = KINDS[kind]
    config = CONFIG_MAPPING[name](**COMMON | sizes, num_hidden_layers=layers, num_labels=1, pad_token_id=0)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TINY / file, folder / file)
    return sum(parameter.numel() for parameter in model.parameters())


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

    model = RewardModel.load(bundle, provider="cpu", precision=precision)
    text = encoded(np.random.default_rng(0).integers(10, 1000, tokens))
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


def compare(checkpoint: Path, folders: dict[str, Path], tokens: int, rounds: int = 7) -> dict[str, float]:
    """Return tokens/s, medians of calls taken in turns: torch eager, and the bundle in fp32 and int8."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from rewardrt import RewardModel

    ids = np.random.default_rng(0).integers(10, 1000, tokens)
    model = AutoModelForSequenceClassification.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    bundles = {name: RewardModel.load(each, provider="cpu", precision=name) for name, each in folders.items()}
    text = encoded(ids)
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


def other_bits(bundle: Path, precision: str) -> tuple[int, int, float]:
    """Return how many of 24 texts have other bits together than alone; of how many; the share that was not computed."""
    from rewardrt import RewardModel

    rng = np.random.default_rng(1)
    prompts = [rng.integers(10, 1000, length) for length in (90, 200, 333, 600)]
    texts = [
        encoded(np.concatenate([prompt, rng.integers(10, 1000, 20 + 37 * n)])) for prompt in prompts for n in range(6)
    ]
    plain = RewardModel.load(bundle, provider="cpu", precision=precision, prefix_reuse=False)
    alone = [np.asarray(plain.runner.run([text])[0]) for text in texts]
    reusing = RewardModel.load(bundle, provider="cpu", precision=precision)
    padded = RewardModel.load(bundle, provider="cpu", precision=precision, padding=True, prefix_reuse=False)
    found = [*reusing.runner.run(texts), *padded.runner.run(texts)]
    other = sum(not np.array_equal(np.asarray(a), b) for a, b in zip(found, alone * 2, strict=True))
    return other, len(found), reusing.statistics.shared


def encoded(ids: npt.NDArray[np.int64]) -> EncodedText:
    """Make a text of token ids that is read at its last token."""
    return EncodedText(ids, 0, np.array([len(ids) - 1]))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--kind", type=click.Choice(list(KINDS)), default="mixture", show_default=True)
@click.option("--layers", type=int, help="Other than the kind's own number.")
@click.option("--tokens", default=512, show_default=True, help="Of the text that is scored.")
@click.option("--precision", hidden=True)
def main(folder: Path, kind: str, layers: int | None, tokens: int, precision: str | None) -> None:
    """Measure a kind of backbone in FOLDER, which must not exist."""
    checkpoint = folder / "checkpoint"
    if precision is not None:
        measure(folder / precision, precision, tokens)
        return
    folder.mkdir(parents=True)
    try:
        parameters = write_checkpoint(checkpoint, kind, layers or KINDS[kind][2])
        print(f"{kind}: {parameters / 1e6:,.0f} million parameters, a text of {tokens} tokens")
        again = [sys.executable, __file__, str(folder), "--tokens", str(tokens)]
        bundles = {name: folder / name for name in ("fp32", "int8")}
        for name, bundle in bundles.items():
            taken, most = watched([*EXPORT, str(checkpoint), str(bundle), "--precision", name])
            print(f"export and certificate, {name}: {taken:.0f} s, {most / 1e9:.2f} GB at most", flush=True)
            done = subprocess.run([*again, "--precision", name], check=True, capture_output=True, text=True)
            held = json.loads(done.stdout.splitlines()[-1])
            size = sum(path.stat().st_size for path in bundle.glob(f"model{'' if name == 'fp32' else '.int8'}.onnx*"))
            print(
                f"{name}: {held['loaded'] / 1e6:,.0f} MB once loaded (a file of {size / 1e6:,.0f} MB), "
                f"{held['above'] / 1e6:,.0f} MB more while it scores"
            )
            other, of, shared = other_bits(bundle, name)
            print(f"{name}: {other} of {of} rewards have other bits than alone; {shared:.0%} of the tokens were reused")
        for name, rate in compare(checkpoint, bundles, tokens).items():
            print(f"{name}: {rate:,.0f} tokens/s")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
