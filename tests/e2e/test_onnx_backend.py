"""ONNX's own node tests of the two operators, through ONNX's backend interface, on the CPU and on Vulkan."""

from __future__ import annotations

from typing import Any

import onnx
import onnx.backend.test.case.node.causal_conv_with_state
import onnx.backend.test.case.node.linear_attention  # makes its cases; a loader of all operators' takes seven seconds
import pytest
from linattn.frontend.lower.onnx_backend import LinattnBackend
from onnx.backend.test.case.node import _NodeTestCases
from onnx.backend.test.runner import Runner

CASES = {
    case.name: case
    for case in _NodeTestCases
    if case.name.startswith(("test_linear_attention_", "test_causal_conv_with_state_"))
}
# Those that end in _expanded have ONNX's own function bodies in place of the operators: a Scan, or plain operators.


def check(name: str, device: str) -> None:
    case = CASES[name]
    prepared = LinattnBackend.prepare(case.model, device)
    for inputs, expected in case.data_sets:
        outputs = prepared.run([_array(i) for i in inputs])
        Runner.assert_similar_outputs([_array(e) for e in expected], outputs, case.rtol, case.atol)


def _array(value: Any) -> Any:
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def test_all_cases_are_there() -> None:
    assert len([n for n in CASES if n.startswith("test_linear_attention_")]) == 28
    assert len(CASES) == 54


@pytest.mark.parametrize("name", sorted(CASES))
def test_cpu(name: str) -> None:
    check(name, "CPU")


@pytest.mark.vulkan
@pytest.mark.parametrize("name", [n for n in sorted(CASES) if not n.endswith("_expanded")])
def test_vulkan(name: str) -> None:
    check(name, "VULKAN")
