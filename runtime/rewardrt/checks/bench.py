"""How fast the graphs of a bundle score one file, how close they are to fp32, and how much memory they take.

    rows -> texts (a worker) -> rounds, in which the workers take turns -> figures

A worker is a process that holds one loaded model. The workers take turns, so that noise on the machine affects all of
them. Time is measured from token ids to rewards. Rates count every token of the texts: padding, and prefixes that are
computed once for several texts, change the seconds, not the tokens.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rewardrt.bundle.manifest import Bundle, Variant
from rewardrt.bundle.opening import open_bundle, with_graphs
from rewardrt.checks.workers import Outputs, Worker, serve, text_from_json, text_to_json
from rewardrt.checks.workload import Fidelity, Workload, compare, read_workload, texts_of_length
from rewardrt.errors import BundleError, RewardRTError
from rewardrt.machine.providers import Provider, ProviderChoice, select_provider
from rewardrt.reward_model import RewardModel
from rewardrt.text.tokens import EncodedText

LATENCY_TOKENS = (32, 256, 2048)  # lengths of the single texts whose latency is measured
LENGTHS = (512, 1024, 2048, 4096, 8192)  # lengths of the single texts whose cost per token is measured
LATENCY_SECONDS = 3.0  # time for each length, with at least 5 and at most 100 calls


def model_command(bundle: str | Path, options: Mapping[str, Any]) -> list[str]:
    """Return the command of a worker that loads `RewardModel.load(bundle, **options)`."""
    return [sys.executable, "-m", "rewardrt.checks.bench", str(bundle), json.dumps(dict(options))]


def _load_model(bundle: str, options: dict[str, Any]) -> tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]:
    model = RewardModel.load(bundle, **options)
    loaded = {"precision": model.precision, "provider": model.provider}
    return loaded, lambda request: _answer(model, request)


def _answer(model: RewardModel, request: dict[str, Any]) -> dict[str, Any]:
    """Encode the texts of rows, or score encoded texts."""
    if "rows" in request:
        prepared = model.answers.prepare(request["rows"], max_length=request["max_length"])
        for each in (*prepared.rows, *prepared.texts):
            if isinstance(each, RewardRTError):
                raise each
        return {"texts": [text_to_json(text) for text in prepared.texts if isinstance(text, EncodedText)]}
    texts = [text_from_json(text) for text in request["texts"]]
    callers = request.get("callers", 1)
    start = time.perf_counter()
    if callers == 1:
        values = model.runner.run(texts)
    else:
        with ThreadPoolExecutor(callers) as pool:
            found = list(pool.map(model.runner.run, [texts[first::callers] for first in range(callers)]))
        values = [found[index % callers][index // callers] for index in range(len(texts))]
    seconds = time.perf_counter() - start
    outputs = []
    for value in values:
        if isinstance(value, RewardRTError):
            raise value
        outputs.append(value.tolist())
    return {"outputs": outputs, "seconds": seconds}


@dataclass(frozen=True)
class Rounds:
    """One worker's results for a workload: the seconds of each round, and the outputs of the last round."""

    seconds: tuple[float, ...]
    outputs: Outputs


def run_rounds(workers: Sequence[Worker], texts: Sequence[EncodedText], rounds: int) -> dict[str, Rounds]:
    """Let the workers score the texts `rounds` times in turns; return the results by worker name."""
    seconds: dict[str, list[float]] = {worker.name: [] for worker in workers}
    outputs: dict[str, Outputs] = {}
    for _ in range(rounds):
        for worker in workers:
            timed = worker.score(texts)
            seconds[worker.name].append(timed.seconds)
            outputs[worker.name] = timed.outputs
    return {name: Rounds(tuple(seconds[name]), outputs[name]) for name in seconds}


@dataclass(frozen=True)
class Latency:
    """Seconds of a call with one text of `tokens` tokens: median and 99th percentile over `calls` different texts."""

    tokens: int
    calls: int
    p50: float
    p99: float


def measure_latency(worker: Worker, texts: Iterator[EncodedText], tokens: int, seconds: float) -> Latency:
    """Score texts one by one for about `seconds`; the first call, a warm-up, is not counted."""
    times: list[float] = []
    worker.score([next(texts)])
    while len(times) < 5 or (len(times) < 100 and sum(times) < seconds):
        times.append(worker.score([next(texts)]).seconds)
    p50, p99 = np.percentile(times, [50, 99])
    return Latency(tokens, len(times), float(p50), float(p99))


@dataclass(frozen=True)
class Figures:
    """The measurements of one graph of the bundle."""

    name: str
    tokens_per_second: float  # in the median round
    ratio: float  # this graph's rate divided by the first graph's
    fidelity: Fidelity | None  # compared with the first graph; None for the first graph itself
    latencies: tuple[Latency, ...]
    lengths: tuple[tuple[int, float], ...]  # tokens of one text, and the median of the seconds per token
    weights_bytes: int  # size of its weights files
    loaded_bytes: int | None  # resident memory after loading; None if the system does not report it
    peak_bytes: int | None  # peak of the resident memory after that

    @property
    def above_weights_bytes(self) -> int | None:
        """Peak memory minus the size of the weights: the interpreter, the libraries, and what scoring takes."""
        return None if self.peak_bytes is None else self.peak_bytes - self.weights_bytes


@dataclass(frozen=True)
class Report:
    """The figures of all graphs of a bundle on one file."""

    bundle: str
    file: str
    rows: int
    texts: int
    tokens: int
    rounds: int
    provider: Provider
    cores: int | None
    figures: tuple[Figures, ...]


