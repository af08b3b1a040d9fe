"""Everything that docs/performance.md says, measured in one run on one machine.

    python benchmarks/bench.py CHECKPOINT BUNDLE DATA [--quick | --full] [--cache FOLDER] [-o results.json]

CHECKPOINT is the reward model, BUNDLE its export, and DATA a folder with pairs_harmless.jsonl, pairs_en.jsonl and
best_of_4.jsonl. What the other systems need (virtual environments, their own exports) is made in the cache folder once;
--prepare does only that. The systems take turns over the same token ids; the seconds are from token ids to rewards.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
from checkpoint import convert, write_shape
from report import must_show, write_page
from systems import ENVIRONMENTS, System, lean_command, list_own, list_peers
from tokenizers import Tokenizer
from workloads import DEFAULT, FULL, QUICK, Sizes, write_workloads

from rewardrt.bundle.manifest import Bundle, read_bundle
from rewardrt.checks.bench import LATENCY_TOKENS, LENGTHS
from rewardrt.checks.workers import Outputs, Worker
from rewardrt.checks.workload import Workload, compare, read_workload, texts_of_length
from rewardrt.errors import WorkerError
from rewardrt.text.tokens import EncodedText

ROOT = Path(__file__).parent.parent
MAX_LENGTH = 1024
PEER_PAD = 3  # an id that no text of the reference model ends with
SHAPE_TEXTS, SHAPE_TOKENS = 8, 512
LATENCY_CALLS = 5  # of each system with a text of each length, at least
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")

Candidate = tuple[System, str]  # a system and one of its loops

# Seconds before each call. Threads of the system that ran before it go on spinning for a while, in a process of their
# own: 256 tokens in int8 took 127 ms right after fp32 and 94 ms with this pause.
PAUSE = 0.2


def say(text: str) -> None:
    """Tell how far the run is."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class Crew:
    """The workers of all systems that are still there; one that fails is recorded with its error and left out."""

    def __init__(self, systems: list[System]) -> None:
        self.systems: list[System] = []
        self.errors: dict[str, str] = {}
        self.workers: dict[str, Worker] = {}
        for system in systems:  # one after the other: their exports and loading would fight for memory
            say(f"loading {system.name}")
            try:
                worker = Worker(system.name, system.command)
                self.workers[system.name] = worker
                worker.wait()
                self.systems.append(system)
            except (WorkerError, OSError) as error:
                self.drop(system, str(error))

    def drop(self, system: System, error: str) -> None:
        """Leave a system out from here on."""
        say(f"left out: {error}")
        self.errors[system.name] = error
        self.systems = [each for each in self.systems if each is not system]
        if worker := self.workers.pop(system.name, None):
            worker.close()

    def score(self, candidate: Candidate, texts: tuple[EncodedText, ...]) -> tuple[Outputs, float] | None:
        """Score texts once; None of a system that failed."""
        system, loop = candidate
        if system.name not in self.workers:
            return None
        time.sleep(PAUSE)
        try:
            timed = self.workers[system.name].score(texts, loop=loop)
        except WorkerError as error:
            self.drop(system, str(error))
            return None
        return timed.outputs, timed.seconds

    def close(self) -> None:
        """End all processes."""
        for worker in self.workers.values():
            worker.close()


def measure_speed(
    crew: Crew, workload: Workload, rounds: int
) -> tuple[dict[tuple[str, str], list[float]], dict[tuple[str, str], Outputs]]:
    """Time every loop once, and then the best of each system in turns; by system and loop.

    The loop of the servers ("file") is timed in every round too.
    """
    seconds: dict[tuple[str, str], list[float]] = {}
    outputs: dict[tuple[str, str], Outputs] = {}
    for number in range(rounds):
        for system in list(crew.systems):
            tried = {loop: seconds[system.name, loop][0] for loop in system.loops if (system.name, loop) in seconds}
            best = min((loop for loop in tried if loop != "file"), key=tried.__getitem__, default="")
            for loop in system.loops if number == 0 else [loop for loop in system.loops if loop in (best, "file")]:
                scored = crew.score((system, loop), workload.texts)
                if scored is not None:
                    outputs[system.name, loop] = scored[0]
                    seconds.setdefault((system.name, loop), []).append(scored[1])
    return seconds, outputs


