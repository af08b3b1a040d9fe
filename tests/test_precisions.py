"""What a precision is, is said in one place: for verification, the export, help and documentation."""

from __future__ import annotations

import re
from pathlib import Path

import onnx_ir as ir
import pytest

from commands import run
from rewardrt.bundle.precisions import PRECISIONS, current_name, in_words
from rewardrt.errors import ExportError
from rewardrt_export.precisions.operators import define
from rewardrt_export.precisions.table import LOWERINGS, chosen_precisions

ROOT = Path(__file__).parent.parent


def test_unknown_names_and_two_names_of_one_precision_are_refused() -> None:
    with pytest.raises(ExportError, match=r"^precision 'fp8': expected one of fp32, weights-bf16, weights-fp16, half"):
        chosen_precisions(["fp32", "fp8"])
    with pytest.raises(ExportError, match=r"^precisions fp16, weights-fp16: expected some of .*, each once$"):
        chosen_precisions(["fp16", "weights-fp16"])


def test_a_precision_is_described_once() -> None:
    assert LOWERINGS.keys() == PRECISIONS.keys()
    assert all(name == precision.name for name, precision in PRECISIONS.items())
    assert [current_name(name) for name in ("fp16", "bf16", "half", "fp8")] == [
        "weights-fp16", "weights-bf16", "half", "fp8",
    ]  # fmt: skip
    said = re.sub(r"\s+", " ", run("export", "--help").stdout)
    assert f"Precision: {in_words(PRECISIONS)};" in said
    assert all(f"{name}: weights {each.weights}, products {each.products}" in said for name, each in PRECISIONS.items())


def test_the_documentation_names_every_precision_with_its_tolerance() -> None:
    exporting = (ROOT / "docs" / "exporting.md").read_text(encoding="utf-8")
    for name, each in PRECISIONS.items():
        assert f"\n| `{name}` | {each.weights} | {each.products} | {each.description} | " in exporting
    bundle = (ROOT / "docs" / "bundle.md").read_text(encoding="utf-8")
    assert in_words(f"`{name}`" for name in PRECISIONS) in bundle
    for name, precision in PRECISIONS.items():
        assert re.search(rf"{precision.tolerance_std:g} for [^;]*`{name}`", bundle), name


def test_operators_of_an_earlier_versions_graph_are_what_they_were() -> None:
    written = ir.load(ROOT / "tests" / "bundles" / "version-1" / "model.int8.onnx")
    today = written.clone()
    today.functions.clear()
    define(today)
    assert len(written.functions) > 10
    assert today.functions.keys() == written.functions.keys()
    for name, function in written.functions.items():
        before, now = (ir.serde.serialize_function(each) for each in (function, today.functions[name]))
        assert now.SerializeToString() == before.SerializeToString(), name
