"""TopK on GPUs, where it is ranks: the elements and indices of ONNX Runtime, equal ones in order; read in part too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime
import pytest
from linattn.frontend import CompileOptions
from linattn.frontend.compile import compile_model
from linattn.runtime import Program
from onnx import helper, numpy_helper

TYPES = {"float32": onnx.TensorProto.FLOAT, "float16": onnx.TensorProto.FLOAT16}


def router(dtype: str, shape: Sequence[int], k: int, wanted: Sequence[str]) -> onnx.ModelProto:
    """TopK behind a product-like producer, its outputs behind names of their own."""
    info, kinds = helper.make_tensor_value_info, {"values": TYPES[dtype], "indices": onnx.TensorProto.INT64}
    graph = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y"]), helper.make_node("TopK", ["y", "k"], ["values", "indices"], axis=-1)],
        "router",
        [info("x", TYPES[dtype], list(shape))],
        [info(name, kinds[name], [*shape[:-1], k]) for name in wanted],
        [numpy_helper.from_array(np.array([k]), "k")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.vulkan
@pytest.mark.parametrize(
    ("dtype", "shape", "k", "wanted"),
    [
        ("float32", (64, 4), 2, ["indices"]),  # IREE's own sort does not compile here
        ("float32", (2, 3, 100), 8, ["values", "indices"]),
        ("float16", (1, 7), 7, ["values", "indices"]),
    ],
)
def test_as_onnx_runtime(dtype: str, shape: tuple[int, ...], k: int, wanted: list[str]) -> None:
    model = router(dtype, shape, k, wanted)
    x = np.random.default_rng(0).integers(-9, 9, shape).astype(dtype)  # many are equal
    x[..., 0] = np.inf
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(wanted, {"x": x})
    outputs = Program.load(compile_model(model, CompileOptions(target="vulkan")).module).run({"x": x})
    for name, want in zip(wanted, expected, strict=True):
        np.testing.assert_array_equal(outputs[name], want, name)
