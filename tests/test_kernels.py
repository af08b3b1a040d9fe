"""Each operator of int8 graphs: what its kernel computes is what its function says, in the same bits in any company."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
import pytest

from rewardrt.errors import ProviderError
from rewardrt.machine import kernels
from rewardrt_export.precisions.functions import DOMAIN, pack
from rewardrt_export.precisions.operators import OPERATORS, Product, Rounding, define, kernel_table, operator_of

ROOT = Path(__file__).parent.parent
RUNS = kernels.describe()
needs = {
    name: pytest.mark.skipif(name not in RUNS, reason=f"no kernels for {name} on this machine ({RUNS})")
    for name in ("rounding", "products", "attention")
}
Array = npt.NDArray[Any]
RNG = np.random.default_rng(0)


def normal(*shape: int, scale: float = 1) -> Array:
    return (scale * RNG.standard_normal(shape)).astype(np.float32)


class Operator:
    """A graph of one call, run by its kernel and by its function. Arrays in `constants` are part of the graph."""

    def __init__(
        self, name: str, inputs: dict[str, Array], outputs: int, constants: tuple[str, ...] = (), **attributes: Any
    ) -> None:
        self.inputs = {key: value for key, value in inputs.items() if key not in constants}
        values = []
        for key, array in inputs.items():
            tensor = ir.tensor(array, name=key)
            shape = ir.Shape(array.shape) if key in constants else ir.Shape([None] * array.ndim)
            values.append(
                ir.Value(
                    name=key,
                    shape=shape,
                    type=ir.TensorType(tensor.dtype),
                    const_value=tensor if key in constants else None,
                )
            )
        node = ir.node(name, values, attributes=attributes, domain=DOMAIN, num_outputs=outputs)
        called = operator_of(node)
        assert called is not None
        for index, (value, kind) in enumerate(zip(node.outputs, called.outputs, strict=True)):
            value.name, value.type = f"out{index}", ir.TensorType(kind)
        graph = ir.Graph(
            [value for value in values if value.const_value is None], node.outputs, nodes=[node],
            initializers=[value for value in values if value.const_value is not None], opset_imports={"": 23}, name="call",
        )  # fmt: skip
        model = ir.Model(graph, ir_version=10)
        define(model)
        self.model = ir.serde.serialize_model(model).SerializeToString()
        self.names = [value.name for value in node.outputs]

    def run(self, *, kernel: bool, threads: int = 2, **inputs: Array) -> list[Array]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        options.enable_cpu_mem_arena = False  # each tensor in memory of its own, whose ends `make sanitize` knows
        if kernel:
            kernels.register(options)
        session = onnxruntime.InferenceSession(self.model, options, providers=["CPUExecutionProvider"])
        return session.run(None, self.inputs | inputs)

    def both(self) -> tuple[list[Array], list[Array]]:
        return self.run(kernel=True), self.run(kernel=False)


def test_what_the_kernels_know_of_the_operators_is_what_these_say() -> None:
    assert (ROOT / "runtime" / "kernels" / "table.h").read_text(encoding="utf-8") == kernel_table(), "make kernel-table"
    names = [operator.name for table in OPERATORS.values() for operator in table]
    assert len(names) == len(set(names)) == 108


@needs["rounding"]
@pytest.mark.parametrize("twice", ["", "Twice"])
@pytest.mark.parametrize("channels", [4, 48, 576, 100])
def test_rounding_gives_the_numbers_of_its_function(twice: str, channels: int) -> None:
    values = normal(2, 9, channels) * np.exp(normal(2, 9, 1) * 5)
    values[0, 3] = 0
    found, expected = Operator(f"RoundTokens{twice}", {"x": values}, 3 if twice else 2, channels=channels).both()
    assert [each.dtype for each in found] == [other.dtype for other in expected]
    assert np.array_equal(found[-1], expected[-1])
    assert_rounded_alike(found, expected)


def assert_rounded_alike(found: list[Array], expected: list[Array]) -> None:
    numbers = [
        sum((plane.astype(np.float64) - 128) / 254**place for place, plane in enumerate(planes)) * steps
        for *planes, steps in (found, expected)
    ]
    # What lies half way between two integers may go to either.
    differences = np.abs(numbers[0] - numbers[1]) / (expected[-1] / 254 ** (len(expected) - 2))
    assert differences.max() <= 1.01
    assert np.mean(differences > 0.1) < 0.01


@needs["rounding"]
@pytest.mark.parametrize("twice", ["", "Twice"])
@pytest.mark.parametrize(
    "kind",
    [
        "RoundTokensMixed",
        "ScaleRoundTokens",
        "ScaleRoundTokensMixed",
        "GateRoundTokens",
        "GateRoundTokensMixed",
        "NormRoundTokens",
        "NormRoundTokensMixed",
    ],
)
def test_mixing_and_norms_give_the_numbers_of_their_functions(kind: str, twice: str) -> None:
    inputs, attributes = {"x": normal(2, 33, 192, scale=30)}, {"channels": 192}
    if kind.startswith("Gate"):
        inputs["up"] = normal(2, 33, 192)
    elif not kind.startswith("Round"):
        inputs["gain"] = normal(192)
    if kind.startswith("Norm"):
        attributes |= {"epsilon": 1e-5}
    found, expected = Operator(f"{kind}{twice}", inputs, 3 if twice else 2, **attributes).both()
    assert np.abs(found[-1] - expected[-1]).max() < 2e-6 * expected[-1].max()
    assert_rounded_alike(found, expected)


@needs["rounding"]
def test_what_is_not_a_number_does_not_become_one() -> None:
    values = normal(1, 6, 64)
    values[0, 1, 7], values[0, 4, 60] = np.nan, np.inf
    for kind in ("RoundTokens", "RoundTokensMixed", "RoundTokensTwice"):
        steps = Operator(kind, {"x": values}, 3 if "Twice" in kind else 2, channels=64).run(kernel=True)[-1][0, :, 0]
        assert np.isfinite(steps).tolist() == [True, False, True, True, False, True]


def product_inputs(tokens: int, channels: int, columns: int, twice: str, add: str) -> dict[str, Array]:
    planes = {"plane": RNG.integers(0, 256, (2, tokens, channels)).astype(np.uint8)}
    if twice:
        planes["rest"] = RNG.integers(0, 256, (2, tokens, channels)).astype(np.uint8)
    weight = RNG.integers(-127, 128, (channels, columns)).astype(np.int8)
    rest = {"steps": np.exp(normal(2, tokens, 1)), "weight": pack(weight), "columns": np.exp(normal(columns))}
    return planes | rest | ({"added": normal(2, tokens, columns)} if add else {})


@needs["products"]
@pytest.mark.parametrize("add", ["", "Add"])
@pytest.mark.parametrize("twice", ["", "Twice"])
@pytest.mark.parametrize(("tokens", "channels", "columns"), [(1, 4, 1), (3, 36, 64), (7, 576, 200), (203, 100, 65)])
def test_products_give_the_bits_of_their_functions(
    tokens: int, channels: int, columns: int, twice: str, add: str
) -> None:
    inputs = product_inputs(tokens, channels, columns, twice, add)
    found, expected = Operator(f"Product{twice}{add}", inputs, 1, ("weight", "columns")).both()
    assert np.array_equal(found[0], expected[0])
    integers = inputs["weight"].transpose(1, 3, 0, 2).reshape(channels, -1)[:, :columns].astype(np.float64)
    plane = inputs["plane"] - 128.0 + ((inputs["rest"] - 128.0) / 254 if twice else 0)
    true = plane @ integers * inputs["columns"] * inputs["steps"] + (inputs["added"] if add else 0)
    assert np.abs(found[0] - true).max() < 1e-6 * np.abs(true).max()


@needs["products"]
@pytest.mark.parametrize("twice", ["", "Twice"])
@pytest.mark.parametrize(("kind", "columns"), [("Pair", (65, 128)), ("Triple", (200, 3, 64))])
@pytest.mark.parametrize("tokens", [1, 40, 203])
def test_products_of_one_activation_are_those_of_each_weight(
    tokens: int, kind: str, columns: tuple[int, ...], twice: str
) -> None:
    inputs = [product_inputs(tokens, 100, count, twice, "") for count in columns]
    together = dict(inputs[0])
    for place, each in enumerate(inputs[1:], 2):
        together |= {f"weight{place}": each["weight"], f"columns{place}": each["columns"]}
    constants = tuple(name for name in together if name.startswith(("weight", "columns")))
    found, expected = Operator(f"Product{twice}{kind}", together, len(columns), constants).both()
    for each, result, other in zip(inputs, found, expected, strict=True):
        alone = {**inputs[0], "weight": each["weight"], "columns": each["columns"]}
        (single,) = Operator(f"Product{twice}", alone, 1, ("weight", "columns")).run(kernel=True)
        assert np.array_equal(result, single)
        assert np.array_equal(result, other)


@needs["products"]
@pytest.mark.parametrize("twice", ["", "Twice"])
@pytest.mark.parametrize(("tokens", "columns"), [(1, 3), (40, 128), (203, 65)])
def test_products_may_be_gates_of_others(tokens: int, columns: int, twice: str) -> None:
    up, gate = (product_inputs(tokens, 100, columns, twice, "") for _ in range(2))
    gate["columns"] *= 2e-5  # silu of numbers around 1
    shared = [name for name in up if name not in ("weight", "columns")]
    inputs = {name: up[name] for name in shared} | {"gate": gate["weight"], "opened": gate["columns"]}
    constants = ("gate", "opened", "weight", "columns")
    inputs |= {name: up[name] for name in ("weight", "columns")}
    found, expected = Operator(f"Product{twice}Gate", inputs, 1, constants).both()
    alone = [
        Operator(f"Product{twice}", {**up, **weights}, 1, ("weight", "columns")).run(kernel=True)[0].astype(np.float64)
        for weights in ({name: gate[name] for name in ("weight", "columns")}, {})
    ]
    true = alone[0] / (1 + np.exp(-alone[0])) * alone[1]
    for result in (found[0], expected[0]):
        assert np.abs(result - true).max() < 1e-6 * np.abs(true).max()


@needs["products"]
@pytest.mark.parametrize("mixed", ["", "Mixed"])
@pytest.mark.parametrize("twice", ["", "Twice"])
@pytest.mark.parametrize(
    ("before", "kind"), [("", "Add"), ("Scale", ""), ("Norm", "Triple"), ("Norm", "Gate"), ("Gate", "Pair")]
)
@pytest.mark.parametrize("tokens", [1, 150])
def test_rounding_and_multiplying_at_once_gives_the_bits_of_both(
    tokens: int, before: str, kind: str, mixed: str, twice: str
) -> None:
    values = {"values": normal(2, tokens, 192)}
    if before:
        values["second"] = normal(*((2, tokens, 192) if before == "Gate" else (192,)))
    attributes = {"channels": 192} | ({"epsilon": 1e-5} if before == "Norm" else {})
    names = ["plane", "rest", "steps"] if twice else ["plane", "steps"]
    rounding = Rounding(before, bool(mixed), len(names) - 1)  # type: ignore[arg-type]
    planes = Operator(rounding.name, values, len(names), **attributes).run(kernel=True)
    weights: dict[str, Array] = {}
    for place in range({"Triple": 3, "Gate": 2, "Pair": 2}.get(kind, 1)):
        one = product_inputs(tokens, 192, 70, "", "")
        weights |= {f"weight{place}": one["weight"], f"columns{place}": 1e-3 * one["columns"]}
    constants, outputs = tuple(weights), {"Triple": 3, "Pair": 2}.get(kind, 1)
    added = {"added": normal(2, tokens, 70)} if kind == "Add" else {}
    product = Product(rounding.planes, kind)  # type: ignore[arg-type]
    apart = Operator(product.name, dict(zip(names, planes, strict=True)) | weights | added, outputs, constants)
    at_once = Operator(
        replace(product, rounding=rounding).name, values | weights | added, outputs, constants, **attributes
    )
    found, expected = at_once.both()
    for each, other, near in zip(found, apart.run(kernel=True), expected, strict=True):
        assert np.array_equal(each, other)
        assert np.abs(each - near).max() < (1e-4 if twice else 0.02) * np.abs(near).max()  # halves go to either side
    assert all(np.array_equal(a, b) for a, b in zip(found, at_once.run(kernel=True, threads=1), strict=True))


@needs["rounding"]
def test_gates_are_silu_times_up() -> None:
    gate, up = normal(3, 5, 1111, scale=20), normal(3, 5, 1111)
    gate[0, 0, :4] = [0, 200, -200, -0.0]
    true = gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64))) * up
    operator = Operator("GateRoundTokensTwice", {"gate": gate, "up": up}, 3, channels=1111)
    for plane, rest, steps in operator.both():
        found = ((plane - 128.0) + (rest - 128.0) / 254) * steps
        assert np.abs(found - true).max() < 2.1e-5 * np.abs(true).max()  # 1 / (127 * 254) / 2, and float32


def attention_inputs(
    batch: int, tokens: int, heads: int, kv_heads: int, size: int, past: int, rotary: bool
) -> dict[str, Array]:
    inputs = {
        "query": normal(batch, tokens, heads, size, scale=2),
        "key": normal(batch, tokens, kv_heads, size, scale=2),
        "value": normal(batch, tokens, kv_heads, size),
        "past_key": normal(batch, kv_heads, past, size, scale=2).astype(np.float16),
        "past_value": normal(batch, kv_heads, past, size).astype(np.float16),
    }
    if rotary:
        angles = normal(batch, tokens, size // 2)
        inputs |= {"cosines": np.cos(angles), "sines": np.sin(angles)}
    return inputs


def attend(inputs: dict[str, Array]) -> Operator:
    kind = "RotaryCausalAttention" if "cosines" in inputs else "CausalAttention"
    return Operator(kind, inputs, 3, scale=inputs["query"].shape[-1] ** -0.5)


@needs["attention"]
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 2, 2, 32, 0), (2, 7, 4, 2, 64, 0), (1, 70, 9, 3, 64, 77), (2, 33, 4, 1, 96, 64), (1, 50, 2, 2, 128, 3)],
)
def test_attention_is_its_function_to_bfloat16(shape: tuple[int, ...], rotary: bool) -> None:
    found, expected = attend(attention_inputs(*shape, rotary=rotary)).both()
    error = np.sqrt(np.mean((found[0] - expected[0]) ** 2) / np.mean(expected[0] ** 2))
    assert error < 0.008  # bfloat16 has steps of 2^-8
    for each, other in zip(found[1:], expected[1:], strict=True):
        assert each.dtype == np.float16
        assert np.abs(each.astype(np.float32) - other).max() <= 2**-10 * np.abs(other).max()


@needs["attention"]
@pytest.mark.parametrize("size", [16, 48, 80])
def test_heads_of_other_sizes_attend_without_a_rotation(size: int) -> None:
    found, expected = attend(attention_inputs(1, 20, 2, 1, size, 10, rotary=False)).both()
    assert np.sqrt(np.mean((found[0] - expected[0]) ** 2) / np.mean(expected[0] ** 2)) < 0.008


@needs["attention"]
@pytest.mark.parametrize("cut", [1, 2, 64, 100])
def test_attention_gives_a_token_the_same_bits_in_any_company(cut: int) -> None:
    inputs = attention_inputs(2, 150, 6, 2, 64, 30, rotary=True)
    operator = attend(inputs)
    whole = operator.run(kernel=True)
    assert all(np.array_equal(a, b) for a, b in zip(whole, operator.run(kernel=True, threads=1), strict=True))
    new = [name for name in inputs if not name.startswith("past")]
    one = operator.run(kernel=True, **{name: array[1:] for name, array in inputs.items()})
    assert np.array_equal(one[0], whole[0][1:])
    first = operator.run(kernel=True, **{name: inputs[name][:, :cut] for name in new})
    then = {name: inputs[name][:, cut:] for name in new} | {"past_key": first[1], "past_value": first[2]}
    second = operator.run(kernel=True, **then)
    assert np.array_equal(np.concatenate([first[0], second[0]], axis=1), whole[0])
    assert all(np.array_equal(a, b) for a, b in zip(second[1:], whole[1:], strict=True))


@needs["attention"]
@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e6])
def test_attention_to_what_is_not_finite_is_not_a_number(name: str, bad: float) -> None:
    inputs = attention_inputs(1, 40, 2, 1, 32, 0, rotary=False)
    inputs[name][0, 7, 0, 5] = bad
    result = attend(inputs).run(kernel=True)[0]
    finite = np.isfinite(result).all(axis=(0, 2, 3))
    assert finite[:7].all() or name == "value"  # masked values are multiplied with 0
    if (name, bad) == ("query", 1e6):  # a query is not float16: a large one is a number
        assert finite.all()
    elif name == "query":
        assert not finite[7]
    else:  # what float16 cannot hold is infinite
        assert not finite[7:].any()


@needs["attention"]
def test_a_large_channel_does_not_cost_the_others_their_bits() -> None:
    inputs = attention_inputs(1, 60, 2, 1, 64, 0, rotary=False)
    for name in ("query", "key"):
        inputs[name][..., 3] += 60  # as in a language model: a score of thousands, of which differences matter
    found, expected = attend(inputs).both()
    assert np.sqrt(np.mean((found[0] - expected[0]) ** 2) / np.mean(expected[0] ** 2)) < 0.02


@needs["products"]
@needs["attention"]
def test_what_does_not_fit_is_refused() -> None:
    inputs = product_inputs(3, 8, 5, "", "")
    operator = Operator("Product", inputs, 1, ("weight", "columns"))
    with pytest.raises(Exception, match="do not fit each other"):
        operator.run(kernel=True, plane=inputs["plane"][..., :4])
    with pytest.raises(Exception, match="do not fit each other"):
        operator.run(kernel=True, steps=inputs["steps"][:1])
    attention = attention_inputs(1, 5, 4, 2, 32, 3, rotary=True)
    for name in ("key", "value", "past_value", "sines"):
        with pytest.raises(Exception, match="do not fit each other"):
            attend(attention).run(kernel=True, **{name: attention[name][..., :-1]})
    with pytest.raises(Exception, match="expected a constant weight"):
        Operator("Product", inputs, 1, ()).run(kernel=True)
    with pytest.raises(Exception, match="blocks of 64"):
        Operator("RoundTokensMixed", {"x": normal(1, 2, 24)}, 2, channels=24).run(kernel=True)


def test_a_library_that_does_not_load_is_an_error_and_one_that_is_not_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "LIBRARY", tmp_path / "lib.so")
    kernels.register(onnxruntime.SessionOptions())
    assert kernels.describe().startswith("none: they were not compiled")
    (tmp_path / "lib.so").write_text("no library")
    with pytest.raises(ProviderError, match=r"onnxruntime cannot load it .*install rewardrt again"):
        kernels.register(onnxruntime.SessionOptions())
    assert kernels.describe().startswith("none: the library does not load")


@pytest.fixture(scope="module")
def build() -> ModuleType:
    pytest.importorskip("hatchling", reason="hatchling is not installed: it is pip's for the installation alone")
    sys.path.insert(0, str(ROOT))
    import hatch_build

    sys.path.remove(str(ROOT))
    return hatch_build


def test_an_installation_without_a_compiler_says_why(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    reason = build.compile_library(ROOT / build.SOURCES, tmp_path / "lib.so")
    assert reason == "no-such-compiler: No such file or directory"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_the_sources_compile_without_a_warning(build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc -Wall -Wextra -Werror")
    assert build.compile_library(ROOT / build.SOURCES, tmp_path / "lib.so") is None
    assert [path.name for path in tmp_path.iterdir()] == ["lib.so"]