def measure_fidelity(
    crew: Crew, held_out: Workload, pairs: list[tuple[Workload, dict[tuple[str, str], Outputs]]]
) -> list[dict[str, Any]]:
    """Compare every loop with our fp32, on held-out pairs; float32 systems on the pairs of the speed workloads."""
    found = []
    ours = next(system for system in crew.systems if system.precision == "fp32")
    reference = crew.score((ours, "all"), held_out.texts)
    assert reference is not None
    for system in list(crew.systems):
        for loop in (loop for loop in system.loops if loop != "file" and not system.name.endswith("no reuse")):
            if system is ours:
                continue
            if system.precision in ("fp32", "float32"):
                found += [
                    _fidelity(system, loop, workload, outputs[system.name, loop], outputs[ours.name, "all"])
                    for workload, outputs in pairs
                    if (system.name, loop) in outputs
                ]
            elif scored := crew.score((system, loop), held_out.texts):
                found.append(_fidelity(system, loop, held_out, scored[0], reference[0]))
    return found


def _fidelity(system: System, loop: str, workload: Workload, outputs: Outputs, reference: Outputs) -> dict[str, Any]:
    return {"system": system.name, "loop": loop, "workload": workload.name} | asdict(
        compare(workload, outputs, reference)
    )


def measure_identity(crew: Crew, workloads: list[Workload], results: dict[str, dict[tuple[str, str], Outputs]]) -> Any:
    """Say of each of our graphs whether the same texts have the same bits however they are scored."""
    found = []
    own = [system for system in crew.systems if system.kind == "ours"]
    for system in (system for system in own if not system.name.endswith("no reuse")):
        worker = crew.workers[system.name]
        without = f"{system.name}, no reuse"
        if without in crew.workers:
            same = [results[each.name][system.name, "all"] == results[each.name][without, "all"] for each in workloads]
            found.append({"system": system.name, "claim": "with and without prefix reuse", "same": all(same)})
        texts = [text for workload in workloads for text in workload.texts[:16]]
        straight = worker.score(texts).outputs
        order = np.random.default_rng(0).permutation(len(texts))
        shuffled = worker.score([texts[index] for index in order]).outputs
        found.append(
            {
                "system": system.name,
                "claim": "any order",
                "same": shuffled == [straight[index] for index in order],
            }
        )
        alone = [worker.score([text]).outputs[0] for text in texts]
        found.append({"system": system.name, "claim": "alone and in a batch", "same": alone == straight})
        two = worker.score(texts, callers=2).outputs
        found.append({"system": system.name, "claim": "1 or 2 calling threads", "same": two == straight})
    return found


def measure_latencies(crew: Crew, workload: Workload, bundle: Bundle, seconds: float) -> list[dict[str, Any]]:
    """Measure single texts, in turns: every graph of ours, and the others one by one; about so long for each length."""
    found = []
    spec = bundle.manifest.spec
    for tokens in (length for length in LATENCY_TOKENS if length <= spec.max_length):
        texts = texts_of_length(workload, spec, tokens)
        times: dict[str, list[float]] = {}
        end = time.monotonic() + seconds
        for number in range(101):  # the first, which warms up, is not counted
            text = next(texts)
            for system in [each for each in crew.systems if not each.name.endswith("no reuse")]:
                loop = "all" if system.kind == "ours" else "single"
                scored = crew.score((system, loop), (text,))
                if scored is not None and number:
                    times.setdefault(system.name, []).append(scored[1])
            if number >= LATENCY_CALLS and time.monotonic() > end:
                break
        for name, measured in times.items():
            p50, p99 = np.percentile(measured, [50, 99])
            found.append(
                {"system": name, "tokens": tokens, "calls": len(measured), "p50": float(p50), "p99": float(p99)}
            )
    return found


