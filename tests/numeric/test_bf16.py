"""What IREE does not compile in bf16 by itself, on GPUs above all, against numpy in float64: one model of all of it."""

from __future__ import annotations

from functools import cache

import ml_dtypes
import numpy as np
import onnx
import pytest
from linattn.frontend import CompileOptions, compile_model
from linattn.runtime import Program
from onnx import TensorProto, helper, numpy_helper

from tests.tolerances import BENIGN, error

BF16 = np.dtype(ml_dtypes.bfloat16)
SIZE = 64  # round: IREE reads and writes such rows in vectors


def values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    narrow = {name: rng.standard_normal(shape).astype(BF16) for name, shape in (
        ("x", (4, SIZE)), ("q", (1, 4, 3, SIZE)), ("k", (1, 4, SIZE, 9)), ("many", (2, 600)), ("rows", (3, SIZE)),
    )}  # fmt: skip
    narrow["many"] = np.abs(narrow["many"]) + BF16.type(1)
    return {**narrow, "i": rng.integers(-300, 300, (4, SIZE)), "c": rng.random((4, SIZE)) < 0.5}


def model() -> onnx.ModelProto:
    """Conversions, constants in typed fields, reductions, a softmax along an open axis, activations by activations."""
    given = values()
    low = helper.make_tensor("low", TensorProto.BFLOAT16, [], [-2.0])  # not bytes: a field of 32-bit numbers
    axis = numpy_helper.from_array(np.array([1]), "axis")
    nodes = [
        helper.make_node("Cast", ["i"], ["from_integers"], to=TensorProto.BFLOAT16),
        helper.make_node("Cast", ["c"], ["from_booleans"], to=TensorProto.BFLOAT16),
        helper.make_node("Where", ["c", "x", "low"], ["chosen"]),
        helper.make_node("ReduceSum", ["many", "axis"], ["sum"]),
        helper.make_node("ReduceMax", ["x", "axis"], ["highest"]),
        helper.make_node("Softmax", ["rows"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["q", "k"], ["scores"]),
    ]
    graph = helper.make_graph(nodes, "bf16", [], [], [low, axis])
    for name, array in given.items():
        shape = ["B", "open"] if name == "rows" else array.shape
        element = helper.np_dtype_to_tensor_dtype(array.dtype)
        graph.input.append(helper.make_tensor_value_info(name, element, shape))
    shapes = {"sum": (2, 1), "highest": (4, 1), "weights": ("B", "open"), "scores": (1, 4, 3, 9)}
    for name in [node.output[0] for node in nodes]:
        shape = shapes.get(name, (4, SIZE))
        graph.output.append(helper.make_tensor_value_info(name, TensorProto.BFLOAT16, shape))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)


def expected() -> dict[str, np.ndarray]:
    x, q, k, many, rows = (values()[name].astype(np.float64) for name in ("x", "q", "k", "many", "rows"))
    weights = np.exp(rows - rows.max(-1, keepdims=True))
    return {
        "from_integers": values()["i"].astype(np.float64),
        "from_booleans": values()["c"].astype(np.float64),
        "chosen": np.where(values()["c"], x, -2.0),
        "sum": many.sum(-1, keepdims=True),
        "highest": x.max(-1, keepdims=True),
        "weights": weights / weights.sum(-1, keepdims=True),
        "scores": q @ k,
    }


@cache
def results(target: str) -> dict[str, np.ndarray]:
    options = CompileOptions(target=target, batch=None, max_context=None, prefill_blocks=None)
    return Program.load(compile_model(model(), options).module).run(values())


@pytest.mark.parametrize("name", list(expected()))
@pytest.mark.parametrize("target", ["cpu", pytest.param("vulkan", marks=pytest.mark.vulkan)])
def test_against_float64(target: str, name: str) -> None:
    found = results(target)[name]
    assert found.dtype == BF16
    assert error(found.astype(np.float64), expected()[name]) < BENIGN["bfloat16"]


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["vulkan:hopper", "vulkan:adreno", "cuda:sm_80"])
def test_compiles_for_gpus(gpu: str) -> None:
    target, _, name = gpu.partition(":")
    options = CompileOptions(target=target, gpu_target=name, batch=None, max_context=None, prefill_blocks=None)
    assert compile_model(model(), options).module
