"""ONNX's own node tests of the two operators, through ONNX's backend interface, on the CPU and on Vulkan."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
from linattn.frontend.lower.onnx_backend import LinattnBackend
from linattn.runtime.errors import UnsupportedModelError
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import Runner

CASES = {
    case.name: case
    for case in load_model_tests(kind="node")
    if case.name.startswith(("test_linear_attention_", "test_causal_conv_with_state_"))
}
# The expanded convolutions exercise the plain ops around the operator; the expanded attentions are a Scan each.
SCANS = sorted(n for n in CASES if n.startswith("test_linear_attention_") and n.endswith("_expanded"))
RUN = sorted(set(CASES) - set(SCANS))


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
    assert len(RUN) == 40


@pytest.mark.parametrize("name", RUN)
def test_cpu(name: str) -> None:
    check(name, "CPU")


@pytest.mark.vulkan
@pytest.mark.parametrize("name", [n for n in RUN if not n.endswith("_expanded")])
def test_vulkan(name: str) -> None:
    check(name, "VULKAN")


def test_a_scan_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Scan.* is not supported"):
        LinattnBackend.prepare(CASES[SCANS[0]].model)
