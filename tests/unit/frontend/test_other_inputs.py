"""Operators that ONNX does not define: empty names at the end of their inputs say nothing, other inputs are refused."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from linattn.frontend import CompileOptions
from linattn.frontend.compile import compile_model
from linattn.runtime import Program
from linattn.runtime.errors import UnsupportedModelError
from onnx import TensorProto, helper

X = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
SCALE = np.linspace(0.5, 2, 8, dtype=np.float32)


def model(op_type: str, domain: str, inputs: list[str]) -> onnx.ModelProto:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node(op_type, inputs, ["y"], "n", domain=domain, epsilon=1e-5)],
        "norm",
        [info("x", TensorProto.FLOAT, [2, 8]), info("s", TensorProto.FLOAT, [8])],
        [info("y", TensorProto.FLOAT, [2, 8])],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize("inputs", [["x", "s"], ["x", "s", ""], ["x", "s", "", ""]], ids=len)
def test_empty_names_at_the_end(inputs: list[str]) -> None:
    module = compile_model(model("SimplifiedLayerNormalization", "com.microsoft", inputs), CompileOptions()).module
    got = Program.load(module).run({"x": X, "s": SCALE})["y"]
    np.testing.assert_allclose(got, X / np.sqrt((X**2).mean(1, keepdims=True) + 1e-5) * SCALE, rtol=1e-5)


@pytest.mark.parametrize("op_type", ["SimplifiedLayerNormalization", "RMSNormalization"])
def test_other_inputs(op_type: str) -> None:
    domain = "" if op_type == "RMSNormalization" else "com.microsoft"
    with pytest.raises(UnsupportedModelError) as caught:
        compile_model(model(op_type, domain, ["x", "s", "x"]), CompileOptions())
    text = "node 'n' (com.microsoft.SimplifiedLayerNormalization): too many inputs, got 3, expected at most 2"
    assert str(caught.value) == text if domain else "RMSNormalization" in str(caught.value)
