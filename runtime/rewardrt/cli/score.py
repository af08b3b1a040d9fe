"""`rewardrt score`: score rows of files, or one prompt with its answers."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from rewardrt.bundle.spec import AGGREGATE_RULES, AggregateRule
from rewardrt.cli import toplevel
from rewardrt.cli.engine_options import engine_log
from rewardrt.cli.options import (
    example,
    json_option,
    normalize_option,
    precision_option,
    provider_option,
    threads_option,
)
from rewardrt.cli.output import show, width_of
from rewardrt.cli.score_files import say_truncated, score_files, score_pieces
from rewardrt.cli.table import objectives_lines, ranking_table
from rewardrt.data.inputs import absolute, find_inputs, is_uri
from rewardrt.data.jobs import Job, JobOptions
from rewardrt.data.lines import to_line
from rewardrt.data.output_formats import OUTPUT_FORMATS, format_of
from rewardrt.data.outputs import open_output
from rewardrt.data.pieces import PieceWork
from rewardrt.data.readers import RowReader
from rewardrt.data.selection import Selection
from rewardrt.data.shards import read_shard, shard_bounds
from rewardrt.errors import RewardRTError
from rewardrt.machine.providers import ProviderChoice
from rewardrt.reward_model import RewardModel
from rewardrt.scoring.scored import OUTPUT_FIELDS, Scored, fill_row
from rewardrt.text.rows import INPUT_FIELDS, TEMPLATE_FIELDS


def read_columns(value: str, names: Collection[str]) -> dict[str, str]:
    """Parse `prompt=question,response=answer` to the user's names by ours, which must be among `names`."""
    found: dict[str, str] = {}
    for part in filter(None, value.split(",")):
        ours, _, theirs = part.partition("=")
        if ours not in names or not theirs:
            raise click.BadParameter(f"{part!r}: expected FIELD=NAME, with FIELD one of {', '.join(names)}")
        if theirs in OUTPUT_FIELDS or theirs in found.values():
            raise click.BadParameter(f"{part!r}: {theirs} is named twice, or a field that scoring adds; rename it")
        if ours != theirs:
            found[ours] = theirs
    return found


def _parse_columns(context: click.Context, option: click.Parameter, value: str) -> dict[str, str]:
    return read_columns(value, (*INPUT_FIELDS, *TEMPLATE_FIELDS, "steps", "instruction"))


