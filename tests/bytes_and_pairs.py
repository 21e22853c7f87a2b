"""One model of products by bytes (MatMulNBits) and by pairs of bf16, around tiles of rows, blocks and panels."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.onnx_runtime import run_onnx_runtime
from tests.tolerances import BENIGN

# MatMulNBits as (bits, block, zero points, K, N, rows), with
# activations in bytes; MatMul in bf16 as (rows, K, N).
BYTES = [
    *((4, 32, True, 160, 41, rows) for rows in (1, 3, 5, 70)),
    (4, 64, False, 150, 12, 9),
    (2, 32, True, 96, 16, 6),
    (8, 32, True, 96, 17, 1),
    (8, 128, False, 300, 8, 7),
]
PAIRS = [(1, 64, 9), (5, 65, 20), (7, 256, 48), (40, 130, 33)]


def products() -> onnx.ModelProto:
    """A model of all products, inputs and outputs in f32."""
    random = np.random.default_rng(0)
    nodes, inputs, outputs, weights = [], [], [], dict[str, np.ndarray]()
    for i, (bits, block, zeros, depth, columns, rows) in enumerate(BYTES):
        blocks = -(-depth // block)
        weights[f"w{i}"] = random.integers(0, 256, (columns, blocks, block * bits // 8)).astype(np.uint8)
        weights[f"s{i}"] = (0.1 * random.standard_normal((columns, blocks))).astype(np.float32)
        if zeros:
            weights[f"z{i}"] = random.integers(0, 256, (columns, -(-blocks * bits // 8))).astype(np.uint8)
        sizes = {"K": depth, "N": columns, "bits": bits, "block_size": block, "accuracy_level": 4}
        names = [f"a{i}", f"w{i}", f"s{i}", *([f"z{i}"] if zeros else [])]
        nodes.append(helper.make_node("MatMulNBits", names, [f"y{i}"], domain="com.microsoft", **sizes))
        inputs.append(helper.make_tensor_value_info(f"a{i}", TensorProto.FLOAT, [rows, depth]))
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [rows, columns]))
    for rows, depth, columns in PAIRS:
        i = len(outputs)
        weights[f"w{i}"] = random.standard_normal((depth, columns)).astype(ml_dtypes.bfloat16)
        nodes += [
            helper.make_node("Cast", [f"a{i}"], [f"b{i}"], to=TensorProto.BFLOAT16),
            helper.make_node("MatMul", [f"b{i}", f"w{i}"], [f"c{i}"]),
            helper.make_node("Cast", [f"c{i}"], [f"y{i}"], to=TensorProto.FLOAT),
        ]
        inputs.append(helper.make_tensor_value_info(f"a{i}", TensorProto.FLOAT, [rows, depth]))
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [rows, columns]))
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "products", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def expected(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """ONNX Runtime's MatMulNBits, and products of bf16 in float64."""
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    found: dict[str, np.ndarray] = {}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            given = [feeds[node.input[0]], *(weights[name] for name in node.input[1:])]
            sizes = {a.name: a.i for a in node.attribute}
            (found[node.output[0]],) = run_onnx_runtime(
                "MatMulNBits", given, sizes, domain="com.microsoft", constants=range(1, len(given))
            )
        elif node.op_type == "MatMul":
            i = node.output[0][1:]
            a = feeds[f"a{i}"].astype(ml_dtypes.bfloat16).astype(np.float64)
            found[f"y{i}"] = a @ weights[f"w{i}"].astype(np.float64)
    return found


def feeds_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {
        spec.name: np.random.default_rng(i)
        .standard_normal([d.dim_value for d in spec.type.tensor_type.shape.dim])
        .astype(np.float32)
        for i, spec in enumerate(model.graph.input)
    }


def check(found: Mapping[str, np.ndarray], model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> None:
    for i, (name, wanted) in enumerate(expected(model, feeds).items()):
        limit = BENIGN["float32" if i < len(BYTES) else "bfloat16"]
        assert np.abs(found[name] - wanted).max() / np.abs(wanted).max() < limit, name