def measure_lengths(systems: list[System], workload: Workload, bundle: Bundle, longest: int) -> list[dict[str, Any]]:
    """Measure the cost per token of single texts up to the longest, each graph in a fresh process for its peak."""
    found = []
    spec = bundle.manifest.spec
    weights = {record.path: record.bytes for record in bundle.manifest.files}
    for system in (system for system in systems if system.kind == "ours" and not system.name.endswith("no reuse")):
        say(f"lengths: {system.name}")
        worker = Worker(system.name, system.command)
        try:
            lengths = [length for length in LENGTHS if length <= min(spec.max_length, longest)]
            costs = []
            worker.score(list(workload.texts[:1]))
            for length in lengths:
                texts = texts_of_length(workload, spec, length)
                repeats = 3 if length < 4096 else 1
                costs.append(statistics.median(worker.score([next(texts)]).seconds for _ in range(repeats)) / length)
            peak = worker.peak_bytes()
            size = sum(weights[name] for name in bundle.variant(system.precision).data)
            found.append(
                {
                    "system": system.name,
                    "tokens": lengths,
                    "seconds_per_token": costs,
                    "weights_bytes": size,
                    "loaded_bytes": worker.wait()["loaded_bytes"],
                    "peak_bytes": peak,
                }
            )
        finally:
            worker.close()
    return found


def measure_cold_start(cache: Path, runs: int) -> dict[str, Any]:
    """Time `rewardrt score` on models/tiny from the start of its process to its first row, where nothing else is."""
    bundle = export(ROOT / "models" / "tiny", cache / "tiny", ["fp32"])
    row = cache / "one_row.jsonl"
    row.write_text(json.dumps({"prompt": "What is 2 + 2?", "response": "4"}) + "\n", encoding="utf-8")
    command = [*lean_command(cache, ROOT), "score", str(bundle), str(row)]
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=cache)
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds.append(time.perf_counter() - start)
        process.stdout.close()
        if process.wait() or "reward" not in json.loads(line):
            raise click.ClickException(f"{' '.join(command)}: gave no reward")
    return {"seconds": seconds[1:], "median": statistics.median(seconds[1:])}  # the first one filled the caches