@click.command(
    short_help="Score a file of rows, or one answer.",
    epilog=example(
        "rewardrt score bundle rows.jsonl --table",
        "rewardrt score bundle rows.jsonl -o scored.jsonl",
        'rewardrt score bundle --prompt "A colour?" --response Blue.',
    ),
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("sources", metavar="[INPUT... | -]", nargs=-1)
@click.option("-o", "--output", help="Write rows to this file instead of standard output.")
@click.option(
    "--format",
    "format_name",
    type=click.Choice(list(OUTPUT_FORMATS)),
    help="The output's format.  [default: as its name says, else jsonl]",
)
@click.option("--resume", is_flag=True, help="Continue an --output that was not finished.")
@click.option(
    "--columns",
    callback=_parse_columns,
    default="",
    metavar="FIELD=NAME,...",
    help="The input's names of fields, such as prompt=question,response=answer.",
)
@click.option(
    "--group-by", metavar="FIELD", help="Join consecutive rows with the same FIELD to one row with responses."
)
@click.option("--best", is_flag=True, help="Keep only the best answer of a row with several, with its reward.")
@click.option("--top", type=click.IntRange(min=1), metavar="K", help="Keep the K best answers of a row with several.")
@click.option(
    "--min-margin",
    type=float,
    metavar="REWARD",
    help="Keep rows whose best answer is at least this far above the second, or chosen above rejected.",
)
@click.option(
    "--ray",
    "ray_address",
    is_flag=False,
    flag_value="local",
    metavar="[ADDRESS]",
    help="Score on Ray: on this machine, or the cluster at ADDRESS (auto, HOST:PORT, ray://...). Write it last.",
)
@click.option(
    "--actors", type=click.IntRange(min=1), help="Processes on Ray.  [default: one per GPU, or one per machine]"
)
@click.option("--shard", metavar="I/N", help="Score the I-th of N parts of the rows; rows of one prompt stay together.")
@click.option("--prompt", help="Score one prompt instead of a file.")
@click.option("--response", "responses", multiple=True, help="An answer to --prompt; several are ranked.")
@click.option(
    "--instruction", help="The instruction (what is judged) of rows that have none, for models that read one."
)
@provider_option
@precision_option
@normalize_option
@click.option("--objectives", is_flag=True, help="Add the named values that the reward is made of.")
@click.option(
    "--aggregate",
    type=click.Choice(AGGREGATE_RULES),
    help="How to combine the rewards of an answer's steps, for models that reward steps.",
)
@click.option("--batch-tokens", type=click.IntRange(min=1), help="Tokens in one batch, padding included.")
@click.option(
    "--no-prefix-reuse", is_flag=True, help="Compute every text from its first token, even if texts share a prefix."
)
@click.option(
    "--prefix-cache-mb",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Memory for prefixes that later parts of a long file share, in MiB.",
)
@threads_option
@click.option("--table", is_flag=True, help="Print answers ranked, for people, instead of JSONL rows.")
@json_option
def score(
    bundle: Path,
    sources: tuple[str, ...],
    output: str | None,
    format_name: str | None,
    resume: bool,
    columns: dict[str, str],
    group_by: str | None,
    best: bool,
    top: int | None,
    min_margin: float | None,
    ray_address: str | None,
    actors: int | None,
    shard: str | None,
    prompt: str | None,
    responses: tuple[str, ...],
    instruction: str | None,
    provider: ProviderChoice,
    precision: str,
    normalize: bool | None,
    objectives: bool,
    aggregate: AggregateRule | None,
    batch_tokens: int | None,
    no_prefix_reuse: bool,
    prefix_cache_mb: int,
    threads: int | None,
    table: bool,
    as_json: bool,
) -> None:
    """Score rows of files, folders, globs, URIs or standard input, or one --prompt with its --response.

    Files are JSONL (optionally compressed by gzip or zstd), a JSON array, Parquet, Arrow, or a folder saved by
    `datasets`. A row has text, or messages, or prompt (or messages) with response, responses, steps, or chosen and
    rejected. Rows come out in the same order with their rewards added; a row that cannot be scored comes out with
    `error`.
    """
    of_files = bool(resume or columns or group_by or best or top or shard) or min_margin is not None
    wrong = {
        "give either input files (or - for standard input) or --prompt with --response": (prompt is None)
        == (not sources),
        "--prompt needs at least one --response": prompt is not None and not responses,
        "--response goes with --prompt; rows of a file bring their own": bool(responses) and prompt is None,
        "--aggregate is for rows with steps; --prompt with --response has none": bool(aggregate and prompt is not None),
        "--table prints a file's rows for people; it goes with no --json, --output or --prompt": table
        and bool(as_json or output or prompt is not None),
        "--best is --top 1 with one answer in the row; give one of them": best and top is not None,
        "--prompt is scored as it is; the options for files go with input files": prompt is not None and of_files,
        f"--ray {ray_address}: expected local, auto, HOST:PORT or ray://HOST:PORT; write it last": ray_address
        not in (None, "local", "auto")
        and ":" not in str(ray_address),
        "--ray needs --output, and goes with no --table and no --shard": ray_address is not None
        and bool(output in (None, "-") or table or shard),
        "--table shows rows of JSON; leave out --format": table and format_name not in (None, "jsonl"),
        "--actors goes with --ray": actors is not None and ray_address is None,
    }
    for message, found in wrong.items():
        if found:
            raise click.UsageError(message)
    load: dict[str, Any] = {
        "provider": provider,
        "precision": precision,
        "threads": threads,
        "batch_tokens": batch_tokens,
        "prefix_reuse": not no_prefix_reuse,
        "prefix_cache_mb": prefix_cache_mb,
    }
    with engine_log():
        model = RewardModel.load(bundle, **load)
    toplevel.say(
        f"{model.bundle.name}: {model.precision} on {model.session.runs_on}"
        + (f" ({model.session.note})" if model.session.note else "")
    )
    labels = tuple(model.spec.output.labels) if objectives else ()
    if objectives and not labels:
        raise RewardRTError(f"--objectives: {model.bundle.name} has none; its reward is not made of several values")
    if prompt is not None:
        if instruction is not None:
            model.answers.use_instruction(instruction)
        _score_prompt(model, prompt, responses, normalize, labels, output, as_json)
        return
    reader = RowReader(find_inputs(sources, output))
    names = {theirs: ours for ours, theirs in columns.items()}
    selection = Selection(best, top, min_margin, names.get(group_by, group_by) if group_by is not None else None)
    options = JobOptions(normalize, aggregate, labels, instruction, selection, columns)
    if shard is not None:
        options = replace(options, rows=shard_bounds(reader, *read_shard(shard), options.prompt_field))
    job, format_name = Job(model, reader, options), format_name or format_of((output or "").rstrip("/"))
    in_folder = output is not None and (is_uri(output) or output.endswith("/"))
    if ray_address is not None or in_folder:
        assert output is not None
        work = PieceWork(
            model.bundle.address, absolute([file.name for file in reader.files]), output, format_name, options, load
        )
        score_pieces(job, work, resume=resume, ray_address=ray_address, actors=actors, joined=not in_folder)
    else:
        score_files(job, output, format_name, resume=resume, table=table)


def _score_prompt(
    model: RewardModel,
    prompt: str,
    responses: Sequence[str],
    normalize: bool | None,
    labels: Sequence[str],
    output: str | None,
    as_json: bool,
) -> None:
    """Print the reward of one answer, the ranking of several, or with --json the row."""
    row: dict[str, Any] = {"prompt": prompt}
    row |= {"response": responses[0]} if len(responses) == 1 else {"responses": list(responses)}
    (scored,) = model.score_rows([row], normalize=normalize)
    if isinstance(scored, RewardRTError):
        raise scored
    filled = fill_row(row, scored, labels)
    if as_json or output:
        with open_output(output) as file:
            file.write(to_line(filled))
    elif isinstance(scored, Scored):
        values = [objectives_lines(filled["objectives"], width_of(sys.stdout))] if labels else []
        show("\n".join([f"{filled['reward']:.4f}", *values]))
    else:
        show(ranking_table(filled, width_of(sys.stdout)))
    say_truncated(sum(answer.truncated > 0 for answer in scored.answers), len(scored.answers), model.spec.max_length)
