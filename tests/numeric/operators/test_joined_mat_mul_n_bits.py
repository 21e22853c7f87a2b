"""Products by packed weights as one kernel, with the norm before them, against ONNX Runtime's one by one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from comparing import MICROSOFT, TOLERANCE, relative_error, widen
from harness import run_op
from linattn.dialect_patterns.op import LoweringOptions
from linattn.dialect_patterns.target import Target
from linattn.frontend.graph.join_norms import join_norms
from linattn.frontend.graph.join_packed_products import join_packed_products
from linattn.frontend.graph.schema import infer_types
from linattn.frontend.graph.specialize import SpecializedGraph
from onnx import TensorProto, helper, numpy_helper
from onnx_runtime import run_onnx_runtime
from test_mat_mul_n_bits import OP, operands, shape_attributes

F16 = np.float16
GPU = Target("vulkan", is_gpu=True, subgroup_size=32, max_threads=1024, workgroup_memory=49_152)
VERSIONS = {"": 22, MICROSOFT: 1}


@pytest.mark.vulkan
@pytest.mark.xdist_group("vulkan")
@pytest.mark.parametrize(
    ("target", "dtype", "depth", "block", "columns", "accuracy", "zeros", "bias", "gated", "norm"),
    [
        ("lavapipe", np.float32, 1024, 32, (300, 44), 4, "", False, False, "skip sum"),
        ("lavapipe", np.float32, 512, 32, (132, 132), 4, "packed", True, True, "skip sum"),
        ("lavapipe", F16, 256, 64, (44,), 0, "float", True, False, "plain"),
        ("lavapipe", ml_dtypes.bfloat16, 256, 32, (36, 36), 4, "", False, True, "skip"),
        ("vulkan", np.float32, 1184, 32, (44, 300, 4), 4, "packed", False, False, ""),  # A is rounded before
        ("lavapipe", np.float32, 88, 16, (44, 44), 0, "", True, True, ""),  # a block that is not full
    ],
    ids=str,
)
def test_products(
    target: str, dtype: Any, depth: int, block: int, columns: tuple[int, ...], accuracy: int, zeros: str, bias: bool,
    gated: bool, norm: str,
) -> None:  # fmt: skip
    rng = np.random.default_rng(depth)
    a, skip = (rng.standard_normal((1, 1, depth)).astype(dtype) for _ in range(2))
    gamma = rng.uniform(0.5, 2, depth).astype(dtype)
    given, apart = [], []
    for count in columns:
        own = shape_attributes(depth, block, 4, accuracy, count)
        inputs = [one for one in operands(own, (1, 1), zeros=zeros, bias=bias, dtype=dtype)[1:]]
        inputs[1] = (np.asarray(inputs[1], np.float32) * 0.3).astype(dtype)
        given += [one for one in inputs if one is not None]
        apart.append((own, inputs))
    attributes = {name: apart[0][0][name] for name in ("K", "bits", "block_size", "accuracy_level")}
    attributes |= {
        "columns": list(columns),
        "with_zeros": int(bool(zeros)),
        "with_bias": int(bias),
        "gated": int(gated),
    }
    attributes |= {"with_norm": int(bool(norm)), "with_skip": int("skip" in norm), "with_sum": int("sum" in norm)}
    before = [*([gamma] if norm else []), *([skip] if "skip" in norm else [])]
    count = (1 if gated else len(columns)) + ("sum" in norm)
    what = {"domain": "linattn", "version": 1, "num_outputs": count, "target": target}
    got = run_op("JoinedMatMulNBits", [a, *before, *given], attributes | ({"epsilon": 0.5} if norm else {}), **what)
    total = a.astype(np.float64) + (skip.astype(np.float64) if "skip" in norm else 0)
    left = total / np.sqrt(np.mean(total**2) + 0.5) * gamma.astype(np.float64) if norm else total
    want = []
    for own, inputs in apart:
        wide = [left.astype(np.float32), *map(widen, inputs)]
        want += run_onnx_runtime(OP, wide, own, domain=MICROSOFT, version=1, constants=range(1, len(wide)))
    if gated:
        gate = want[0].astype(np.float64)
        want = [gate / (1 + np.exp(-gate)) * want[1]]
    for y, right in zip(got, [*want, *([total] if "sum" in norm else [])], strict=True):
        assert y.dtype == dtype
        assert relative_error(y, right) <= TOLERANCE[np.dtype(dtype).name]


@pytest.mark.vulkan
@pytest.mark.xdist_group("vulkan")
@pytest.mark.parametrize(
    ("dtype", "bits", "block", "accuracy", "size"),
    [(np.float32, 4, 32, 4, 64), (F16, 8, 32, 0, 32), (np.float32, 2, 32, 0, 128)],
    ids=str,
)
def test_gated_norm_by_heads_and_a_product(dtype: Any, bits: int, block: int, accuracy: int, size: int) -> None:
    rng, depth = np.random.default_rng(size), 1024
    a, gate = ((rng.standard_normal((1, 1, depth)) * 3).astype(dtype) for _ in range(2))
    scale, own = rng.uniform(0.5, 2, size).astype(dtype), shape_attributes(depth, block, bits, accuracy, 44)
    inputs = operands(own, (1, 1), dtype=dtype)[1:3]
    inputs[1] = (np.asarray(inputs[1], np.float32) * 0.3).astype(dtype)
    attributes = {name: own[name] for name in ("K", "bits", "block_size", "accuracy_level")} | {"columns": [44]}
    attributes |= {"head": size, "epsilon": 0.5, "multiplies_gate": 1}
    what = {"domain": "linattn", "version": 1, "target": "lavapipe"}
    (got,) = run_op("JoinedMatMulNBits", [a, scale, gate, *inputs], attributes, **what)
    apart, z = a.astype(np.float64).reshape(-1, size), gate.astype(np.float64)
    norm = apart / np.sqrt(np.mean(apart**2, -1, keepdims=True) + 0.5) * scale.astype(np.float64)
    left = (norm.reshape(1, 1, depth) * z / (1 + np.exp(-z))).astype(np.float32)
    (want,) = run_onnx_runtime(OP, [left, *map(widen, inputs)], own, domain=MICROSOFT, version=1, constants=[1, 2])
    assert got.dtype == dtype
    assert relative_error(got, want) <= TOLERANCE[np.dtype(dtype).name]


def graph(rows: int = 1, block: int = 32, other: str = "") -> SpecializedGraph:
    """A norm, two products of it and a small one, and a gated pair of another norm."""
    nodes, weights = [], {"gamma": np.ones(64, np.float32), "w": np.ones((64, 16), np.float32)}

    def product(x: str, name: str) -> str:
        own = shape_attributes(64, 16 if name == other else block, 4, 4, 48)
        for part, array in zip(("b", "s"), operands(own, (1, 1))[1:3], strict=True):
            weights[f"{name}.{part}"] = np.asarray(array)
        nodes.append(helper.make_node(OP, [x, f"{name}.b", f"{name}.s"], [name], name, domain=MICROSOFT, **own))
        return name

    skip = "SkipSimplifiedLayerNormalization"
    nodes.append(helper.make_node(skip, ["x", "skip", "gamma"], ["n", "", "", "t"], "norm", domain=MICROSOFT))
    product("n", "q"), product("n", "k")
    nodes.append(helper.make_node("MatMul", ["n", "w"], ["small"], "small"))
    nodes.append(helper.make_node("SimplifiedLayerNormalization", ["t", "gamma"], ["m"], "norm2"))
    product("m", "up"), product("m", "gate")
    nodes += [
        helper.make_node("Sigmoid", ["gate"], ["s"], "sigmoid"),
        helper.make_node("Mul", ["gate", "s"], ["silu"], "silu"),
        helper.make_node("Mul", ["silu", "up"], ["y"], "last"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, rows, 64]) for name in ("x", "skip")]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("q", "k", "small", "y")]
    lists = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    imports = [helper.make_opsetid(*pair) for pair in VERSIONS.items()]
    model = helper.make_model(helper.make_graph(nodes, "g", values, results, lists), opset_imports=imports)
    return SpecializedGraph(model, infer_types(model))


def joined(source: SpecializedGraph, target: Target = GPU) -> list[onnx.NodeProto]:
    before = source.proto.SerializeToString()
    between = join_packed_products(source, VERSIONS, target, LoweringOptions())
    found = join_norms(between, VERSIONS, target, LoweringOptions()).proto.graph
    assert source.proto.SerializeToString() == before
    return list(found.node)


def test_two_kernels_of_a_norm_and_one_of_a_gated_pair() -> None:
    first, small, pair = joined(graph())
    assert (first.op_type, list(first.output)) == ("JoinedMatMulNBits", ["q", "k", "t"])
    assert list(first.input) == ["x", "gamma", "skip", "q.b", "q.s", "k.b", "k.s"]
    assert (small.op_type, list(small.input)) == ("NormedMatMul", ["x", "gamma", "skip", "w"])
    assert (pair.op_type, list(pair.input)) == ("JoinedMatMulNBits", ["t", "gamma", "gate.b", "gate.s", "up.b", "up.s"])
    assert list(pair.output) == ["y"]


def test_products_that_are_not_alike_stay_apart() -> None:
    kinds = Counter(node.op_type for node in joined(graph(other="gate")))
    assert kinds == {"JoinedMatMulNBits": 3, "NormedMatMul": 1, "Sigmoid": 1, "Mul": 2}  # two of them of one product


@pytest.mark.parametrize(
    ("rows", "target"), [(2, GPU), (1, Target("cpu", vector_bits=256)), (1, Target("vulkan", is_gpu=True))], ids=str
)
def test_norms_stay_where_no_kernel_adds_up_squares(rows: int, target: Target) -> None:
    kinds = Counter(node.op_type for node in joined(graph(rows), target))
    assert kinds["SkipSimplifiedLayerNormalization"] == kinds["SimplifiedLayerNormalization"] == 1
    assert kinds["JoinedMatMulNBits"] == (2 if rows == 1 and target.is_gpu else 0)
