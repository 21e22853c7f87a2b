"""Damaged models whose conversion once never ended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def test_a_conversion_that_would_never_end(tmp_path: Path) -> None:
    """An output whose declared shape the node does not make: IREE's passes end only where each is verified."""
    float32, tensor = TensorProto.FLOAT, helper.make_tensor_value_info
    nodes = [
        helper.make_node("CausalConvWithState", ["x", "w", "", "past.0.conv"], ["c", "present.0.conv"], "conv",
                         domain="com.microsoft", ndim=1, activation="none"),
        helper.make_node("Transpose", ["c"], ["y"], "turned"),  # reversed, where [0, 2, 1] is declared
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "g",
        [tensor("x", float32, ["batch", 64, "seq"]), tensor("past.0.conv", float32, ["batch", 64, 2])],
        [tensor("y", float32, ["batch", "seq", 64]), tensor("present.0.conv", float32, ["batch", 64, 2])],
        [numpy_helper.from_array(np.ones((64, 1, 3), np.float32), "w")],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "model.onnx")
    for blocks in ("4", "open"):
        command = [sys.executable, "-m", "linattn.frontend.cli", "model.onnx", "--prefill-blocks", blocks, "--quiet"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "turned" in done.stderr
