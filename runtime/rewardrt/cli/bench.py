"""`rewardrt bench`."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path

import click

from rewardrt.cli import toplevel
from rewardrt.cli.options import example, provider_option, threads_option
from rewardrt.cli.output import json_bytes, show
from rewardrt.machine.providers import ProviderChoice


@click.command(
    short_help="Measure speed and memory on your rows.", epilog=example("rewardrt bench bundle rows.jsonl --rows 200")
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path), metavar="INPUT.jsonl")
@click.option("--rows", type=click.IntRange(min=1), help="Only the first rows of the file.  [default: all]")
@click.option("--max-length", type=click.IntRange(min=1), help="Cut texts at this many tokens.  [default: the model's]")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Times to score the file.")
@provider_option
@threads_option
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the figures to this file as well.")
def bench(
    bundle: Path,
    file: Path,
    rows: int | None,
    max_length: int | None,
    rounds: int,
    provider: ProviderChoice,
    threads: int | None,
    output: Path | None,
) -> None:
    """Measure every graph of a bundle on the rows of a file: speed, agreement with fp32, memory, latency.

    Graphs made for another provider are left out. The graphs take turns, each in a process of its own, and all are in
    memory at once. GPU memory is not measured.
    """
    from rewardrt.checks.bench import bench as run
    from rewardrt.checks.bench import format_report
    from rewardrt.data.outputs import open_output

    with open_output(output) if output is not None else nullcontext() as stream:  # fails now if it cannot be written
        report = run(
            bundle,
            file,
            rows=rows,
            max_length=max_length,
            rounds=rounds,
            provider=provider,
            threads=threads,
            progress=toplevel.say,
        )
        show(format_report(report))
        if stream is not None:
            stream.write(json_bytes(dataclasses.asdict(report)))
