"""ONNX's own node tests of the two operators, through ONNX's backend interface, on the CPU and on Vulkan."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.backend.test.case.node.causal_conv_with_state
import onnx.backend.test.case.node.linear_attention  # makes its cases; a loader of all operators' takes seven seconds
import onnx.compose
import pytest
from linattn.frontend.lower.onnx_backend import LinattnBackend
from onnx.backend.test.case.node import _NodeTestCases
from onnx.backend.test.runner import Runner

CASES = {
    case.name: case
    for case in _NodeTestCases
    if case.name.startswith(("test_linear_attention_", "test_causal_conv_with_state_"))
}
NAMES = sorted(CASES)
OPERATORS = [name for name in NAMES if not name.endswith("_expanded")]
# Those that end in _expanded have ONNX's own function bodies in place of the operators: a Scan, or plain operators.


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> dict[str, tuple[np.ndarray, ...]]:
    """What each case gives on a device: one model of all of them side by side, which is compiled and run once."""
    device, names = request.param
    graph, feeds = onnx.GraphProto(name="cases"), dict[str, np.ndarray]()
    for index, name in enumerate(names):
        case = onnx.compose.add_prefix(CASES[name].model, f"{index}/").graph
        for field in ("node", "initializer", "input", "output", "value_info"):
            getattr(graph, field).extend(getattr(case, field))
        ((inputs, _),) = CASES[name].data_sets
        feeds |= {value.name: _array(array) for value, array in zip(case.input, inputs, strict=True)}
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 27)], ir_version=13)
    prepared = LinattnBackend.prepare(model, device, no_states=tuple(feeds))
    found = zip((value.name for value in graph.output), prepared.run(feeds), strict=True)
    grouped = {name: list[np.ndarray]() for name in names}
    for output, array in found:
        grouped[names[int(output.partition("/")[0])]].append(array)
    return {name: tuple(arrays) for name, arrays in grouped.items()}


def check(name: str, outputs: tuple[np.ndarray, ...]) -> None:
    case = CASES[name]
    ((_, expected),) = case.data_sets
    Runner.assert_similar_outputs([_array(e) for e in expected], outputs, case.rtol, case.atol)


def _array(value: Any) -> Any:
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def test_all_cases_are_there() -> None:
    assert len([n for n in CASES if n.startswith("test_linear_attention_")]) == 28
    assert len(CASES) == 54


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("results", [("CPU", NAMES)], ids=[""], indirect=True)
def test_cpu(name: str, results: dict[str, tuple[np.ndarray, ...]]) -> None:
    check(name, results[name])


@pytest.mark.vulkan
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("results", [("VULKAN", OPERATORS)], ids=[""], indirect=True)
def test_vulkan(name: str, results: dict[str, tuple[np.ndarray, ...]]) -> None:
    check(name, results[name])


def test_a_case_alone() -> None:
    """Its inputs in their order, as ONNX's runner gives them."""
    name = "test_linear_attention_gated_delta"
    ((inputs, _),) = CASES[name].data_sets
    prepared = LinattnBackend.prepare(CASES[name].model, "CPU")
    check(name, prepared.run([_array(array) for array in inputs]))
