"""Results of the benchmark as a page, a picture and a table; nothing is measured here.

python benchmarks/report.py results.json docs/performance.md     writes docs/performance.svg beside it

What a reader must know of a run goes into results.json as "remark", and from there onto the page.
"""

from __future__ import annotations

import json
import sys
import textwrap
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

Results = dict[str, Any]

WORKLOADS = ("harmless", "en", "best of 4", "best of 16")
COUNTS = 0.97  # agreement from which a system counts as one that gives the same answers
FASTEST = ("rewardrt int8", "rewardrt fp32")  # ours that the comparisons are made with: the first that ran
COLOURS = {"ours": "#1f6feb", "torch": "#d97706", "peer": "#8b949e"}


@dataclass(frozen=True)
class Target:
    """A line of what must be shown: whether it was reached, None where it was not measured."""

    name: str
    target: str
    measured: str
    reached: bool | None


def rate(results: Results, workload: str, system: str, loops: tuple[str, ...] = ()) -> float | None:
    """Return the tokens per second of a system's best loop, of these if any are given."""
    rates = [
        entry["tokens_per_second"]
        for entry in results["rates"]
        if (entry["workload"], entry["system"]) == (workload, system) and (not loops or entry["loop"] in loops)
    ]
    return max(rates, default=None)


def agreement(results: Results, system: str, loop: str | None = None) -> tuple[int, int] | None:
    """Return how many preferences are fp32's and how many there are, over all pairs that were compared."""
    found = [
        (round(entry["agreement"] * entry["preferences"]), entry["preferences"])
        for entry in results["fidelity"]
        if entry["system"] == system and loop in (None, entry["loop"]) and entry["agreement"] is not None
    ]
    return (sum(same for same, _ in found), sum(of for _, of in found)) if found else None


def best_loop(results: Results, system: str) -> str | None:
    """Return the loop of a system with the best agreement, and of those the fastest on the pairs."""
    loops = {entry["loop"] for entry in results["fidelity"] if entry["system"] == system}

    def order(loop: str) -> tuple[float, float]:
        same, of = agreement(results, system, loop) or (0, 1)
        return same / of, rate(results, "harmless", system, (loop,)) or 0.0

    return max(sorted(loops), key=order, default=None)


def counting(results: Results) -> list[tuple[str, str]]:
    """Return the other systems' loops whose agreement counts."""
    pairs = {
        (entry["system"], entry["loop"]) for entry in results["fidelity"] if not entry["system"].startswith("rewardrt")
    }
    found = []
    for system, loop in sorted(pairs):
        same, of = agreement(results, system, loop) or (0, 0)
        if of and same / of >= COUNTS:
            found.append((system, loop))
    return found


def list_targets(results: Results) -> list[Target]:
    """Return every line of what must be shown."""
    ours = next(name for name in FASTEST if rate(results, "harmless", name) is not None)
    lines = [
        _ratios(
            results, f"speed of {ours} with prefix reuse over torch bf16 in file order", ours, ("file",), (4, 5, 12)
        ),
        _ratios(results, f"speed of {ours} with prefix reuse over the fastest torch bf16 loop", ours, (), (2, 2, 6)),
        _against_peers(results, ours),
        _int8_fidelity(results),
        _fp32_against_torch(results),
        _share_of_peak(results),
        _long_texts(results, ours),
        _cold_start(results),
    ]
    same = [entry["same"] for entry in results["identity"]]
    wrong = [f"{entry['system']}: {entry['claim']}" for entry in results["identity"] if not entry["same"]]
    measured = f"{sum(same)} of {len(same)} checks" + (f"; not {', '.join(wrong)}" if wrong else "")
    lines.append(
        Target("same text, same bits: with prefix reuse, in any batch, order and thread", "all", measured, all(same))
    )
    return lines


def _ratios(results: Results, name: str, ours: str, loops: tuple[str, ...], targets: tuple[float, ...]) -> Target:
    workloads = ("harmless", "en", "best of 16")
    wanted = " / ".join(f"{target:g}x" for target in targets)
    own = [rate(results, workload, ours) for workload in workloads]
    theirs = [rate(results, workload, "torch bfloat16", loops) for workload in workloads]
    if None in own + theirs:
        return Target(f"{name}: {', '.join(workloads)}", wanted, "not measured", None)
    ratios = [(mine or 0.0) / (other or 1.0) for mine, other in zip(own, theirs, strict=True)]
    reached = all(found >= target for found, target in zip(ratios, targets, strict=True))
    reached = reached and ours == FASTEST[0]
    return Target(f"{name}: {', '.join(workloads)}", wanted, " / ".join(f"{found:.2f}x" for found in ratios), reached)


