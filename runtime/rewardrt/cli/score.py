"""`rewardrt score`: rows of a file, or one prompt with its answers."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import click

from rewardrt.bundle.spec import AGGREGATE_RULES, AggregateRule
from rewardrt.cli import toplevel
from rewardrt.cli.engine_options import engine_log
from rewardrt.cli.options import json_option, precision_option, provider_option, threads_option
from rewardrt.cli.output import for_people, show
from rewardrt.cli.table import describe_row, objectives_lines, ranking_table
from rewardrt.errors import RewardRTError
from rewardrt.machine.providers import ProviderChoice
from rewardrt.reward_model import RewardModel


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("source", metavar="[INPUT.jsonl | -]", required=False)
@click.option("-o", "--output", help="Write rows here instead of standard output; moved into place at the end.")
@click.option("--prompt", help="Score one prompt instead of a file.")
@click.option("--response", "responses", multiple=True, help="An answer to --prompt; several are ranked.")
@click.option(
    "--instruction", help="What is judged, for a model that reads one, in rows that do not say it themselves."
)
@provider_option
@precision_option
@click.option("--normalize/--raw", default=None, help="Normalised or raw rewards.  [default: as the bundle says, raw]")
@click.option("--objectives", is_flag=True, help="Add the values that the reward is made of, by name.")
@click.option(
    "--aggregate",
    type=click.Choice(AGGREGATE_RULES),
    help="One reward of those of the steps, for models that give those.",
)
@click.option("--batch-tokens", type=click.IntRange(min=1), help="Tokens in one batch, padding included.")
@click.option("--no-prefix-reuse", is_flag=True, help="Compute every text from its first token, shared or not.")
@click.option(
    "--prefix-cache-mb",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Memory for beginnings that later parts of a long file share.",
)
@threads_option
@click.option("--table", is_flag=True, help="Print answers ranked, for people, instead of JSONL rows.")
@json_option
def score(
    bundle: Path,
    source: str | None,
    output: str | None,
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
    """Score JSONL rows from a file or standard input, or one --prompt with its --response.

    A row holds text, or messages, or prompt (or messages) with response, responses, steps, or chosen and rejected. It
    comes out with its rewards added, in the same order; a row that cannot be scored comes out with `error`.
    """
    if (prompt is None) == (source is None):
        raise click.UsageError("give either an input file (or - for standard input) or --prompt with --response")
    if prompt is not None and not responses:
        raise click.UsageError("--prompt needs at least one --response")
    if responses and prompt is None:
        raise click.UsageError("--response goes with --prompt; rows of a file bring their own")
    if aggregate is not None and prompt is not None:
        raise click.UsageError("--aggregate is for rows with steps; --prompt with --response has none")
    if table and (as_json or output or prompt is not None):
        raise click.UsageError("--table prints a file's rows for people; it goes with no --json, --output or --prompt")
    with engine_log():
        model = RewardModel.load(
            bundle,
            provider=provider,
            precision=precision,
            threads=threads,
            batch_tokens=batch_tokens,
            prefix_reuse=not no_prefix_reuse,
            prefix_cache_mb=prefix_cache_mb,
        )
    toplevel.say(
        f"{bundle}: {model.precision} on {model.session.runs_on}"
        + (f" ({model.session.note})" if model.session.note else "")
    )
    if instruction is not None:
        model.answers.use_instruction(instruction)
    labels = model.spec.output.labels if objectives else ()
    if objectives and not labels:
        raise RewardRTError(f"--objectives: {bundle} has none; its reward is not made of several values")
    if prompt is not None:
        _score_prompt(model, prompt, responses, normalize, labels, output, as_json)
    else:
        assert source is not None
        _score_file(model, source, normalize, aggregate, labels, output, table)


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
    from rewardrt.data.files import open_output, to_line
    from rewardrt.scoring.scored import Scored, fill_row

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
        show("\n".join([f"{filled['reward']:.4f}", *([objectives_lines(filled["objectives"])] if labels else [])]))
    else:
        show(ranking_table(filled))
    _say_truncated(sum(answer.truncated > 0 for answer in scored.answers), len(scored.answers), model.spec.max_length)


def _score_file(
    model: RewardModel,
    source: str,
    normalize: bool | None,
    aggregate: AggregateRule | None,
    labels: Sequence[str],
    output: str | None,
    table: bool,
) -> None:
    from rewardrt.data.files import open_output, read_lines, score_file
    from rewardrt.data.formats import jsonl_lines

    progress = _Progress()

    def show_row(line: bytes) -> None:
        file.write(for_people(describe_row(json.loads(line), model, objectives=bool(labels))))

    # Not closed if it is interrupted: that waits for the thread that reads, and so for a line that may never come.
    lines = _open_input(source)
    with open_output(output) as file:
        summary = score_file(
            model.answers.prepare,
            partial(model.score_prepared, normalize=normalize, aggregate=aggregate),
            read_lines(jsonl_lines(lines, "standard input" if source == "-" else source)),
            show_row if table else file.write,
            labels=labels,
            progress=progress,
        )
    lines.close()
    seconds = progress.finish()
    toplevel.say(
        f"scored {summary.scored} of {summary.rows} rows: {summary.texts} texts, {summary.tokens} tokens "
        f"in {seconds:.1f} s ({summary.tokens / max(seconds, 1e-9):.0f} tokens/s)"
    )
    _say_truncated(summary.truncated_texts, summary.texts, model.spec.max_length)
    if summary.pairs:
        share = summary.pairs_right / summary.pairs
        ties = f", {summary.ties} ties" if summary.ties else ""
        toplevel.say(
            f"accuracy {share:.4f}: chosen above rejected in {summary.pairs_right} of {summary.pairs} pairs{ties}"
        )
    for name, rows in summary.unread.items():
        toplevel.say(f"{rows} row{'s' if rows > 1 else ''} had the field `{name}`, which nothing read")
    if summary.failed:
        toplevel.say(f"{summary.failed} of {summary.rows} rows could not be scored; they have `error`")
        sys.exit(1)


def _open_input(source: str) -> BinaryIO:
    from rewardrt.data.formats import open_input

    if source != "-":
        return open_input(source)
    if sys.stdin is None:
        raise RewardRTError("standard input is closed; send it rows, or name a JSONL file")
    # Not sys.stdin.buffer: Python takes its lock when it ends, which a thread that waits for a line holds.
    return open(sys.stdin.fileno(), "rb", closefd=False)


class _Progress:
    """Counts rows on a terminal's standard error; silent elsewhere."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._shown = False

    def __call__(self, summary: Any) -> None:
        if sys.stderr.isatty():
            self._shown = True
            self._write(f"\r{summary.rows} rows, {summary.tokens} tokens")

    def finish(self) -> float:
        """Clear the line, and return the seconds since the start."""
        if self._shown:
            self._write("\r\033[K")
        return time.perf_counter() - self._start

    @staticmethod
    def _write(text: str) -> None:
        with suppress(OSError):  # scoring goes on without a terminal
            click.echo(text, nl=False, err=True)


def _say_truncated(cut: int, texts: int, limit: int) -> None:
    if cut:
        toplevel.say(f"{cut} of {texts} texts were cut at {limit} tokens; `truncated` says by how much")