def export(checkpoint: Path, bundle: Path, precisions: list[str], golden: Path | None = None) -> Path:
    """Export where that was not done yet with this code; raises ClickException with what the export said."""
    stamp = bundle.with_name(f"{bundle.name}.made")
    sources = [path for folder in ("export", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    code = str(max(path.stat().st_mtime_ns for path in sources))
    if (bundle / "reward.json").is_file() and stamp.is_file() and stamp.read_text(encoding="ascii") == code:
        return bundle
    say(f"exporting {bundle.name}")
    shutil.rmtree(bundle, ignore_errors=True)
    asked = [argument for precision in precisions for argument in ("--precision", precision)]
    asked += [] if golden is None else ["--golden", str(golden)]
    start = [sys.executable, "-c", "from rewardrt.cli.app import main; main()"]
    command = [*start, "export", str(checkpoint), str(bundle), *asked]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"export of {bundle.name}: {done.stderr.strip().splitlines()[-1]}")
    stamp.write_text(code, encoding="ascii")
    return bundle


def export_shape(cache: Path) -> tuple[Path, str | None]:
    """Export the 0.5B-shaped random model; where int8 fails, as fp32 alone and with what the export said."""
    checkpoint = cache / "shape-checkpoint"
    if not (checkpoint / "model.safetensors").is_file():
        write_shape(ROOT / "models" / "tiny", checkpoint)
    # Few tokens: what is certified of random weights is of no interest. Each text is other words: of texts that are
    # nearly the same the rewards are too, and int8 would have to be far nearer to them than to a model's.
    golden = cache / "shape_golden.jsonl"
    words, random = (ROOT / "README.md").read_text(encoding="utf-8").split(), np.random.default_rng(0)
    rows = [
        {"prompt": " ".join(random.choice(words, 12)), "response": " ".join(random.choice(words, 12))}
        for _ in range(32)
    ]
    golden.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    try:
        return export(checkpoint, cache / "shape", ["fp32", "int8"], golden), None
    except click.ClickException as error:
        return export(checkpoint, cache / "shape-fp32", ["fp32"], golden), error.message


def measure_gemm(cache: Path, rounds: int) -> dict[str, Any]:
    """Relate the matrix products of the 0.5B shape to the peak, which is measured before and after."""
    path, failed = export_shape(cache)
    bundle = read_bundle(path, check_hashes=False)
    counts = json.loads((cache / "shape-checkpoint" / "linear_weights.json").read_text(encoding="utf-8"))
    # int8 graphs compute what follows the last attention of the token alone that is read: it is not counted.
    weights = {"fp32": counts["all"], "int8": counts["all"] - counts["last"]}
    before = _peaks()
    rates = {}
    random = np.random.default_rng(0)
    for system in (system for system in list_own(bundle) if not system.name.endswith("no reuse")):
        worker = Worker(system.name, system.command)
        try:
            ids = random.integers(100, 4000, (SHAPE_TEXTS, SHAPE_TOKENS))
            texts = [EncodedText(row, 0, np.array([SHAPE_TOKENS - 1])) for row in ids]
            worker.score(texts[:1])
            best = min(worker.score(texts).seconds for _ in range(rounds))
            rates[system.precision] = SHAPE_TEXTS * SHAPE_TOKENS / best
        finally:
            worker.close()
    after = _peaks()
    shares = {
        precision: 2 * weights[precision] * rate / max(before[kind], after[kind])
        for precision, rate in rates.items()
        if (kind := "int8" if precision == "int8" else "fp32")
    }
    return {
        "before": before,
        "after": after,
        "linear_weights": weights,
        "tokens_per_second": rates,
        "operations_per_second": {precision: 2 * weights[precision] * rate for precision, rate in rates.items()},
        "share_of_peak": shares,
    } | ({} if failed is None else {"error": failed})


def _peaks() -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("gemm_peak.py"))], capture_output=True, check=True
    )
    return dict(json.loads(done.stdout))