def _against_peers(results: Results, ours: str) -> Target:
    name = f"speed of {ours} over every other system with {COUNTS:.0%} agreement, on each workload"
    lowest: tuple[float, str] | None = None
    for workload in [each["name"] for each in results["workloads"] if each["name"] != "held out"]:
        mine = rate(results, workload, ours)
        for system, loop in counting(results):
            other = rate(results, workload, system, (loop,))
            if mine is not None and other is not None:
                lowest = min(lowest or (float("inf"), ""), (mine / other, f"{system} on {workload}"))
    latencies = {(entry["system"], entry["tokens"]): entry["p50"] for entry in results["latency"]}
    alone = {system for system, _ in counting(results)}
    for (system, tokens), seconds in latencies.items():
        if system in alone and (ours, tokens) in latencies:
            found = (seconds / latencies[ours, tokens], f"{system} on one text of {tokens} tokens")
            lowest = min(lowest or (float("inf"), ""), found)
    if lowest is None:
        return Target(name, "1.5x", "not measured", None)
    return Target(name, "1.5x", f"{lowest[0]:.2f}x at least ({lowest[1]})", lowest[0] >= 1.5)


def _int8_fidelity(results: Results) -> Target:
    name, wanted = "int8 compared with fp32 on held-out pairs: agreement, rms", "that of torch bf16; 0.03 std"

    def of(system: str) -> dict[str, Any] | None:
        loop = best_loop(results, system)
        return next((each for each in results["fidelity"] if (each["system"], each["loop"]) == (system, loop)), None)

    ours, torch = of("rewardrt int8"), of("torch bfloat16")
    if ours is None:
        return Target(name, wanted, "not measured", None)
    measured = f"{ours['agreement']:.1%}, {ours['rms_std']:.3f} std"
    if torch is None:
        return Target(name, wanted, f"{measured}; torch bf16 not measured", None)
    measured += f"; torch bf16 {torch['agreement']:.1%}, {torch['rms_std']:.3f} std"
    return Target(
        name, wanted, measured, bool(ours["agreement"] >= torch["agreement"] and ours["rms_std"] <= 0.03)
    )  # fmt: skip


def _fp32_against_torch(results: Results) -> Target:
    name = "speed of fp32 without prefix reuse over the fastest torch fp32 loop: harmless, en"
    ratios = []
    for workload in ("harmless", "en"):
        own = rate(results, workload, "rewardrt fp32, no reuse") or rate(results, workload, "rewardrt fp32")
        other = rate(results, workload, "torch float32")
        if own is None or other is None:
            return Target(name, "1.1x", "not measured", None)
        ratios.append(own / other)
    return Target(name, "1.1x", " / ".join(f"{found:.2f}x" for found in ratios), min(ratios) >= 1.1)


def _share_of_peak(results: Results) -> Target:
    name = "share of the int8 GEMM peak, 0.5B shape, 512-token texts"
    share = results["gemm"].get("share_of_peak", {}).get("int8")
    if share is None:
        return Target(name, "60%", f"not measured ({results['gemm'].get('error', 'no int8 graph')})", None)
    return Target(name, "60%", f"{share:.0%}", share >= 0.6)


def _long_texts(results: Results, ours: str) -> Target:
    name, wanted = "cost per token at 8,192 tokens over that at 512; peak memory above the weights", "2x, 600 MB"
    entry = next((each for each in results["lengths"] if each["system"] == ours), None)
    if entry is None or entry["tokens"][-1] < 8192:
        return Target(name, wanted, "not measured", None)
    ratio = entry["seconds_per_token"][-1] / entry["seconds_per_token"][0]
    if entry["peak_bytes"] is None:
        return Target(name, wanted, f"{ratio:.2f}x; memory not measured", None)
    above = (entry["peak_bytes"] - entry["weights_bytes"]) / 1e6
    return Target(name, wanted, f"{ratio:.2f}x, {above:.0f} MB ({ours})", ratio <= 2 and above <= 600)


