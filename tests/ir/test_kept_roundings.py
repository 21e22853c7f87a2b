"""In SPIR-V what rounds to whole numbers, and the product that it rounds, may not become one multiply-add."""

from __future__ import annotations

import shutil
import struct

import numpy as np
import onnx
import pytest
import spirv
from linattn.frontend.compile import CompileOptions, compile_model
from onnx import TensorProto, helper

_HEADER = 5
_CONSTANT, _SUM, _PRODUCT, _DECORATE, _NO_CONTRACTION = 43, 129, 133, 71, 42
_MAGIC = 0x4B400000  # 1.5 * 2^23
_WORD = 8


def roundings(code: bytes) -> list[tuple[bool, bool]]:
    """Of each sum that rounds: whether it is decorated, and whether its product is."""
    words = struct.unpack(f"<{len(code) // 4}I", code)
    decorated, magic, products, sums = set[int](), set[int](), set[int](), list[tuple[int, ...]]()
    at = _HEADER
    while at < len(words):
        length, op, operands = words[at] >> 16, words[at] & 0xFFFF, words[at + 1 : at + (words[at] >> 16)]
        if op == _DECORATE and operands[1] == _NO_CONTRACTION:
            decorated.add(operands[0])
        elif op == _CONSTANT and operands[2:] == (_MAGIC,):
            magic.add(operands[1])
        elif op == _PRODUCT:
            products.add(operands[1])
        elif op == _SUM and set(operands[2:]) & magic:
            sums.append(operands[1:])
        at += length
    return [(place in decorated, (set(terms) & products) <= decorated) for place, *terms in sums]


def model(rows: int) -> onnx.ModelProto:
    """A product of rounded rows with packed weights."""
    names = {"x": [1, rows, 64], "y": [1, rows, 64]}
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in names.items()]
    weights = np.full((64, 2, 16), 0x97, np.uint8)
    tensors = [onnx.numpy_helper.from_array(weights, "w"), onnx.numpy_helper.from_array(np.ones((64, 2), "f4"), "s")]
    attributes = {"K": 64, "N": 64, "bits": 4, "block_size": 32, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **attributes)
    graph = helper.make_graph([node], "g", values[:1], values[1:], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize("device", [None, "hopper"])
@pytest.mark.parametrize("rows", [1, 40])
def test_all_are_decorated(rows: int, device: str | None) -> None:
    module = compile_model(model(rows), CompileOptions(target="vulkan", gpu_target=device)).module
    found = [one for code in spirv.codes(module) for one in roundings(code)]
    assert len(found) >= _WORD, "a thread rounds a word of A or more"
    assert set(found) == {(True, True)}
    if shutil.which("spirv-val"):
        assert spirv.faults(module) == []
