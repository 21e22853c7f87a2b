"""Values that depend on the number of tokens are folded for each entry point, and weights are told apart by content."""

from __future__ import annotations

from pathlib import Path

import iree.runtime as rt
import numpy as np
import onnx
import onnxruntime
import pytest
from linattn.frontend import CompileOptions, compile_model
from linattn.runtime import Program
from onnx import TensorProto, helper, numpy_helper
from tolerances import BENIGN, error

HEADS, SIZE = 16, 16
WIDTH = HEADS * SIZE


def model(twins: bool = False) -> onnx.ModelProto:
    """y = attention of x + T (a row of `WIDTH` elements, folded), times a weight that may be there twice."""
    weight = np.random.default_rng(1).standard_normal((WIDTH, WIDTH)).astype(np.float32) / 16
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("Shape", ["x"], ["t"], "shape", start=1, end=2),
        helper.make_node("Cast", ["t"], ["tf"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Expand", ["tf", "row"], ["tokens"], "expand"),
        helper.make_node("Add", ["x", "tokens"], ["xx"], "add"),
        helper.make_node(
            "LinearAttention", ["xx", "xx", "xx", "past.0.recurrent"], ["z", "present.0.recurrent"], "attention",
            domain="com.microsoft", q_num_heads=HEADS, kv_num_heads=HEADS, update_rule="linear", scale=1 / 4,
        ),
        helper.make_node("MatMul", ["z", "w"], ["zw"], "first"),
        helper.make_node("MatMul", ["zw", "twin" if twins else "w"], ["y"], "second"),
    ]  # fmt: skip
    state, tokens = ["batch", HEADS, SIZE, SIZE], ["batch", "seq", WIDTH]
    weights = [numpy_helper.from_array(weight, name) for name in (("w", "twin") if twins else ("w",))]
    graph = helper.make_graph(
        nodes,
        "folded",
        [value("x", TensorProto.FLOAT, tokens), value("past.0.recurrent", TensorProto.FLOAT, state)],
        [value("y", TensorProto.FLOAT, tokens), value("present.0.recurrent", TensorProto.FLOAT, state)],
        [*weights, numpy_helper.from_array(np.array([1, 1, WIDTH], np.int64), "row")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize("blocks", [(64, 8), None], ids=["blocks", "open"])
def test_each_entry_point_has_its_own_values(blocks: tuple[int, ...] | None) -> None:
    proto = model()
    peer = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    program = Program.load(compile_model(proto, CompileOptions(prefill_blocks=blocks)).module)
    for tokens in (1, 8, 64):
        feeds = {
            "x": np.random.default_rng(tokens).standard_normal((1, tokens, WIDTH)).astype(np.float32),
            "past.0.recurrent": np.zeros((1, HEADS, SIZE, SIZE), np.float32),
        }
        found = program.run(feeds)
        for name, want in zip(("y", "present.0.recurrent"), peer.run(None, feeds), strict=True):
            assert error(found[name], want) < BENIGN["float32"], (tokens, name)


def test_equal_weights_are_stored_once_under_their_hash(tmp_path: Path) -> None:
    keys = []
    for twins in (False, True):
        parameters = tmp_path / f"{twins}.irpa"
        compile_model(model(twins), CompileOptions(prefill_blocks=(8,), parameters=parameters))
        index = rt.ParameterIndex()
        index.load(str(parameters))
        keys.append(sorted(key for key, _ in index.items()))
    assert keys[0] == keys[1]  # two names of one array are one array
    assert all(len(key) == 64 for key in keys[0])
