"""`rewardrt evaluate`: run benchmarks on a bundle, with intervals, comparisons and a report."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import click

from rewardrt.cli import toplevel
from rewardrt.cli.engine_options import engine_log
from rewardrt.cli.options import example, json_option, normalize_option, provider_option, threads_option
from rewardrt.cli.output import show, show_json
from rewardrt.cli.progress import Progress
from rewardrt.cli.score import read_columns
from rewardrt.cli.toplevel import interruptible
from rewardrt.data.files import Summary
from rewardrt.data.readers import RowReader
from rewardrt.evaluate.benchmarks import BENCHMARKS
from rewardrt.evaluate.evaluation import as_json as plain
from rewardrt.evaluate.evaluation import card_line
from rewardrt.evaluate.report import prepare, write_report
from rewardrt.evaluate.run import Plan, run
from rewardrt.evaluate.sources import Options
from rewardrt.evaluate.statistics import RESAMPLES
from rewardrt.evaluate.summary import describe
from rewardrt.machine.providers import ProviderChoice
from rewardrt.reward_model import RewardModel


def _parse_columns(context: click.Context, option: click.Parameter, value: str) -> dict[str, str]:
    needs = (need for layout in BENCHMARKS.values() for need in (*layout.needs, *layout.needs_one_of))
    return read_columns(value, tuple(dict.fromkeys((*(need.name for need in needs), "domain"))))


@click.command(
    short_help="Measure accuracy on benchmarks or your pairs.",
    epilog=example("rewardrt evaluate bundle pairs.jsonl", "rewardrt evaluate bundle pairs.jsonl --report report"),
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--report", type=click.Path(path_type=Path), metavar="DIR", help="Write a page and its data to DIR.")
@click.option("--by", metavar="FIELD", help="Also report the score for each value of FIELD.")
@click.option(
    "--against",
    metavar="OTHER",
    help="Compare with another bundle, or with the rewards in fields of the rows: FIELD[,FIELD...].",
)
@click.option(
    "--layout", type=click.Choice(list(BENCHMARKS)), help="The files' format.  [default: recognised by their fields]"
)
@click.option(
    "--columns",
    callback=_parse_columns,
    default="",
    metavar="FIELD=NAME,...",
    help="The files' names of fields, such as prompt=question,chosen=better.",
)
@click.option("--rows", type=click.IntRange(min=1), help="Only the first rows of each file.  [default: all]")
@provider_option
@click.option(
    "--precision",
    default="auto",
    show_default=True,
    help="One of the bundle's graphs; all: each that runs here, compared with fp32 on the CPU.",
)
@normalize_option
@click.option(
    "--threshold",
    type=float,
    default=0.5,
    show_default=True,
    help="For steps: a step with a lower reward is predicted to be wrong.",
)
@click.option(
    "--resamples",
    type=click.IntRange(min=100, max=100_000),
    default=RESAMPLES,
    show_default=True,
    help="Number of bootstrap samples for the intervals.",
)
@threads_option
@json_option
def evaluate(
    bundle: Path,
    files: tuple[str, ...],
    report: Path | None,
    by: str | None,
    against: str | None,
    layout: str | None,
    columns: dict[str, str],
    rows: int | None,
    provider: ProviderChoice,
    precision: str,
    normalize: bool | None,
    threshold: float,
    resamples: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure how good a reward model is, on files of published benchmarks or of your own.

    RewardBench, RewardBench 2, RM-Bench, JudgeBench and ProcessBench are recognised by the fields of their rows. So are
    other files of pairs (chosen, rejected) and of several answers (responses with correct, or lists of chosen and
    rejected).

    Nothing is downloaded. Files are JSON arrays, JSONL, Parquet, and the other formats that `rewardrt score` reads.
    """
    if report is not None:
        prepare(report)
    options = Options(columns, layout, by, rows, normalize, threshold)
    bars: list[Progress] = []

    def load(path: Path, provider: ProviderChoice, precision: str) -> RewardModel:
        with engine_log():
            model = RewardModel.load(path, provider=provider, precision=precision, threads=threads)
        note = f" ({model.session.note})" if model.session.note else ""
        toplevel.say(f"{model.bundle.name}: {model.precision} on {model.session.runs_on}{note}")
        return model

    def watch(model: RewardModel, reader: RowReader) -> Callable[[Summary], None]:
        bars.append(Progress(reader.share, lambda: model.statistics))
        return bars[-1]

    def tick() -> None:
        for bar in bars[-1:]:
            bar.tick()

    plan = Plan(bundle, files, options, provider, precision, against, resamples)
    try:
        subject, evaluations = interruptible(lambda: run(plan, load, watch), tick)
    finally:
        for bar in bars:
            bar.finish()
    version = importlib.metadata.version("rewardrt")
    card = [card_line(each, subject, version) for each in evaluations]
    data = {"rewardrt": version, "model": plain(subject), "card": card, "evaluations": plain(evaluations)}
    if report is not None:
        toplevel.say(f"report: {write_report(report, data, evaluations, subject)}")
    if as_json:
        show_json(data)
    else:
        show("\n\n".join([*(describe(each, subject) for each in evaluations), "\n".join(card)]))
    if any(each.failed for each in evaluations):
        raise SystemExit(1)
