"""The table of docs/tensorrt.md: what TensorRT makes of a tiny model of every backbone and of every family.

    python tests/tensorrt_table.py docs/tensorrt.md    # puts the table between the page's two marks

Needs the extra `tensorrt`, and no GPU. Status 1 where a graph is not taken whole.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from every_family import EVERY_BACKBONE, EVERY_FAMILY, Case
from rewardrt.errors import ExportError
from rewardrt.graph.shapes import Profile
from rewardrt_export.pipeline import export
from rewardrt_export.precisions import engine

HEAD = ("", "nodes", "attention", "not supported", "seconds", "engine MB", "rms of the reward")
MARK = "<!-- made by `make tensorrt-table` -->"
END = "<!-- end -->"


@dataclass(frozen=True)
class Row:
    """One line: what was exported, and what became of it."""

    name: str
    nodes: int
    attention: str  # whose: TensorRT's own operator, or written out
    refused: str  # what parser or builder said, "" where they took it
    seconds: float
    megabytes: float
    rms: float | None  # of certified rewards, against torch in float32, in standard deviations

    def cells(self) -> tuple[str, ...]:
        if self.refused:
            return self.name, f"{self.nodes}", self.attention, self.refused, "", "", ""
        rms = "" if self.rms is None else f"{self.rms:.4f}"
        return self.name, f"{self.nodes}", self.attention, "0", f"{self.seconds:.1f}", f"{self.megabytes:.1f}", rms


def measure(name: str, case: Case, *, certified: bool) -> Row:
    """Write a checkpoint, export it, and have its engine built; raises what the export raises but for a refusal."""
    missing, engine.missing = engine.missing, lambda: "measured below"
    try:
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "rm", Path(folder) / "bundle"
            case.write(source)
            options = case.export_options(source)
            made = export(source, target, precisions=("tensorrt",), certified=certified, **options)
            graph = target / made.manifest.variants[0].graph
            kinds = Counter(node.op_type for node in ir.load(graph).graph)
            attention = f"{kinds['Attention']} kernels" if kinds["Attention"] else "written out"
            certificate = made.certificate("tensorrt")
            rms = certificate.fidelity.rms_std if certificate is not None and certificate.fidelity else None
            try:
                found = engine.build(graph, Profile.of(made.manifest.spec.max_length))
            except ExportError as error:
                return Row(name, kinds.total(), attention, str(error), 0, 0, rms)
            return Row(name, kinds.total(), attention, "", found.seconds, found.bytes / 1e6, rms)
    finally:
        engine.missing = missing


def table(title: str, cases: dict[str, Case]) -> tuple[str, bool]:
    """Return a table, and whether every row was taken."""
    rows = []
    for name, case in cases.items():
        sys.stderr.write(f"{name}\n")
        rows.append(measure(name, case, certified=True))
    lines = [(title, *HEAD[1:]), ("---",) * len(HEAD), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines), not any(row.refused for row in rows)


def main(page: Path) -> int:
    """Put the tables into the page."""
    if (reason := engine.missing()) is not None:
        sys.stderr.write(f"{reason}\n")
        return 2
    parts = [table("backbone", EVERY_BACKBONE), table("family", EVERY_FAMILY)]
    text = f"{MARK}\n\n" + "\n\n".join(part for part, _ in parts) + f"\n\n{END}"
    old = page.read_text(encoding="utf-8")
    page.write_text(re.sub(rf"{re.escape(MARK)}.*?{re.escape(END)}", lambda _: text, old, flags=re.S), encoding="utf-8")
    return 0 if all(taken for _, taken in parts) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
