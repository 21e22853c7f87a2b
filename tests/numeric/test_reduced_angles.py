"""Sines, cosines and tangents of large angles against float64: models that turn by position take sines of positions."""

from __future__ import annotations

from functools import cache

import ml_dtypes
import numpy as np
import onnx
import pytest
from linattn.frontend import CompileOptions, compile_model
from linattn.runtime import Program
from onnx import helper
from tolerances import BENIGN, error

FUNCTIONS = {"Sin": np.sin, "Cos": np.cos, "Tan": np.tan}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SIZE = 4096
LAST = {"float32": 400_000, "float16": 60_000, "bfloat16": 400_000}


@cache
def program(target: str) -> Program:
    """Each function of each type, all given as f32 and cast."""
    nodes: list[onnx.NodeProto] = []
    for name, dtype in DTYPES.items():
        element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        nodes.append(helper.make_node("Cast", [f"x.{name}"], [f"angle.{name}"], to=element))
        for op in FUNCTIONS:
            nodes.append(helper.make_node(op, [f"angle.{name}"], [f"{op} of {name}"]))
            nodes.append(helper.make_node("Cast", [f"{op} of {name}"], [f"{op}.{name}"], to=onnx.TensorProto.FLOAT))
    inputs = [helper.make_tensor_value_info(f"x.{n}", onnx.TensorProto.FLOAT, [SIZE]) for n in DTYPES]
    results = [f"{op}.{n}" for n in DTYPES for op in FUNCTIONS]
    outputs = [helper.make_tensor_value_info(result, onnx.TensorProto.FLOAT, [SIZE]) for result in results]
    graph = helper.make_graph(nodes, "angles", inputs, outputs)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return Program.load(compile_model(proto, CompileOptions(target=target)).module)


@pytest.mark.parametrize("target", ["cpu", pytest.param("vulkan", marks=pytest.mark.vulkan)])
def test_angles_of_any_size(target: str) -> None:
    rng = np.random.default_rng(0)
    angles: dict[str, np.ndarray] = {}
    for name, dtype in DTYPES.items():
        near, far = rng.uniform(-4, 4, SIZE // 2), rng.uniform(-LAST[name], LAST[name], SIZE // 2)
        angles[name] = np.concatenate([near, far]).astype(dtype)
    got = program(target).run({f"x.{name}": x.astype(np.float32) for name, x in angles.items()})
    for name, x in angles.items():
        for op, function in FUNCTIONS.items():
            want = function(x.astype(np.float64))
            found = got[f"{op}.{name}"].astype(np.float64)
            if op == "Tan":  # by the angle that it is of: it grows beyond all bounds
                found, want = np.arctan(found), np.arctan(want)
                assert np.abs((found - want + np.pi / 2) % np.pi - np.pi / 2).max() <= BENIGN[name], (op, name)
            else:
                assert error(found, want) <= BENIGN[name], (op, name)


def test_no_angles() -> None:
    """What is not finite has no sine."""
    x = np.full(SIZE, np.inf, np.float32)
    x[1], x[2] = -np.inf, np.nan
    got = program("cpu").run({f"x.{name}": x for name in DTYPES})
    assert all(np.isnan(value).all() for value in got.values())