def bench(
    path: Path,
    file: Path,
    *,
    rows: int | None = None,
    max_length: int | None = None,
    rounds: int = 3,
    provider: ProviderChoice = "auto",
    threads: int | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Report:
    """Measure every graph of a bundle that suits the provider on the rows of a file; fp32 comes first if it exists.

    Raises RewardRTError.
    """
    bundle = open_bundle(path)
    spec = bundle.manifest.spec
    selected = select_provider(provider).provider
    candidates = list_candidates(bundle, threads, selected)
    bundle = with_graphs(bundle, [variant for variant, _ in candidates.values()])  # before the workers do
    workers = [Worker(name, model_command(bundle.address, options)) for name, (_, options) in candidates.items()]
    try:
        progress(f"loading {', '.join(candidates)}")
        for worker in workers:
            worker.wait()
        workload = read_workload(workers[0], spec, file, rows=rows, max_length=max_length)
        progress(f"{len(workload.texts)} texts, {workload.tokens} tokens, {rounds} rounds")
        for worker in workers:
            worker.score(workload.texts[:2])  # warm up: the first call's setup is not part of a rate
        results = run_rounds(workers, workload.texts, rounds)
        figures: list[Figures] = []
        for worker in workers:
            progress(f"single texts: {worker.name}")
            first = results[workers[0].name]
            figures.append(
                _figures(worker, candidates[worker.name][0], bundle, workload, results[worker.name], first, rounds)
            )
    except KeyboardInterrupt:
        for worker in workers:
            worker.kill()
        raise
    finally:
        for worker in workers:
            worker.close()
    return Report(
        bundle.short_name, file.name, len(workload.rows), len(workload.texts), workload.tokens, rounds,
        selected, os.cpu_count(), tuple(figures),
    )  # fmt: skip


def list_candidates(
    bundle: Bundle, threads: int | None = None, provider: Provider = "cpu"
) -> dict[str, tuple[Variant, dict[str, Any]]]:
    """Return the candidates by name: each graph that suits the provider, and its options for RewardModel.load.

    fp32 comes first if it exists. The prefix cache is off, so that every round does all of its work. Raises BundleError
    if no graph suits the provider.
    """
    options = {
        "provider": provider,
        "threads": threads,
        "prefix_cache_mb": 0,
    }
    suited = [variant for variant in bundle.runnable(provider) if variant.suits(provider)]
    if not suited:
        names = ", ".join(variant.precision for variant in bundle.manifest.variants)
        raise BundleError(f"{bundle.name}: no graph for {provider} here; the bundle has {names}")
    suited.sort(key=lambda variant: variant.precision != "fp32")
    return {variant.precision: (variant, options | {"precision": variant.precision}) for variant in suited}


def _figures(
    worker: Worker, variant: Variant, bundle: Bundle, workload: Workload, own: Rounds, first: Rounds, rounds: int
) -> Figures:
    spec = bundle.manifest.spec
    latencies = [
        measure_latency(worker, texts_of_length(workload, spec, tokens), tokens, LATENCY_SECONDS)
        for tokens in LATENCY_TOKENS
        if tokens <= spec.max_length
    ]
    lengths = []
    for tokens in LENGTHS:
        if tokens <= spec.max_length:
            texts = texts_of_length(workload, spec, tokens)
            seconds = statistics.median(worker.score([next(texts)]).seconds for _ in range(rounds))
            lengths.append((tokens, seconds / tokens))
    return Figures(
        name=worker.name,
        tokens_per_second=workload.tokens / statistics.median(own.seconds),
        ratio=statistics.median(first.seconds) / statistics.median(own.seconds),
        fidelity=None if own is first else compare(workload, own.outputs, first.outputs),
        latencies=tuple(latencies),
        lengths=tuple(lengths),
        weights_bytes=bundle.weights_bytes(variant),
        loaded_bytes=worker.wait()["loaded_bytes"],
        peak_bytes=worker.peak_bytes(),
    )


def format_report(report: Report) -> str:
    """Format a report as text."""
    first = report.figures[0].name
    lines = [
        f"{report.bundle} on {report.file}: {report.rows} rows, {report.texts} texts, {report.tokens} tokens; "
        f"{report.provider}, {report.cores} cores, median of {report.rounds} rounds",
        f"{'':14}tokens/s   ratio  agreement  rms (std)  memory above the weights",
    ]
    for figures in report.figures:
        near = figures.fidelity
        agreement = "-" if near is None or near.agreement is None else f"{near.agreement:.1%} of {near.preferences}"
        rms = "-" if near is None else f"{near.rms_std:.2g}"
        above = "-" if figures.above_weights_bytes is None else f"{figures.above_weights_bytes / 2**20:.0f} MiB"
        speed = f"{figures.tokens_per_second:8.0f}  {figures.ratio:5.2f}x"
        lines.append(f"{figures.name:14}{speed}  {agreement:>9}  {rms:>9}  {above}")
    lines.append(f"agreement and rms are against {first}; one text at a time, p50 / p99 in ms:")
    for figures in report.figures:
        shown = [f"{each.tokens} tokens {each.p50 * 1e3:.1f} / {each.p99 * 1e3:.1f}" for each in figures.latencies]
        lines.append(f"{figures.name:14}{', '.join(shown)}")
    lines.append("one text, microseconds for each of its tokens:")
    for figures in report.figures:
        shown = [f"{tokens} tokens {seconds * 1e6:.0f}" for tokens, seconds in figures.lengths]
        lines.append(f"{figures.name:14}{', '.join(shown)}")
    return "\n".join(lines)


if __name__ == "__main__":
    bundle_path, load_options = sys.argv[1:]
    serve(lambda: _load_model(bundle_path, json.loads(load_options)))
