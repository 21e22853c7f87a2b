"""Gelu in both forms against float64, on numbers of around 1: IREE's factor was 2e-4 off."""

from __future__ import annotations

from math import erf

import numpy as np
import pytest
from linattn.frontend import CompileOptions, compile_model
from linattn.runtime import Program
from onnx import TensorProto, helper
from tolerances import BENIGN, error

FORMS = {
    "none": lambda x: x * (1 + np.vectorize(erf)(x / np.sqrt(2))) / 2,
    "tanh": lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
}


@pytest.mark.parametrize("target", ["cpu", pytest.param("vulkan", marks=pytest.mark.vulkan)])
def test_both_forms(target: str) -> None:
    x = np.linspace(-2, 1.5, 1001, dtype=np.float32)
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name in ("x", *FORMS)}
    nodes = [helper.make_node("Gelu", ["x"], [form], approximate=form) for form in FORMS]
    graph = helper.make_graph(nodes, "gelu", [values.pop("x")], list(values.values()))
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    got = Program.load(compile_model(proto, CompileOptions(target=target)).module).run({"x": x})
    for form, function in FORMS.items():
        assert error(got[form], function(x.astype(np.float64))) <= BENIGN["float32"], form
