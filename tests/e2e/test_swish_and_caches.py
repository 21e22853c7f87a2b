"""Operators of opset 24 in whole models: Swish, and a cache of fixed size that TensorScatter writes into."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from linattn.frontend import CompileOptions
from linattn.frontend.compile import compile_model
from linattn.runtime import Program
from onnx import TensorProto, helper
from tolerances import BENIGN, error

WIDTH = 16


def swish(dtype: Any, alpha: float) -> onnx.ModelProto:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    node = helper.make_node("Swish", ["x"], ["y"], "swish", **({} if alpha == 1.0 else {"alpha": alpha}))
    x, y = (helper.make_tensor_value_info(name, kind, [1, 3, WIDTH]) for name in ("x", "y"))
    graph = helper.make_graph([node], "g", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


@pytest.mark.parametrize(
    ("dtype", "alpha"), [(np.float32, 1.0), (np.float32, 1.7), (np.float16, 1.7), (ml_dtypes.bfloat16, 1.0)]
)
def test_swish(dtype: Any, alpha: float) -> None:
    x = (3 * np.random.default_rng(0).standard_normal((1, 3, WIDTH))).astype(dtype)
    got = Program.load(compile_model(swish(dtype, alpha)).module).run({"x": x})["y"]
    runtime = onnxruntime.InferenceSession(swish(np.float32, alpha).SerializeToString())
    (want,) = runtime.run(None, {"x": x.astype(np.float32)})
    assert error(got.astype(np.float32), want) < BENIGN[np.dtype(dtype).name]


def static_cache() -> onnx.ModelProto:
    """As mobius writes a static cache: [B, rows, width], scattered at write indices that the caller gives."""
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node(
            "TensorScatter", ["key_cache.0", "inputs_embeds", "at"], ["updated_key_cache.0"], "scatter", axis=1
        ),
        helper.make_node("MatMul", ["inputs_embeds", "w"], ["y"], "product"),
    ]
    cache, tokens = ["batch", 8, WIDTH], ["batch", "seq", WIDTH]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            value("inputs_embeds", TensorProto.FLOAT, tokens),
            value("at", TensorProto.INT64, ["batch"]),
            value("key_cache.0", TensorProto.FLOAT, cache),
        ],
        [
            value("y", TensorProto.FLOAT, tokens),
            value("updated_key_cache.0", TensorProto.FLOAT, cache),
        ],
        [helper.make_tensor("w", TensorProto.FLOAT, [WIDTH, WIDTH], np.ones(WIDTH * WIDTH, np.float32))],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def test_a_cache_that_is_scattered_into_is_a_state() -> None:
    compiled = compile_model(static_cache(), CompileOptions(prefill_blocks=(64, 4)))
    assert "prefill block 64 left out: longer than the context of 8" in compiled.report.notes
    program = Program.load(compiled.module)
    assert [state.name for state in program.states] == ["key_cache.0"]
    session, x = program.session(), np.random.default_rng(0).standard_normal((1, 5, WIDTH)).astype(np.float32)
    session.run({"inputs_embeds": x[:, :4], "at": np.array([0])})
    session.run({"inputs_embeds": x[:, 4:], "at": np.array([4])})
    cache = np.asarray(session.states["key_cache.0"])
    assert np.array_equal(cache[:, :5], x)
    assert not cache[:, 5:].any()
