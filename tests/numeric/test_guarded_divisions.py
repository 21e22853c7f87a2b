"""Integers divided by what an input says: zero and the overflow of -1 stopped the process with a signal."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import pytest
from linattn.frontend import CompileOptions, compile_model
from linattn.runtime import Program
from onnx import helper

DTYPES = (np.int64, np.int32)
DIVISORS = [0, -1, 1, 2, -3, 7]


@cache
def program(target: str) -> Program:
    nodes: list[onnx.NodeProto] = []
    inputs: list[onnx.ValueInfoProto] = []
    outputs: list[onnx.ValueInfoProto] = []
    for dtype in DTYPES:
        name, element = np.dtype(dtype).name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        inputs += [helper.make_tensor_value_info(f"{side}.{name}", element, [36]) for side in ("number", "by")]
        for op_type in ("Div", "Mod"):
            nodes.append(helper.make_node(op_type, [f"number.{name}", f"by.{name}"], [f"{op_type}.{name}"]))
            outputs.append(helper.make_tensor_value_info(f"{op_type}.{name}", element, [36]))
    graph = helper.make_graph(nodes, "divisions", inputs, outputs)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return Program.load(compile_model(proto, CompileOptions(target=target)).module)


@pytest.mark.parametrize("target", ["cpu", pytest.param("vulkan", marks=pytest.mark.vulkan)])
def test_every_pair(target: str) -> None:
    pairs: dict[str, list[tuple[int, int]]] = {}
    for dtype in DTYPES:
        limits = np.iinfo(dtype)
        numbers = [0, 1, -1, 13, int(limits.max), int(limits.min)]
        pairs[np.dtype(dtype).name] = [(number, by) for number in numbers for by in DIVISORS]
    feeds = {
        f"{side}.{name}": np.array([pair[i] for pair in rows], name)
        for name, rows in pairs.items()
        for i, side in enumerate(("number", "by"))
    }
    got = program(target).run(feeds)
    for name, rows in pairs.items():
        least = int(np.iinfo(name).min)
        safe = [(n, 1 if by == 0 or (n == least and by == -1) else by) for n, by in rows]
        quotients = [abs(n) // abs(by) * (1 if (n < 0) == (by < 0) else -1) for n, by in safe]
        assert got[f"Div.{name}"].tolist() == quotients
        # The least integer has no absolute value, by which SPIR-V code finds remainders.
        checked = [i for i, (n, _) in enumerate(rows) if target == "cpu" or n != least]
        assert got[f"Mod.{name}"][checked].tolist() == [safe[i][0] % safe[i][1] for i in checked]
