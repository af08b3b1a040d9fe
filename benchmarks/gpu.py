"""What a GPU makes of a bundle, beside torch on the same GPU.

    python benchmarks/gpu.py CHECKPOINT BUNDLE DATA [--rows 100] [--rounds 2]

CHECKPOINT is the reward model, BUNDLE its export with fp32 and half (and tensorrt), and DATA as for bench.py. Needs
`rewardrt[gpu]` and a torch with CUDA. TensorRT's rows, by the classic provider and by the plug-in, and vLLM's are there
where they start; else a line says why not. All systems score the same token ids; they take turns, and the seconds are
from token ids to rewards. The defaults are for 8 minutes on one GPU with the 135M model: `--rows 100 --rounds 2`.

The TensorRT and vLLM rows have never run: there was no GPU to run them on.
"""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import click
from checkpoint import convert
from systems import PEERS
from tokenizers import Tokenizer
from workloads import Sizes, write_workloads

from rewardrt.bundle.manifest import Bundle, read_bundle
from rewardrt.checks.bench import LATENCY_TOKENS, list_candidates, model_command
from rewardrt.checks.workers import Outputs, Worker
from rewardrt.checks.workload import Workload, compare, read_workload, texts_of_length
from rewardrt.machine.providers import WAYS_TO_TENSORRT, Way, why_not_way

MAX_LENGTH = 1024
PAD = 3  # an id that no text of the reference model ends with
CALLS = 20  # with single texts of each length
TORCH = {"bfloat16": ("file", "budget"), "float16": ("budget",), "float32": ("budget",)}
OURS = "rewardrt fp32"


@dataclass
class Candidate:
    """A worker, the loops that it is asked for, and what was measured of it by workload and loop."""

    worker: Worker
    loops: tuple[str, ...]
    mib: int = 0  # of the GPU's memory, after it has seen every workload
    seconds: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    outputs: dict[tuple[str, str], Outputs] = field(default_factory=dict)


def used_mib() -> int:
    """Return the memory in use on the first GPU."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0])


def list_commands(opened: Bundle, checkpoint: Path) -> dict[str, tuple[list[str], tuple[str, ...]]]:
    """Return the command of every worker, and its loops."""
    commands = {}
    for name, (_, options) in list_candidates(opened, provider="cuda").items():
        commands[f"rewardrt {name}"] = (model_command(opened.path, options), ("all",))
        if name == "half":  # alone among graphs for a GPU, it computes once what several texts begin with
            alone = model_command(opened.path, options | {"prefix_reuse": False})
            commands["rewardrt half, no reuse"] = (alone, ("all",))
    for way in WAYS_TO_TENSORRT:
        if (reason := why_no_row(opened, way)) is not None:
            click.echo(f"no row for {way}: {reason}", err=True)
            continue
        command = model_command(opened.path, {"provider": "tensorrt", "precision": "tensorrt"})
        commands[f"rewardrt {way}"] = (["env", f"REWARDRT_TENSORRT={way}", *command], ("all",))
    if importlib.util.find_spec("vllm") is not None:
        commands["vllm bfloat16"] = ([sys.executable, str(PEERS / "vllm_classify.py"), str(checkpoint)], ("budget",))
    else:
        click.echo("no row for vllm: it is not installed", err=True)
    for precision, loops in TORCH.items():
        command = [sys.executable, str(PEERS / "torch_loop.py"), str(checkpoint), precision, "cuda"]
        commands[f"torch {precision}"] = (command, loops)
    return commands


def why_no_row(opened: Bundle, way: Way) -> str | None:
    """Return why TensorRT cannot be measured by a way, or None."""
    if all(variant.precision != "tensorrt" for variant in opened.manifest.variants):
        return "the bundle has no tensorrt graph; export it with --precision tensorrt"
    return why_not_way(way)


def start(
    commands: dict[str, tuple[list[str], tuple[str, ...]]], opened: Bundle, files: dict[str, Path]
) -> tuple[dict[str, Candidate], dict[str, Workload]]:
    """Load one after the other, and let each score everything once: it warms up, and takes what memory it will."""
    candidates: dict[str, Candidate] = {}
    workloads: dict[str, Workload] = {}
    for name, (command, loops) in commands.items():
        before = used_mib()
        candidates[name] = Candidate(Worker(name, command), loops)
        candidates[name].worker.wait()
        if not workloads:  # ours are first, and they alone can read a file
            for file, path in files.items():
                workloads[file] = read_workload(
                    candidates[name].worker, opened.manifest.spec, path, rows=None, max_length=MAX_LENGTH
                )
        for workload in workloads.values():
            candidates[name].worker.score(workload.texts, loop=loops[-1])
        candidates[name].mib = used_mib() - before
    return candidates, workloads


def measure(candidates: dict[str, Candidate], workloads: dict[str, Workload], rounds: int) -> None:
    """Score every workload so many times, in turns."""
    for file, workload in workloads.items():
        for _ in range(rounds):
            for each in candidates.values():
                for loop in each.loops:
                    timed = each.worker.score(workload.texts, loop=loop)
                    each.seconds.setdefault((file, loop), []).append(timed.seconds)
                    each.outputs[file, loop] = timed.outputs


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Print a table in markdown."""
    for row in (head, ["---"] * len(head), *rows):
        click.echo(f"| {' | '.join(row)} |")
    click.echo()


