"""What the export of a model that does not fit in memory takes: a random one is written, exported, scored and deleted.

    python benchmarks/big_checkpoint.py FOLDER [--shape 8b] [--precision int8] [--certify]

FOLDER needs room for the bfloat16 checkpoint (15 GB for 8b) and the graph beside it (9 GB in int8, 30 GB in fp32).
Memory is what a process holds of its own (RssAnon of /proc/PID/status, sampled every 50 ms): pages of mapped files,
which the system takes back when it wants, are not counted.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file

TINY = Path(__file__).parent.parent / "models" / "tiny"
SHARD_BYTES = 4 * 10**9
START = [sys.executable, "-c", "from rewardrt.cli.app import main; main()"]


@dataclass(frozen=True)
class Shape:
    """A llama: layers, sizes, heads of queries and of keys and values, vocabulary."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int


SHAPES = {
    "8b": Shape(32, 4096, 14336, 32, 8, 128256),
    "1b": Shape(16, 2048, 8192, 32, 8, 128256),
    "small": Shape(2, 64, 128, 4, 2, 4096),
}


def write_checkpoint(folder: Path, shape: Shape) -> int:
    """Write a random bfloat16 reward model in shards, one shard in memory at a time; returns its parameters."""
    head_dim = shape.hidden // shape.heads
    kv = shape.kv_heads * head_dim
    linear = {
        "self_attn.q_proj": (shape.hidden, shape.hidden), "self_attn.k_proj": (kv, shape.hidden),
        "self_attn.v_proj": (kv, shape.hidden), "self_attn.o_proj": (shape.hidden, shape.hidden),
        "mlp.gate_proj": (shape.intermediate, shape.hidden), "mlp.up_proj": (shape.intermediate, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.intermediate),
    }  # fmt: skip
    sizes = {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden), "score.weight": (1, shape.hidden)}
    norms = ["model.norm.weight"]
    for layer in range(shape.layers):
        sizes |= {f"model.layers.{layer}.{name}.weight": size for name, size in linear.items()}
        norms += [f"model.layers.{layer}.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")]
    config: dict[str, Any] = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
    config |= {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": head_dim,
        "vocab_size": shape.vocabulary,
        "dtype": "bfloat16",
    }
    folder.mkdir(parents=True)
    for file in TINY.iterdir():
        if file.name not in ("model.safetensors", "config.json"):
            shutil.copyfile(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    torch.manual_seed(0)
    where: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(where.values())):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, name))
        shard.clear()

    for name in [*norms, *sizes]:
        if name in sizes:
            rows, columns = sizes[name]
            shard[name] = torch.empty(rows, columns, dtype=torch.bfloat16).normal_(std=columns**-0.5)
        else:
            shard[name] = torch.ones(shape.hidden, dtype=torch.bfloat16)
        if sum(2 * tensor.numel() for tensor in shard.values()) >= SHARD_BYTES:
            flush()
    flush()
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return sum(rows * columns for rows, columns in sizes.values()) + len(norms) * shape.hidden


def watch(process: subprocess.Popen[str]) -> int:
    """Wait for a process and return the most memory of its own that it held, in bytes."""
    most = 0
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii").splitlines()
        except OSError:
            break
        held = [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")]
        most = max(most, *held, 0)
        time.sleep(0.05)
    return most


def run(arguments: list[str], text: str | None = None) -> tuple[str, float, int]:
    """Run a rewardrt command and return its output, its seconds and its most memory; raises ClickException."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+") as out:
        given.write(text or "")
        given.seek(0)
        process = subprocess.Popen([*START, *arguments], stdin=given, stdout=out, text=True)
        most = watch(process)
        if process.wait():
            raise click.ClickException(f"rewardrt {' '.join(arguments)}: exit status {process.returncode}")
        out.seek(0)
        return out.read(), time.perf_counter() - start, most


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--shape", type=click.Choice(list(SHAPES)), default="8b", show_default=True)
@click.option("--precision", default="int8", show_default=True, help="Of the graph.")
@click.option("--certify", is_flag=True, help="Compare with torch: layer by layer where the model does not fit.")
@click.option("--texts", default=2, show_default=True, help="Texts of about 100 tokens to score.")
def main(folder: Path, shape: str, precision: str, certify: bool, texts: int) -> None:
    """Write, export, score and delete."""
    work = Path(tempfile.mkdtemp(prefix="big-checkpoint-", dir=folder))
    try:
        parameters = write_checkpoint(work / "checkpoint", SHAPES[shape])
        size = sum(file.stat().st_size for file in (work / "checkpoint").glob("*.safetensors"))
        click.echo(f"checkpoint: {parameters:,} parameters, {size / 1e9:.1f} GB in bfloat16")
        options = ["--precision", precision, *([] if certify else ["--no-certify"])]
        _, seconds, most = run(["export", str(work / "checkpoint"), str(work / "bundle"), *options])
        size = sum(file.stat().st_size for file in (work / "bundle").iterdir())
        click.echo(f"export: {seconds:.0f} s, {most / 1e9:.2f} GB of memory, bundle {size / 1e9:.1f} GB")
        click.echo(run(["inspect", str(work / "bundle")])[0])
        shutil.rmtree(work / "checkpoint")  # room for nothing else is taken while the bundle is loaded
        rows = [{"prompt": f"Question {number}: " + "why " * 80, "response": "Because."} for number in range(texts)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        found, seconds, most = run(["score", str(work / "bundle"), "-"], lines)
        rewards = [json.loads(line)["reward"] for line in found.splitlines()]
        click.echo(f"score: {seconds:.0f} s with loading, {most / 1e9:.2f} GB of memory, rewards {rewards}")
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
