"""The fastest matrix products that onnxruntime does on this machine, each a graph of one node.

python benchmarks/gemm_peak.py     prints JSON: operations per second (a multiplication and an addition are two)
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rewardrt.machine.providers import import_onnxruntime  # with what it would send of itself switched off

onnxruntime = import_onnxruntime()

SHAPES = ((512, 896, 4864), (512, 4864, 896), (1024, 2048, 2048))  # of rows, inner, columns
SECONDS = 1.0  # for each shape

Graph = tuple[onnx.GraphProto, dict[str, np.ndarray]]


def fp32(rows: int, inner: int, columns: int) -> Graph:
    """MatMul of floats."""
    weight = np.random.default_rng(0).standard_normal((inner, columns), dtype=np.float32)
    return _graph("MatMul", ["x", "w"], {"w": weight}, TensorProto.FLOAT, TensorProto.FLOAT, rows, inner)


def int8(rows: int, inner: int, columns: int) -> Graph:
    """MatMulInteger of unsigned by signed bytes."""
    weight = np.random.default_rng(0).integers(-127, 128, (inner, columns), dtype=np.int8)
    constants = {"w": weight, "x_zero": np.array(128, dtype=np.uint8), "w_zero": np.array(0, dtype=np.int8)}
    names = ["x", "w", "x_zero", "w_zero"]
    return _graph("MatMulInteger", names, constants, TensorProto.UINT8, TensorProto.INT32, rows, inner)


def nbits8(rows: int, inner: int, columns: int) -> Graph:
    """MatMulNBits: weights of 8 bits in blocks of 64, computed in integers (accuracy level 4)."""
    random = np.random.default_rng(0)
    blocks = inner // 64
    constants = {
        "w": random.integers(0, 256, (columns, blocks, 64), dtype=np.uint8),
        "scales": random.random(columns * blocks, dtype=np.float32),
    }
    attributes = {"K": inner, "N": columns, "bits": 8, "block_size": 64, "accuracy_level": 4}
    names = ["x", "w", "scales"]
    float32 = TensorProto.FLOAT
    return _graph("MatMulNBits", names, constants, float32, float32, rows, inner, "com.microsoft", attributes)


def _graph(
    operator: str, inputs: list[str], constants: dict[str, np.ndarray], given: int, result: int, rows: int, inner: int,
    domain: str = "", attributes: dict[str, int] | None = None,
) -> Graph:  # fmt: skip
    node = helper.make_node(operator, inputs, ["y"], domain=domain, **(attributes or {}))
    x = helper.make_tensor_value_info("x", given, [rows, inner])
    y = helper.make_tensor_value_info("y", result, None)
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    random = np.random.default_rng(1)
    bytes_given = given == TensorProto.UINT8
    fed = random.integers(0, 256, (rows, inner), np.uint8) if bytes_given else random.random((rows, inner), np.float32)
    return helper.make_graph([node], operator, [x], [y], initializers), {"x": fed}


def peak(make: Callable[[int, int, int], Graph]) -> float:
    """Return the operations per second of the fastest run over the shapes."""
    best = 0.0
    for rows, inner, columns in SHAPES:
        graph, feeds = make(rows, inner, columns)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        session.run(None, feeds)
        end = time.perf_counter() + SECONDS
        while time.perf_counter() < end:
            start = time.perf_counter()
            session.run(None, feeds)
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - start))
    return best


def measure() -> dict[str, float]:
    """Return the peak of each kind of product."""
    return {"fp32": peak(fp32), "int8": peak(int8), "nbits8": peak(nbits8)}


if __name__ == "__main__":
    print(json.dumps(measure()))
