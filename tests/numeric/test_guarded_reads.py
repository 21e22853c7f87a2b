"""Indices that a model computes never leave their tables: past an end they are the end; legal ones mean what ONNX says.

Every index is a product of two inputs, which no analysis bounds: the runtime cannot refuse it, the kernels clamp it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linattn.frontend import CompileOptions, compile_model
from linattn.runtime import Program
from onnx import TensorProto, helper

TARGETS = ["cpu", pytest.param("vulkan", marks=pytest.mark.vulkan)]
DATA = np.arange(30, dtype=np.float32).reshape(2, 3, 5)
FAR = [7, -8, 10**6, 10**9, -(10**9), 5 * 10**9, 1 << 40, (1 << 62) - 1, -(1 << 62)]


def along(axis: int) -> Callable[[np.ndarray], np.ndarray]:
    """The nearest legal indices of an axis."""
    size = DATA.shape[axis]

    def nearest(indices: np.ndarray) -> np.ndarray:
        return np.clip(np.where(indices < 0, indices + size, indices), 0, size - 1)

    return nearest


def flattened(indices: np.ndarray) -> np.ndarray:
    """The nearest legal index tuples [..., depth], in the order of the memory; sums wrap around at 64 bits."""
    sizes = DATA.shape[: indices.shape[-1]]
    flat = np.zeros(indices.shape[:-1], np.int64)
    for axis, size in enumerate(sizes):
        column = indices[..., axis]
        flat = flat * size + np.where(column < 0, column + size, column)
    places = np.clip(flat, 0, np.prod(sizes) - 1)
    return np.stack(np.unravel_index(places, sizes), -1)


@dataclass(frozen=True)
class Case:
    """One operator with its index, and what an illegal index becomes."""

    op_type: str
    shape: tuple[int, ...]
    nearest: Callable[[np.ndarray], np.ndarray]
    attributes: dict[str, Any] = field(default_factory=dict)
    updates: tuple[int, ...] | None = None
    dtype: type = np.int64

    @property
    def sizes(self) -> tuple[int, ...]:
        """Legal indices of each column are below these."""
        if self.op_type.endswith("ND"):
            return DATA.shape[: self.shape[-1]]
        return (DATA.shape[self.attributes.get("axis", 0)],)


CASES = {
    "gather": Case("Gather", (4,), along(1), {"axis": 1}),
    "gather_rows": Case("Gather", (2, 2), along(0)),
    "gather_one": Case("Gather", (), along(2), {"axis": -1}),
    "gather_i32": Case("Gather", (4,), along(2), {"axis": 2}, dtype=np.int32),
    "gather_elements": Case("GatherElements", (2, 3, 4), along(2), {"axis": 2}),
    "gather_elements_i32": Case("GatherElements", (2, 2, 5), along(1), {"axis": 1}, dtype=np.int32),
    "gather_nd": Case("GatherND", (4, 3), flattened),
    "gather_nd_rows": Case("GatherND", (4, 1), flattened),
    "gather_nd_pairs": Case("GatherND", (2, 2, 2), flattened),
    "scatter_elements": Case("ScatterElements", (2, 3, 2), along(2), {"axis": 2}, (2, 3, 2)),
    "scatter_elements_add": Case("ScatterElements", (2, 2, 5), along(1), {"axis": 1, "reduction": "add"}, (2, 2, 5)),
    "scatter_nd": Case("ScatterND", (4, 3), flattened, {}, (4,)),
    "scatter_nd_rows": Case("ScatterND", (2, 1), flattened, {}, (2, 3, 5)),
    "scatter_nd_add": Case("ScatterND", (3, 2), flattened, {"reduction": "add"}, (3, 5)),
}


@cache
def model() -> onnx.ModelProto:
    """All cases side by side."""
    nodes = [helper.make_node("Cast", ["factor"], ["factor_i32"], to=TensorProto.INT32)]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, DATA.shape)]
    inputs.append(helper.make_tensor_value_info("factor", TensorProto.INT64, []))
    constants: list[onnx.TensorProto] = []
    for name, case in CASES.items():
        dtype = helper.np_dtype_to_tensor_dtype(np.dtype(case.dtype))
        inputs.append(helper.make_tensor_value_info(f"given.{name}", dtype, case.shape))
        factor = "factor" if case.dtype is np.int64 else "factor_i32"
        nodes.append(helper.make_node("Mul", [f"given.{name}", factor], [f"{name}.index"]))
        operands = ["x", f"{name}.index"]
        if case.updates is not None:
            operands.append(f"{name}.updates")
            constants.append(onnx.numpy_helper.from_array(np.full(case.updates, -1, np.float32), operands[-1]))
        nodes.append(helper.make_node(case.op_type, operands, [name], name=name, **case.attributes))
    outputs = [helper.make_empty_tensor_value_info(name) for name in CASES]
    graph = helper.make_graph(nodes, "lookups", inputs, outputs, constants)
    found = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return onnx.shape_inference.infer_shapes(found)


@cache
def program(target: str) -> Program:
    return Program.load(compile_model(model(), CompileOptions(target=target)).module)


@cache
def reference() -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model().SerializeToString(), providers=["CPUExecutionProvider"])


def check(target: str, indices: dict[str, np.ndarray]) -> None:
    """Compares with ONNX Runtime, which gets the nearest legal indices."""
    feeds = {"x": DATA, "factor": np.array(1), **{f"given.{name}": array for name, array in indices.items()}}
    got = program(target).run(feeds)
    for name, case in CASES.items():
        nearest = np.asarray(case.nearest(indices[name].astype(np.int64)), case.dtype)
        feeds[f"given.{name}"] = nearest.reshape(case.shape)
    want = reference().run(list(CASES), feeds)
    for name, array in zip(CASES, want, strict=True):
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def filled(value: int) -> dict[str, np.ndarray]:
    limits = {np.int32: (1 << 31) - 1, np.int64: (1 << 63) - 1}
    return {
        name: np.full(case.shape, np.clip(value, -limits[case.dtype], limits[case.dtype]), case.dtype)
        for name, case in CASES.items()
    }


def test_no_bounds_are_known() -> None:
    assert all(spec.bounds is None for spec in program("cpu").inputs)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("value", FAR)
def test_far_outside(target: str, value: int) -> None:
    check(target, filled(value))


@st.composite
def legal(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """Indices -n..n-1 of each table."""
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    return {
        name: np.stack([rng.integers(-n, n, case.shape[:-1] or case.shape) for n in case.sizes], -1)
        .reshape(case.shape)
        .astype(case.dtype)
        if case.op_type.endswith("ND")
        else rng.integers(-case.sizes[0], case.sizes[0], case.shape).astype(case.dtype)
        for name, case in CASES.items()
    }


@st.composite
def anything(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """Legal indices with some that are not among them."""
    found = {name: array.copy() for name, array in draw(legal()).items()}
    for name, array in found.items():
        far = draw(st.lists(st.tuples(st.integers(0, array.size - 1), st.sampled_from(FAR)), max_size=3))
        for place, value in far:
            array.reshape(-1)[place] = np.clip(value, np.iinfo(array.dtype).min, np.iinfo(array.dtype).max)
        found[name] = array
    return found


@settings(max_examples=60, deadline=None)
@given(legal() | anything())
def test_any_index_on_the_cpu(indices: dict[str, np.ndarray]) -> None:
    check("cpu", indices)


@pytest.mark.vulkan
@settings(max_examples=15, deadline=None)
@given(legal() | anything())
def test_any_index_on_vulkan(indices: dict[str, np.ndarray]) -> None:
    check("vulkan", indices)


@cache
def open_model(target: str) -> Program:
    """A table of any number of rows, and columns where a search found something, multiplied."""
    nodes = [
        helper.make_node("Mul", ["i", "factor"], ["far"]),
        helper.make_node("Gather", ["x", "far"], ["rows"]),
        helper.make_node("ArgMax", ["x"], ["best"], axis=1, keepdims=0),
        helper.make_node("Mul", ["best", "factor"], ["index"]),
        helper.make_node("Gather", ["x", "index"], ["found"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "open",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 5]),
            helper.make_tensor_value_info("i", TensorProto.INT64, [4]),
            helper.make_tensor_value_info("factor", TensorProto.INT64, []),
        ],
        [
            helper.make_tensor_value_info("rows", TensorProto.FLOAT, [4, 5]),
            helper.make_tensor_value_info("found", TensorProto.FLOAT, ["n", "n"]),
        ],
    )
    found = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return Program.load(compile_model(found, CompileOptions(target=target)).module)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rows", [1, 7])
def test_tables_of_open_size(target: str, rows: int) -> None:
    x = np.random.default_rng(rows).standard_normal((rows, 5)).astype(np.float32)
    for factor in (1, 3, -3, 10**9, -(10**9)):
        index = np.array([0, 1, -1, 2])
        got = open_model(target).run({"x": x, "i": index, "factor": np.array(factor)})
        far, best = index * factor, x.argmax(1) * factor
        far = np.clip(np.where(far < 0, far + rows, far), 0, rows - 1)
        best = np.clip(np.where(best < 0, best + 5, best), 0, 4)
        np.testing.assert_array_equal(got["rows"], x[far])
        np.testing.assert_array_equal(got["found"], x[:, best])


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([0, 1, 2, -1, -2, *FAR]), st.sampled_from([3, 1, -1, *FAR]))
def test_parts_that_start_anywhere(start: int, stop: int) -> None:
    """Slices are cut to what is there, as ONNX has it."""
    got = slices().run({"x": DATA[0], "start": np.array([start]), "stop": np.array([stop])})
    np.testing.assert_array_equal(got["y"], DATA[0][start:stop])


@cache
def slices() -> Program:
    node = helper.make_node("Slice", ["x", "start", "stop"], ["y"])
    graph = helper.make_graph(
        [node],
        "slices",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 5]),
            helper.make_tensor_value_info("start", TensorProto.INT64, [1]),
            helper.make_tensor_value_info("stop", TensorProto.INT64, [1]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
    )
    found = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return Program.load(compile_model(found, CompileOptions()).module)
