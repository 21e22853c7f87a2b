"""Slices whose ends are given at run time, or lie far out: what ONNX Runtime gives, in both directions."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linattn.frontend import CompileOptions, compile_model
from linattn.runtime import Program
from linattn.runtime.errors import UnsupportedModelError
from onnx import TensorProto, helper

X = np.arange(15, dtype=np.float32).reshape(3, 5)
ENDS = st.sampled_from([0, 1, 2, 3, -1, -2, -4, 100, -100, 10**9, -(10**9), (1 << 62), -(1 << 62)])
LARGEST, LEAST = (1 << 63) - 1, -(1 << 63)


def model(rows: int | str, steps: list[int], ends: tuple[list[int], list[int]] | None = None) -> onnx.ModelProto:
    """Axis 0 forwards and backwards; ``ends``: constant starts and stops of all axes."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, 5])]
    constants = [helper.make_tensor("steps", TensorProto.INT64, [len(steps)], steps)]
    for i, name in enumerate(("start", "stop")):
        if ends is None:
            inputs.append(helper.make_tensor_value_info(name, TensorProto.INT64, [len(steps)]))
        else:
            constants.append(helper.make_tensor(name, TensorProto.INT64, [len(steps)], ends[i]))
    constants.append(helper.make_tensor("axes", TensorProto.INT64, [len(steps)], list(range(len(steps)))))
    node = helper.make_node("Slice", ["x", "start", "stop", "axes", "steps"], ["y"])
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "m"])
    graph = helper.make_graph([node], "slices", inputs, [output], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


@cache
def sessions(step: int) -> tuple[Program, onnxruntime.InferenceSession]:
    proto = model(3, [step])
    reference = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return Program.load(compile_model(proto, CompileOptions()).module), reference


@settings(max_examples=80, deadline=None)
@given(st.sampled_from([1, 2, -1, -2]), ENDS, ENDS)
def test_ends_at_run_time(step: int, start: int, stop: int) -> None:
    program, reference = sessions(step)
    feeds = {"x": X, "start": np.array([start]), "stop": np.array([stop])}
    np.testing.assert_array_equal(program.run(feeds)["y"], reference.run(None, feeds)[0])


@pytest.mark.parametrize("target", ["cpu", pytest.param("vulkan", marks=pytest.mark.vulkan)])
@pytest.mark.parametrize(
    ("rows", "steps", "starts", "stops"),
    [
        (3, [-1, -1], [LARGEST, -1], [LEAST, LEAST]),
        ("rows", [-1, -1], [LARGEST, -1], [LEAST, LEAST]),
        (3, [1, -2], [0, LARGEST], [LARGEST, LEAST]),
    ],
)
def test_turned_round(target: str, rows: int | str, steps: list[int], starts: list[int], stops: list[int]) -> None:
    proto = model(rows, steps, (starts, stops))
    got = Program.load(compile_model(proto, CompileOptions(target=target)).module).run({"x": X})["y"]
    np.testing.assert_array_equal(got, X[:: steps[0], :: steps[1]])


def test_what_only_a_run_can_tell_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="runs backwards over an open size; bind the size with --dim"):
        compile_model(model("rows", [-1]))
    proto = model(3, [1])
    del proto.graph.initializer[0]
    proto.graph.input.append(helper.make_tensor_value_info("steps", TensorProto.INT64, [1]))
    with pytest.raises(UnsupportedModelError, match="computed steps and axes are not supported"):
        compile_model(proto)