def _cold_start(results: Results) -> Target:
    median = results["cold_start"]["median"]
    name = "time from the start of `rewardrt score` to the first reward, `models/tiny`, lean environment"
    return Target(name, "0.7 s", f"{median:.2f} s", median <= 0.7)


def must_show(results: Results) -> str:
    """Lay out rates and targets for a terminal."""
    lines = []
    names = _systems(results)
    width = max(map(len, names)) + 2
    measured = [name for name in WORKLOADS if any(entry["workload"] == name for entry in results["rates"])]
    lines.append("tokens/s".ljust(width) + "".join(name.rjust(12) for name in measured) + "   agreement")
    for name in names:
        rates = [rate(results, workload, name) for workload in measured]
        shown = "".join(("-" if found is None else f"{found:,.0f}").rjust(12) for found in rates)
        lines.append(name.ljust(width) + shown + "   " + _agreement(results, name))
    lines += ["", *(f"{name}: {error}" for name, error in _failed(results))]
    for target in list_targets(results):
        state = {True: "reached", False: "NOT REACHED", None: "NOT MEASURED"}[target.reached]
        lines.append(f"{state:13}{target.name}: {target.measured} (target {target.target})")
    return "\n".join(lines)


def _systems(results: Results) -> list[str]:
    return [entry["name"] for entry in results["systems"] if "error" not in entry]


def _failed(results: Results) -> list[tuple[str, str]]:
    return [(entry["name"], entry["error"]) for entry in results["systems"] if "error" in entry]


