"""The graph's contract at its smallest: what goes in, what comes out, and which files are refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from rewardrt.errors import BundleError, InferenceError, ProviderError
from rewardrt.graph.session import GraphSession, PastInput
from rewardrt.machine.providers import onnxruntime_distributions

TABLE = [0.0, 1.0, 10.0, 100.0]
HEADS, HEAD_DIM = 2, 4
cpu_wheel = pytest.mark.skipif("onnxruntime" not in onnxruntime_distributions(), reason="asks what the CPU wheel does")


def build(layers: int = 1, past_type: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """A graph of the contract: the sum of TABLE over the valid tokens, plus 1,000 for each token of the past."""
    tensors: dict[str, np.ndarray] = {
        "table": np.array(TABLE, np.float32),
        "zero": np.array(0, np.int64),
        "one": np.array(1, np.int64),
        "none": np.array(0, np.float32),
        "last": np.array([1], np.int64),
        "thousand": np.array(1000, np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["values"]),
        helper.make_node("Shape", ["input_ids"], ["tokens"], start=1),
        helper.make_node("Squeeze", ["tokens"], ["count"]),
        helper.make_node("Range", ["zero", "count", "one"], ["positions"]),
        helper.make_node("Unsqueeze", ["lengths", "last"], ["column"]),
        helper.make_node("Less", ["positions", "column"], ["valid"]),
        helper.make_node("Where", ["valid", "values", "none"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "last"], ["total" if layers else "rewards"]),
    ]
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"]),
        helper.make_tensor_value_info("lengths", TensorProto.INT64, ["batch"]),
    ]
    outputs = [helper.make_tensor_value_info("rewards", TensorProto.FLOAT, ["batch", 1])]
    if layers:
        nodes += [
            helper.make_node("Shape", ["past_key.0"], ["past"], start=2, end=3),
            helper.make_node("Cast", ["past"], ["past_float"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["past_float", "thousand"], ["bonus"]),
            helper.make_node("Add", ["total", "bonus"], ["rewards"]),
        ]
    for name in (f"{part}.{layer}" for layer in range(layers) for part in ("key", "value")):
        shape: list[str | int | None] = ["batch", HEADS, "past", HEAD_DIM]
        inputs.append(helper.make_tensor_value_info(f"past_{name}", past_type, shape))
        outputs.append(helper.make_tensor_value_info(f"present_{name}", past_type, shape))
        nodes.append(helper.make_node("Identity", [f"past_{name}"], [f"present_{name}"]))
    initializers = [onnx.numpy_helper.from_array(value, name) for name, value in tensors.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def save(folder: Path, model: onnx.ModelProto) -> Path:
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture
def session(tmp_path: Path) -> GraphSession:
    return GraphSession.open(save(tmp_path, build(layers=2)), "cpu")


def ids(*rows: list[int]) -> Any:
    return np.array(rows, dtype=np.int64)


def test_rewards_are_those_of_the_valid_tokens(session: GraphSession) -> None:
    rewards = session.run(ids([1, 2, 3], [2, 3, 3], [3, 1, 1]), np.array([3, 1, 2]))
    assert rewards.dtype == np.float32
    assert rewards.tolist() == [[111.0], [10.0], [101.0]]


def test_the_past_is_read_off_the_graph_and_fed_empty(session: GraphSession) -> None:
    names = ["past_key.0", "past_value.0", "past_key.1", "past_value.1"]
    assert session.past == tuple(PastInput(name, (HEADS, 0, HEAD_DIM), np.float32) for name in names)
    assert session.run(ids([1]), np.array([1])).tolist() == [[1.0]]  # 1,000 more for each token of a past


def test_a_graph_without_a_past_runs(tmp_path: Path) -> None:
    session = GraphSession.open(save(tmp_path, build(layers=0)), "cpu")
    assert session.past == ()
    assert session.run(ids([3, 3]), np.array([2])).tolist() == [[200.0]]


def test_a_half_precision_past_runs(tmp_path: Path) -> None:
    session = GraphSession.open(save(tmp_path, build(past_type=TensorProto.FLOAT16)), "cpu")
    assert session.past[0].dtype is np.float16
    assert session.run(ids([3, 3]), np.array([2])).tolist() == [[200.0]]


@cpu_wheel
def test_auto_is_the_cpu_here_and_says_so(tmp_path: Path) -> None:
    session = GraphSession.open(save(tmp_path, build()))
    assert (session.provider, session.note, session.threads) == ("cpu", None, None)


def test_threads_reach_onnxruntime(tmp_path: Path) -> None:
    session = GraphSession.open(save(tmp_path, build()), "cpu", threads=1)
    assert session.threads == 1
    assert session._session.get_session_options().intra_op_num_threads == 1


def test_no_threads_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ProviderError, match=r"^threads 0: expected at least 1, or None to leave it to onnxruntime$"):
        GraphSession.open(tmp_path / "model.onnx", "cpu", threads=0)


@cpu_wheel
def test_named_cuda_on_the_cpu_wheel_is_an_error(tmp_path: Path) -> None:
    version = onnxruntime_distributions()["onnxruntime"]
    with pytest.raises(ProviderError) as caught:
        GraphSession.open(save(tmp_path, build()), "cuda")
    assert str(caught.value) == (
        f"provider 'cuda' cannot be had: onnxruntime {version} was not built with it: "
        "`pip uninstall -y onnxruntime && pip install 'rewardrt[gpu]'`"
    )


def test_threads_may_share_one_session(session: GraphSession) -> None:
    def total(seed: int) -> tuple[list[float], list[float]]:
        generator = np.random.default_rng(seed)
        tokens = generator.integers(0, 4, (3, 1 + seed % 50))
        return session.run(tokens, np.full(3, tokens.shape[1])).ravel().tolist(), np.take(TABLE, tokens).sum(1).tolist()

    with ThreadPoolExecutor(8) as pool:
        for found, expected in pool.map(total, range(400)):
            assert found == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"this is not a model", "not an ONNX graph (no field of a protobuf message at byte 0)"),
        (b"", "not an ONNX graph (it is empty)"),
        (b"\x08\x0a", "onnxruntime cannot load it ([ONNXRuntimeError] : "),  # a message, of an IR version alone
    ],
)
def test_a_file_that_is_no_model_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes, reason: str
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError) as caught:
        GraphSession.open(path, "cpu")
    assert str(caught.value).startswith(f"{path}: {reason}")
    assert str(caught.value).endswith(" or export again")
    assert capfd.readouterr() == ("", "")


def drop(values: Any, name: str) -> None:
    values.remove(next(item for item in values if item.name == name))


def refusal(folder: Path, model: onnx.ModelProto) -> str:
    path = save(folder, model)
    with pytest.raises(BundleError) as caught:
        GraphSession.open(path, "cpu")
    return str(caught.value).replace(str(path), "MODEL")


def test_missing_inputs_and_outputs_are_named(tmp_path: Path) -> None:
    model = build(layers=2)
    drop(model.graph.output, "present_value.1")
    del model.graph.node[-1]  # the one that reads past_value.1
    drop(model.graph.input, "past_value.1")
    assert refusal(tmp_path, model) == (
        "MODEL: not a reward graph: no input past_value.1, no output present_value.1; export the checkpoint again"
    )


def test_a_graph_of_something_else_is_refused(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    assert refusal(tmp_path, model) == (
        "MODEL: not a reward graph: no input input_ids, no input lengths, unknown input x, no output rewards; "
        "export the checkpoint again"
    )


def test_wrong_types_are_refused(tmp_path: Path) -> None:
    model = build()
    model.graph.input[2].type.tensor_type.shape.dim[1].dim_param = "heads"
    assert refusal(tmp_path, model) == (
        "MODEL: not a reward graph: past_key.0 is tensor(float) ['batch', 'heads', 'past', 4], "
        "not float [batch, kv_heads, past, head_dim]; export the checkpoint again"
    )


def test_a_failing_graph_is_one_line(session: GraphSession, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InferenceError) as caught:
        session.run(ids([1, 99]), np.array([2]))
    assert str(caught.value).startswith("the graph failed on 1 x 2 tokens ([ONNXRuntimeError] : ")
    assert "idx=99 must be within the inclusive range [-4,3]" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        (ids([1, 2]), [3], "lengths [3]: expected 1 to 2, one for each row"),
        (ids([1, 2]), [0], "lengths [0]: expected 1 to 2, one for each row"),
        (ids([1], [2]), [1], "expected input_ids [batch, tokens] and lengths [batch], found (2, 1) and (1,)"),
        (np.empty((0, 2), np.int64), [], "lengths []: expected 1 to 2, one for each row"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(session: GraphSession, tokens: Any, lengths: Any, message: str) -> None:
    with pytest.raises(InferenceError) as caught:
        session.run(tokens, np.array(lengths, np.int64))
    assert str(caught.value) == message


def test_a_wrong_type_is_refused(session: GraphSession) -> None:
    with pytest.raises(InferenceError, match="Unexpected input data type"):
        session.run(np.ones((1, 2), np.int32), np.array([2]))
