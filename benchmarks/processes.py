"""What it takes to score in many processes of one machine:
    python benchmarks/processes.py BUNDLE [--processes 8] [--precision int8] [--share-weights] [--method spawn fork]

A trainer may hold a reward function in each of its workers. Each process here loads the bundle, or is forked from one
that did, and scores the same texts. Printed for each way of starting them, from /proc/PID/smaps_rollup, in MB (10^6):

    weights   the size of the graph's weights on disk
    together  proportional set sizes of all processes added up: what is shared counts once
    own       private memory of a process, at most: what one more costs
    baseline  the same of a process that has imported everything and loaded no bundle
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import sys
from pathlib import Path
from typing import Any

from rewardrt import RewardModel

TEXTS = [
    {
        "prompt": f"Explain number {number} to a child.",
        "response": "It comes after the one before it. " * (1 + number % 12),
    }
    for number in range(48)
]


def memory() -> dict[str, int]:
    """Return the kilobytes of this process by the kernel's names."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) for line in lines}


def work(model: RewardModel | tuple[str, dict[str, Any]] | None, pipe: Any) -> None:
    """Score, say what came out, and measure when all have scored."""
    if isinstance(model, tuple):
        model = RewardModel.load(model[0], **model[1])
    digest = hashlib.sha256(model.score_many(TEXTS).tobytes()).hexdigest() if model is not None else ""
    pipe.send(digest)
    pipe.recv()
    found = memory()
    pipe.send((found["Pss"], found["Private_Clean"] + found["Private_Dirty"], found["Rss"]))
    pipe.recv()


def measure(method: str, count: int, model: Any) -> tuple[set[str], list[tuple[int, int, int]]]:
    """Run so many processes; return the digests of their rewards and their sizes in kilobytes."""
    context = multiprocessing.get_context(method)
    pairs = [context.Pipe() for _ in range(count)]
    processes = [context.Process(target=work, args=(model, theirs)) for _, theirs in pairs]
    for process in processes:
        process.start()
    digests = {ours.recv() for ours, _ in pairs}
    for ours, _ in pairs:
        ours.send(None)
    sizes = [ours.recv() for ours, _ in pairs]
    for ours, _ in pairs:
        ours.send(None)
    for process in processes:
        process.join(60)
    return digests, sizes


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--share-weights", action="store_true", help="as the option of RewardModel.load")
    parser.add_argument("--method", nargs="+", default=["spawn", "fork"], choices=["spawn", "fork", "forkserver"])
    given = parser.parse_args()
    options = {"precision": given.precision, "provider": "cpu", "threads": 1, "share_weights": given.share_weights}
    _, baseline = measure("spawn", 1, None)
    model = RewardModel.load(given.bundle, **options)
    variant = model.bundle.variant(given.precision)
    expected = hashlib.sha256(model.score_many(TEXTS).tobytes()).hexdigest()
    shared = ", weights shared" if given.share_weights else ""
    print(f"{given.bundle}: {given.precision}{shared}, {given.processes} processes, {len(TEXTS)} texts each")
    print(f"weights {model.bundle.weights_bytes(variant) / 1e6:.0f} MB, baseline {baseline[0][1] * 1024 / 1e6:.0f} MB")
    print(f"{'method':<12}{'together':>10}{'own':>10}{'own above baseline':>20}  rewards")
    for method in given.method:
        digests, sizes = measure(method, given.processes, model if method == "fork" else (given.bundle, options))
        together, own = sum(pss for pss, _, _ in sizes), max(private for _, private, _ in sizes)
        same = "bit-identical" if digests == {expected} else "DIFFERENT"
        above = (own - baseline[0][1]) * 1024 / 1e6
        print(f"{method:<12}{together * 1024 / 1e6:>7.0f} MB{own * 1024 / 1e6:>7.0f} MB{above:>17.0f} MB  {same}")
        if digests != {expected}:
            sys.exit(1)


if __name__ == "__main__":
    main()