def _agreement(results: Results, system: str) -> str:
    found = agreement(results, system, best_loop(results, system))
    return f"{found[0] / found[1]:.1%} of {found[1]}" if found else "-"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def page(results: Results, picture: str) -> str:
    """Return the page."""
    machine, settings = results["machine"], results["settings"]
    measured = [each for each in results["workloads"] if each["name"] != "held out"]
    lines = [
        "# Performance",
        "",
        "<!-- Written by benchmarks/report.py from the results of one `make bench` run. Do not edit. -->",
        "",
        "How fast RewardRT scores on a CPU, compared with torch and with other exporters, and whether the rewards stay "
        "right.",
        "",
        f"One run of `make bench` on {results['date']}, {results['seconds'] / 60:.0f} minutes: {machine['cpu']}, "
        f"{machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, {', '.join(machine['flags'])}; "
        f"Python {machine['python']}. The model has {results['bundle']['parameters'] / 1e6:.0f} million parameters "
        "(`models/smollm2`). All systems score the same token ids, cut at "
        f"{settings['max_length']:,} tokens, and take turns. A rate is the median of {settings['rounds']} "
        f"round{'s' if settings['rounds'] > 1 else ''}. It counts the tokens of the texts without padding, also those "
        "of a prefix that is computed once for several texts (prefix reuse).",
        "",
        "The workloads are pairs of answers with short (harmless) and long texts (en), and 4 or 16 answers to one "
        "prompt (best of 4, best of 16). Nothing else in the benchmark reads the held-out pairs.",
        *(["", results["remark"]] if "remark" in results else []),
        "",
        "## Targets",
        "",
        "Speeds and shares are to be at least the target; costs, times, memory and rms at most.",
        "",
    ]
    states = {True: "yes", False: "no", None: "not measured"}
    rows = [[each.name, each.target, each.measured, states[each.reached]] for each in list_targets(results)]
    lines += _table(["", "target", "measured", "reached"], rows)
    lines += ["", "## Tokens per second", "", f"![Tokens per second of every system]({picture})", ""]
    rates = []
    for name in _systems(results):
        cells = []
        for workload in measured:
            found = [entry for entry in results["rates"] if entry["workload"] == workload["name"]]
            own = [entry for entry in found if entry["system"] == name]
            best = max(own, key=lambda entry: entry["tokens_per_second"], default=None)
            loop = "" if best is None or best["loop"] == "all" else f" ({best['loop']})"
            cells.append("-" if best is None else f"{best['tokens_per_second']:,.0f}{loop}")
        rates.append([name, *cells, _agreement(results, name), _memory(results, name)])
    head = ["", *(f"{each['name']}: {each['texts']} texts, {each['tokens']:,} tokens" for each in measured)]
    lines += _table([*head, "agreement", "peak memory, MB"], rates)
    lines += [
        "",
        "The fastest loop is in brackets: chunks of 8, padded, in order of length (sorted), or one text at a time "
        "(single). Torch in bfloat16 also ran as in OpenRLHF's server, in chunks of 8 in file order, padded on the "
        "left:",
        "",
    ]
    in_order = [[each["name"], f"{rate(results, each['name'], 'torch bfloat16', ('file',)) or 0:,.0f}"]
                for each in measured]  # fmt: skip
    lines += _table(["torch bfloat16, file order", "tokens/s"], in_order)
    held = next(each for each in results["workloads"] if each["name"] == "held out")
    lines += [
        "",
        f"Agreement is the share of pairs that a system orders as RewardRT's fp32 does, among the {held['rows']} "
        "held-out pairs; for systems that compute in float32 among the pairs of the first two workloads. "
        "rms is the root mean square of the differences in reward, in standard deviations of the reward (std):",
        "",
    ]
    lines += _table(["", "loop", "agreement", "of", "rms (std)"], [
        [each["system"], each["loop"], f"{each['agreement']:.1%}", str(each["preferences"]), f"{each['rms_std']:.2g}"]
        for each in results["fidelity"] if each["workload"] == "held_out.jsonl" and each["agreement"] is not None
    ])  # fmt: skip
    lines += ["", "Only RewardRT loads a value head of OpenRLHF. The other systems got the same tensors as "
              "transformers' `LlamaForSequenceClassification`, which gives the same rewards."]  # fmt: skip
    if failed := _failed(results):
        lines += ["", *(f"{name} did not run: `{error}`" for name, error in failed)]
    lines += ["", "## One text", "", "Milliseconds for one text, median / 99th percentile (number of calls):", ""]
    tokens = sorted({entry["tokens"] for entry in results["latency"]})
    latencies = {(entry["system"], entry["tokens"]): entry for entry in results["latency"]}
    lines += _table(["", *(f"{length:,} tokens" for length in tokens)], [
        [name, *(_latency(latencies.get((name, length))) for length in tokens)]
        for name in _systems(results) if (name, tokens[0]) in latencies
    ])  # fmt: skip
    lines += ["", "## Long texts", "", "Microseconds for each token of one text of the given number of tokens, and "
              "peak memory above the size of the weights' file, with all libraries:", ""]  # fmt: skip
    longest = max(results["lengths"], key=lambda entry: len(entry["tokens"]))["tokens"]
    lines += _table(["", *(f"{length:,}" for length in longest), "MB above the weights"], [
        [entry["system"], *(f"{seconds * 1e6:.0f}" for seconds in entry["seconds_per_token"]),
         "-" if entry["peak_bytes"] is None else f"{(entry['peak_bytes'] - entry['weights_bytes']) / 1e6:.0f}"]
        for entry in results["lengths"]
    ])  # fmt: skip
    lines += ["", *_gemm(results["gemm"]), *_cold(results["cold_start"])]
    lines += ["", "## Same text, same bits", ""]
    lines += _table(["", "", "same"], [
        [entry["system"], entry["claim"], states[entry["same"]]] for entry in results["identity"]
    ])  # fmt: skip
    lines += ["", "## Versions", ""]
    ours = ", ".join(f"{name} {version}" for name, version in results["bundle"]["versions"].items())
    lines.append(f"- the bundle: {ours}")
    for entry in results["systems"]:
        if versions := entry.get("versions"):
            lines.append(f"- {entry['name']}: {', '.join(f'{name} {version}' for name, version in versions.items())}")
    return "\n".join(map(_wrapped, lines)) + "\n"


def _wrapped(line: str) -> str:
    """Break a line of prose at 120 characters."""
    if not line or line.startswith(("|", "#", "!", "<")):
        return line
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _memory(results: Results, system: str) -> str:
    peak = next(entry for entry in results["systems"] if entry["name"] == system)["peak_bytes"]
    return "-" if peak is None else f"{peak / 1e6:,.0f}"


def _latency(entry: dict[str, Any] | None) -> str:
    return "-" if entry is None else f"{entry['p50'] * 1e3:.1f} / {entry['p99'] * 1e3:.1f} ({entry['calls']})"


