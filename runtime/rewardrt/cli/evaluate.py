"""`rewardrt evaluate`: benchmarks through a bundle, with intervals, comparisons and a report."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from rewardrt.bundle.manifest import MANIFEST, read_bundle
from rewardrt.cli import toplevel
from rewardrt.cli.engine_options import engine_log
from rewardrt.cli.options import json_option, provider_option, threads_option
from rewardrt.cli.output import show, show_json
from rewardrt.cli.progress import Progress
from rewardrt.cli.score import parse_columns
from rewardrt.cli.toplevel import interruptible
from rewardrt.data.files import Summary
from rewardrt.data.readers import RowReader
from rewardrt.errors import RewardRTError
from rewardrt.machine.providers import ProviderChoice, select_provider
from rewardrt.reward_model import RewardModel

ALL = "all"
_BENCHMARKS = (
    "rewardbench",
    "rewardbench-2",
    "rm-bench",
    "judgebench",
    "processbench",
    "best-of-n",
    "chosen-rejected-lists",
    "pairs",
)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--report", type=click.Path(path_type=Path), metavar="DIR", help="Write a page and its data to DIR.")
@click.option("--by", metavar="FIELD", help="The score of the rows with each value of FIELD, too.")
@click.option(
    "--against",
    metavar="OTHER",
    help="Compare with another bundle, or with the rewards in the fields FIELD[,FIELD...] of the rows.",
)
@click.option("--layout", type=click.Choice(_BENCHMARKS), help="What the files are.  [default: as their fields say]")
@click.option(
    "--columns",
    callback=parse_columns,
    default="",
    metavar="FIELD=NAME,...",
    help="What the files call fields: prompt=question,chosen=better.",
)
@click.option("--rows", type=click.IntRange(min=1), help="Only the first rows of each file.  [default: all]")
@provider_option
@click.option(
    "--precision",
    default="auto",
    show_default=True,
    help="One of the bundle's graphs; all: each that runs here, beside fp32. With a provider also fp32 on the CPU.",
)
@click.option("--normalize/--raw", default=None, help="Normalised or raw rewards.  [default: as the bundle says, raw]")
@click.option(
    "--threshold",
    type=float,
    default=0.5,
    show_default=True,
    help="Of steps: below this reward a step is taken to be wrong.",
)
@click.option(
    "--resamples",
    type=click.IntRange(min=100, max=100_000),
    default=1000,
    show_default=True,
    help="Bootstrap samples, of which the intervals are made.",
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
    """Say how good a reward model is, by benchmarks as they are distributed.

    RewardBench, RewardBench 2, RM-Bench, JudgeBench and ProcessBench are known by the fields of their rows; so are other
    files of pairs (chosen, rejected) and of several answers (responses with correct, or lists of chosen and rejected).
    Nothing is downloaded. Files are JSON arrays, JSONL, Parquet, or what else `rewardrt score` reads.
    """
    from rewardrt.evaluate.evaluation import Evaluation, Subject, as_json as plain, card_line, compare, with_comparison
    from rewardrt.evaluate.evaluation import evaluate as make
    from rewardrt.evaluate.scoring import Scores, score_sources
    from rewardrt.evaluate.sources import Options, Source, find_sources
    from rewardrt.evaluate.summary import describe

    if report is not None:
        from rewardrt.evaluate.report import prepare

        prepare(report)
    other = Path(against) if against is not None and (Path(against) / MANIFEST).exists() else None
    earlier = tuple(filter(None, against.split(","))) if against is not None and other is None else ()
    options = Options(columns, layout, by, rows, normalize, threshold, earlier)
    grouped: dict[str, list[Source]] = {}
    for source in find_sources(files, options):
        grouped.setdefault(source.layout.name, []).append(source)

    def score(path: Path, graph: dict[str, Any], options: Options) -> tuple[Subject, list[Scores]]:
        with engine_log():
            model = RewardModel.load(path, threads=threads, **graph)
        note = f" ({model.session.note})" if model.session.note else ""
        toplevel.say(f"{path}: {model.precision} on {model.session.runs_on}{note}")
        found = [_score(model, each, options, score_sources) for each in grouped.values()]
        return Subject.of(model, normalize), found

    graphs = _graphs(bundle, provider, precision)
    subject, scored = score(bundle, graphs[0], options)
    evaluations: list[Evaluation] = [make(each, subject, by=by or "", resamples=resamples) for each in scored]

    def add(name: str, others: Sequence[Any]) -> None:
        for index, (ours, theirs) in enumerate(zip(scored, others, strict=True)):
            found = compare(ours, theirs, name, resamples=resamples)
            evaluations[index] = with_comparison(evaluations[index], found)

    plain_options = Options(columns, layout, by, rows, normalize, threshold)
    for graph in graphs[1:]:
        their_subject, theirs = score(bundle, graph, plain_options)
        add(their_subject.graph, [each.results for each in theirs])
    if other is not None:
        their_subject, theirs = score(other, {"provider": provider, "precision": "auto"}, plain_options)
        add(f"{their_subject.bundle}, {their_subject.graph}", [each.results for each in theirs])
    if earlier:
        for each in scored:
            if each.earlier is None or not each.earlier.rows:
                first = each.not_compared[0].message if each.not_compared else "no row was scored"
                raise RewardRTError(f"--against {against}: no row has such rewards, and it is no bundle; the first: {first}")
        add(f"the rewards in {against}", [each.earlier for each in scored])
    version = importlib.metadata.version("rewardrt")
    card = [card_line(each, subject, version) for each in evaluations]
    data = {"rewardrt": version, "model": plain(subject), "card": card, "evaluations": plain(evaluations)}
    if report is not None:
        from rewardrt.evaluate.report import write_report

        written = write_report(report, data, evaluations, subject)
        toplevel.say(f"report: {written}")
    if as_json:
        show_json(data)
        return
    show("\n\n".join([*(describe(each, subject) for each in evaluations), "\n".join(card)]))


def _graphs(bundle: Path, provider: ProviderChoice, precision: str) -> list[dict[str, Any]]:
    """Return which graphs are loaded, the one first that the others are compared with."""
    if precision != ALL:
        return [{"provider": provider, "precision": precision}]
    opened = read_bundle(bundle)
    obtained = select_provider(provider).provider
    found = [{"provider": obtained, "precision": variant.precision} for variant in opened.runnable(obtained)]
    if obtained != "cpu" and opened.runnable("cpu"):
        found.insert(0, {"provider": "cpu", "precision": opened.runnable("cpu")[0].precision})
    return sorted(found, key=lambda each: (each["precision"] != "fp32", each["provider"] != "cpu"))


def _score(model: RewardModel, sources: Sequence[Any], options: Any, score_sources: Callable[..., Any]) -> Any:
    """Score the files of one benchmark, and show how far it is."""
    bars: list[Progress] = []

    def watch(reader: RowReader) -> Callable[[Summary], None]:
        for bar in bars:
            bar.finish()
        bars[:] = [Progress(reader.share, lambda: model.statistics)]
        return bars[0]

    try:
        return interruptible(
            lambda: score_sources(model, sources, options, watch), lambda: [bar.tick() for bar in bars] and None
        )
    finally:
        for bar in bars:
            bar.finish()