def describe_machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    fields = dict(line.split(":", 1) for line in cpu.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = fields.get("flags", "").split()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": fields.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "memory_bytes": pages,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def describe_systems(systems: list[System], crew: Crew) -> list[dict[str, Any]]:
    """Return what ran: versions, memory, and the error of what did not run."""
    found = []
    for system in systems:
        entry: dict[str, Any] = {"name": system.name, "kind": system.kind, "precision": system.precision}
        if system.name in crew.workers:
            worker = crew.workers[system.name]
            loaded = worker.wait()
            entry |= {"versions": loaded.get("versions", {}), "loaded_bytes": loaded["loaded_bytes"]}
            entry["peak_bytes"] = worker.peak_bytes()
        else:
            entry["error"] = crew.errors[system.name]
        found.append(entry)
    return found


def measure(
    opened: Bundle, systems: list[System], data: Path, cache: Path, sizes: Sizes, quick: bool
) -> dict[str, Any]:
    """Measure everything; what comes first wants the machine for itself."""
    tokenizer = Tokenizer.from_file(str(opened.path / "tokenizer.json"))
    files = write_workloads(data, cache / "workloads", sizes, lambda text: len(tokenizer.encode(text).ids))
    rounds = 1 if quick else 2
    results: dict[str, Any] = {
        "machine": describe_machine(),
        "bundle": {
            "name": opened.path.name,
            "parameters": opened.manifest.provenance.parameters,
            "versions": opened.manifest.provenance.versions,
        },
        "settings": {"sizes": asdict(sizes), "max_length": MAX_LENGTH, "rounds": rounds, "quick": quick},
    }
    say("peaks of the matrix products, and the 0.5B shape")
    results["gemm"] = measure_gemm(cache, 1 if quick else 3)
    say("cold start")
    results["cold_start"] = measure_cold_start(cache, 3 if quick else 11)
    crew = Crew(systems)
    try:
        first = crew.workers[systems[0].name]
        workloads = {
            name: read_workload(first, opened.manifest.spec, file, rows=None, max_length=MAX_LENGTH)
            for name, file in files.items()
        }
        results["workloads"] = [describe_workload(name, workload) for name, workload in workloads.items()]
        held_out = workloads.pop("held out")
        for system in list(crew.systems):
            crew.score((system, system.loops[0]), workloads["harmless"].texts[:2])  # what the first call sets up
        results["rates"], outputs = [], {}
        for name, workload in workloads.items():
            say(f"{name}: {len(workload.texts)} texts, {workload.tokens} tokens")
            seconds, outputs[workload.name] = measure_speed(crew, workload, rounds)
            results["rates"] += [
                {"workload": name, "system": system_name, "loop": loop, "seconds": times}
                | {"tokens_per_second": workload.tokens / statistics.median(times)}
                for (system_name, loop), times in seconds.items()
            ]
        say(f"agreement: {len(held_out.texts)} texts, {held_out.tokens} tokens")
        pairs = [(workloads[name], outputs[workloads[name].name]) for name in ("harmless", "en")]
        results["fidelity"] = measure_fidelity(crew, held_out, pairs)
        say("same bits")
        results["identity"] = measure_identity(crew, list(workloads.values()), outputs)
        say("latency")
        results["latency"] = measure_latencies(crew, workloads["en"], opened, 3 if quick else 25)
        results["systems"] = describe_systems(systems, crew)
    finally:
        crew.close()
    results["lengths"] = measure_lengths(systems, workloads["en"], opened, 2048 if quick else 8192)
    return results


def describe_workload(name: str, workload: Workload) -> dict[str, Any]:
    """Return how much there is to score."""
    return {
        "name": name,
        "rows": len(workload.rows),
        "texts": len(workload.texts),
        "tokens": workload.tokens,
        "longest": max(len(text.ids) for text in workload.texts),
    }


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.argument("data", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--quick", is_flag=True, help="A few rows and one round: whether everything runs.")
@click.option("--full", is_flag=True, help="The whole files: hours.")
@click.option("--prepare", is_flag=True, help="Make what the run needs in the cache folder, and measure nothing.")
@click.option("--only", multiple=True, help="Only systems whose name contains this; ours run in any case.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".bench"), show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("results.json"), show_default=True)
@click.option("--page", type=click.Path(path_type=Path), help="Write the page of the documentation here, too.")
def main(
    checkpoint: Path, bundle: Path, data: Path, quick: bool, full: bool, prepare: bool, only: tuple[str, ...],
    cache: Path, output: Path, page: Path | None,
) -> None:  # fmt: skip
    """Measure, print the table, write the figures as JSON."""
    started = time.time()
    cache = cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / "checkpoint" / "config.json").is_file():
        convert(checkpoint, cache / "checkpoint", PEER_PAD)
    for environment in ENVIRONMENTS:
        try:
            environment.make(cache)
        except subprocess.CalledProcessError as error:
            say(f"{environment.name}: {error}")  # its systems then say that they cannot start
    lean_command(cache, ROOT)
    opened = read_bundle(bundle.resolve())
    systems = list_own(opened)
    systems += [
        system
        for system in list_peers(cache / "checkpoint", cache)
        if not only or any(part in system.name for part in only)
    ]
    if prepare:
        Crew(systems).close()
        export_shape(cache)
        return
    results = measure(opened, systems, data, cache, QUICK if quick else FULL if full else DEFAULT, quick)
    results["seconds"] = time.time() - started
    results["date"] = time.strftime("%Y-%m-%d", time.gmtime())
    output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if page is not None:
        write_page(results, page)
    print(must_show(results))


if __name__ == "__main__":
    main()