def _gemm(gemm: dict[str, Any]) -> list[str]:
    peaks = [gemm["before"], *([gemm["after"]] if "after" in gemm else [])]
    kinds = {"fp32": "fp32 MatMul", "int8": "MatMulInteger, unsigned by signed", "nbits8": "MatMulNBits, 8 bits"}
    lines = [
        "## Share of the peak",
        "",
        "Matrix products of onnxruntime, each a graph of one node, in billions of "
        "operations per second (GOP/s), before and after the run:",
        "",
    ]
    lines += _table(["", "before", "after"], [
        [label, f"{peaks[0][kind] / 1e9:,.0f}", f"{peaks[-1][kind] / 1e9:,.0f}"] for kind, label in kinds.items()
    ])  # fmt: skip
    if "operations_per_second" in gemm:
        lines += ["", "A random model with the shape of a 0.5B one (24 layers, hidden size 896, intermediate 4864) on "
                  "texts of 512 tokens; only the products with weights that are computed are counted:", ""]  # fmt: skip
        lines += _table(["", "tokens/s", "GOP/s", "share of the peak"], [
            [precision, f"{gemm['tokens_per_second'][precision]:,.0f}", f"{operations / 1e9:,.0f}",
             f"{gemm['share_of_peak'][precision]:.0%}"]
            for precision, operations in gemm["operations_per_second"].items()
        ])  # fmt: skip
    if "error" in gemm:
        lines += ["", f"The 0.5B shape was not measured: `{gemm['error']}`"]
    return lines


def _cold(cold: dict[str, Any]) -> list[str]:
    low, high = min(cold["seconds"]), max(cold["seconds"])
    return ["", "## Cold start", "", "From the start of `rewardrt score` on `models/tiny` to its first row, in an "
            f"environment with the extra `cpu` alone: {cold['median']:.2f} s, the median of {len(cold['seconds'])} "
            f"({low:.2f} to {high:.2f})."]  # fmt: skip


def draw(results: Results) -> str:
    """Return an SVG: for each workload a bar for each system, the longer the faster."""
    left, room, bar, step = 250, 470, 15, 20
    kinds = {entry["name"]: entry["kind"] for entry in results["systems"]}
    counts = {system for system, _ in counting(results)}
    parts: list[str] = []
    top = 34
    for workload in (each["name"] for each in results["workloads"] if each["name"] != "held out"):
        bars = [(name, rate(results, workload, name)) for name in _systems(results)]
        bars.append(("torch bfloat16, file order", rate(results, workload, "torch bfloat16", ("file",))))
        found = sorted([(name, value) for name, value in bars if value is not None], key=lambda pair: -pair[1])
        if not found:
            continue
        parts.append(f'<text x="12" y="{top}" class="head">{escape(workload)}, tokens/s</text>')
        top += 12
        for name, value in found:
            width = room * value / found[0][1]
            kind = kinds.get(name, "torch")
            faint = ' opacity="0.4"' if kind == "peer" and name not in counts else ""
            middle = top + bar - 3.5
            parts.append(f'<text x="{left - 8}" y="{middle}" text-anchor="end">{escape(name)}</text>')
            shape = f'x="{left}" y="{top}" width="{width:.1f}" height="{bar}" rx="2"'
            parts.append(f'<rect {shape} fill="{COLOURS[kind]}"{faint}/>')
            parts.append(f'<text x="{left + width + 6:.1f}" y="{middle}">{value:,.0f}</text>')
            top += step
        top += 30
    note = f"pale: fewer than {COUNTS:.0%} of preferences agree with fp32"
    parts.append(f'<text x="12" y="{top - 8}">{note}</text>')
    style = "text{font:12px sans-serif;fill:#24292f}.head{font-weight:bold;font-size:14px}"
    size = f'width="800" height="{top + 6}" viewBox="0 0 800 {top + 6}"'
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{style}</style>\n'
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def write_page(results: Results, path: Path) -> None:
    """Write the page, and its picture beside it."""
    picture = path.with_suffix(".svg")
    picture.write_text(draw(results), encoding="utf-8")
    path.write_text(page(results, picture.name), encoding="utf-8")


if __name__ == "__main__":
    given, target = map(Path, sys.argv[1:])
    write_page(json.loads(given.read_text(encoding="utf-8")), target)