def print_rates(candidates: dict[str, Candidate], workloads: dict[str, Workload]) -> None:
    """Print what `measure` found."""
    held_out, reference = workloads["held out"], candidates[OURS].outputs["held out", "all"]
    rows = []
    for name, each in candidates.items():
        for loop in each.loops:
            near = compare(held_out, each.outputs["held out", loop], reference)
            rates = [
                f"{workload.tokens / statistics.median(each.seconds[file, loop]):,.0f}"
                for file, workload in workloads.items()
            ]
            label = name if loop == "all" else f"{name}, {loop}"
            agreement = f"{near.agreement or 0:.1%} of {near.preferences}"
            rows.append([label, *rates, agreement, f"{near.rms_std:.4f}", f"{each.mib:,}"])
    click.echo(f"Tokens per second; agreement and rms (standard deviations) with {OURS}, held out; MiB of the GPU.\n")
    print_table(["", *workloads, "agreement", "rms", "MiB"], rows)


def print_singles(candidates: dict[str, Candidate], workload: Workload, opened: Bundle) -> None:
    """Print the time of calls with one text."""
    rows = []
    for name, each in candidates.items():
        row = [name]
        for tokens in LATENCY_TOKENS:
            texts = texts_of_length(workload, opened.manifest.spec, tokens)
            times = [each.worker.score([next(texts)], loop="single").seconds for _ in range(CALLS + 2)]
            row.append(f"{statistics.median(times[2:]) * 1e3:.1f}")
        rows.append(row)
    click.echo("One text, ms.\n")
    print_table(["", *(f"{tokens} tokens" for tokens in LATENCY_TOKENS)], rows)


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.argument("data", type=click.Path(exists=True, path_type=Path))
@click.option("--rows", default=100, show_default=True, help="Of each file of pairs; of best-of-16, a twentieth.")
@click.option("--rounds", default=2, show_default=True)
def main(checkpoint: Path, bundle: Path, data: Path, rows: int, rounds: int) -> None:
    """Print tables of speed, agreement and memory, and of single texts."""
    opened = read_bundle(bundle)
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    candidates: dict[str, Candidate] = {}
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "checkpoint"
        convert(checkpoint, converted, PAD)
        sizes = Sizes(rows, rows, rows, max(1, rows // 20), rows, max(1, rows // 4))
        files = write_workloads(data, Path(folder), sizes, lambda text: len(tokenizer.encode(text).ids))
        try:
            candidates, workloads = start(list_commands(opened, converted), opened, files)
            measure(candidates, workloads, rounds)
            print_rates(candidates, workloads)
            print_singles(candidates, workloads["harmless"], opened)
        finally:
            for each in candidates.values():
                each.worker.close()


if __name__ == "__main__":
    main()
