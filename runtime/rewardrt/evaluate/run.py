"""Run one evaluation from files to numbers: each benchmark found in the files, with one graph of a bundle or several.

find_sources -> a graph -> score_sources, for each benchmark -> evaluate -> compare, with each further graph or bundle

Only one model is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rewardrt.bundle import hub
from rewardrt.bundle.manifest import MANIFEST
from rewardrt.bundle.opening import open_bundle
from rewardrt.bundle.precisions import PRECISIONS
from rewardrt.data.files import Summary
from rewardrt.data.readers import RowReader
from rewardrt.errors import RewardRTError
from rewardrt.evaluate.comparison import compare
from rewardrt.evaluate.evaluation import Evaluation, evaluate, with_comparison
from rewardrt.evaluate.results import Results
from rewardrt.evaluate.scoring import Scores, score_sources
from rewardrt.evaluate.sources import Options, Source, find_sources
from rewardrt.evaluate.statistics import RESAMPLES
from rewardrt.evaluate.subject import Subject
from rewardrt.machine.providers import Provider, ProviderChoice, select_provider
from rewardrt.reward_model import RewardModel

ALL = "all"  # evaluate every graph that runs on the provider
EXACT = "fp32"

Load = Callable[[Path, ProviderChoice, str], RewardModel]
Watch = Callable[[RewardModel, RowReader], Callable[[Summary], None]]


@dataclass(frozen=True)
class Plan:
    """What is evaluated: a bundle on files.

    `against` names another bundle, or fields of the rows with earlier rewards.
    """

    bundle: Path
    files: Sequence[str]
    options: Options
    provider: ProviderChoice = "auto"
    precision: str = "auto"
    against: str | None = None
    resamples: int = RESAMPLES

    @property
    def other(self) -> Path | None:
        """The other bundle, or None if `against` does not name a bundle."""
        if self.against is None:
            return None
        folder = Path(self.against)
        return folder if hub.parse(self.against) is not None or (folder / MANIFEST).exists() else None

    @property
    def earlier(self) -> tuple[str, ...]:
        """The names of the fields with earlier rewards."""
        if self.against is None or self.other is not None:
            return ()
        return tuple(filter(None, self.against.split(",")))


def run(plan: Plan, load: Load, watch: Watch) -> tuple[Subject, list[Evaluation]]:
    """Return what was evaluated, and an evaluation of each benchmark, in the order of the files.

    `load` loads a graph of a bundle. `watch` is called with the model and the reader of each file, and returns a
    function that is told the progress. Raises RewardRTError.
    """
    sources: dict[str, list[Source]] = {}
    for source in find_sources(plan.files, plan.options):
        sources.setdefault(source.layout.name, []).append(source)

    def score(bundle: Path, provider: ProviderChoice, precision: str, options: Options) -> tuple[Subject, list[Scores]]:
        model = load(bundle, provider, precision)
        found = [score_sources(model, each, options, lambda reader: watch(model, reader)) for each in sources.values()]
        return Subject.of(model, options.normalize), found

    first, *others = graphs(plan)
    subject, scored = score(plan.bundle, *first, replace(plan.options, earlier=plan.earlier))
    if plan.earlier:
        _check_earlier(plan, scored)
    evaluations = [evaluate(each, subject, by=plan.options.by or "", resamples=plan.resamples) for each in scored]

    def add(name: str, results: Sequence[Results | None]) -> None:
        for index, (ours, theirs) in enumerate(zip(scored, results, strict=True)):
            if theirs is not None:
                found = compare(ours, theirs, name, resamples=plan.resamples)
                evaluations[index] = with_comparison(evaluations[index], found)

    for graph in others:
        their_subject, theirs = score(plan.bundle, *graph, plan.options)
        add(their_subject.graph, [each.results for each in theirs])
    if plan.other is not None:
        their_subject, theirs = score(plan.other, plan.provider, "auto", plan.options)
        add(f"{their_subject.bundle}, {their_subject.graph}", [each.results for each in theirs])
    if plan.earlier:
        add(f"the rewards in {plan.against}", [each.earlier for each in scored])
    return subject, evaluations


def graphs(plan: Plan) -> list[tuple[ProviderChoice, str]]:
    """Return the graphs to load, as provider and precision; the others are compared with the first.

    For the precision "all", the first is fp32, on the CPU if it runs there, because the cost of rounding and of a
    provider is measured against that.
    """
    if plan.precision != ALL:
        return [(plan.provider, plan.precision)]
    bundle, obtained = open_bundle(plan.bundle), select_provider(plan.provider).provider
    found: list[tuple[Provider, str]] = [
        (obtained, variant.precision)
        for variant in bundle.runnable(obtained)
        if obtained in variant.made_for or not PRECISIONS[variant.precision].engine
    ]
    if obtained != "cpu" and any(variant.precision == EXACT for variant in bundle.runnable("cpu")):
        found.append(("cpu", EXACT))
    return [*sorted(found, key=lambda graph: (graph[1] != EXACT, graph[0] != "cpu"))]


def _check_earlier(plan: Plan, scored: Sequence[Scores]) -> None:
    for each in scored:
        if each.earlier is None or not each.earlier.rows:
            first = f"; the first: {each.not_compared[0].message}" if each.not_compared else ""
            raise RewardRTError(f"--against {plan.against}: is no bundle, and no row has such rewards{first}")
