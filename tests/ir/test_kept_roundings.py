"""Sums in SPIR-V that are there for their rounding say that no driver may join them with what they are the sums of."""

from __future__ import annotations

import shutil
import struct

import numpy as np
import onnx
import pytest
import spirv
from linattn.frontend.compile import CompileOptions, compile_model
from linattn.runtime import Program
from onnx import TensorProto, helper
from tolerances import BENIGN

_HEADER = 5
_CONSTANT, _SUM, _DIFFERENCE, _PRODUCT, _QUOTIENT = 43, 129, 131, 133, 136
_DECORATE, _NO_CONTRACTION = 71, 42
_MAGIC = 0x4B400000  # 1.5 * 2^23
_ONE = 0x3F800000
_WORD = 8


Instruction = tuple[int, ...]


def instructions(code: bytes) -> list[tuple[int, Instruction]]:
    words, found, at = struct.unpack(f"<{len(code) // 4}I", code), list[tuple[int, Instruction]](), _HEADER
    while at < len(words):
        length = words[at] >> 16
        found.append((words[at] & 0xFFFF, words[at + 1 : at + length]))
        at += length
    return found


def decorated(code: bytes) -> set[int]:
    return {words[0] for op, words in instructions(code) if op == _DECORATE and words[1] == _NO_CONTRACTION}


def numbers(code: bytes) -> dict[int, int]:
    """The bits of each constant of a word."""
    return {words[1]: words[2] for op, words in instructions(code) if op == _CONSTANT and len(words) == 3}


def whole_numbers(code: bytes) -> list[tuple[bool, bool]]:
    """Of each sum that rounds to one: whether it is decorated, and whether its product is."""
    kept, known = decorated(code), numbers(code)
    products = {words[1] for op, words in instructions(code) if op == _PRODUCT}
    sums = [words[1:] for op, words in instructions(code) if op == _SUM and _MAGIC in map(known.get, words[2:])]
    return [(place in kept, (set(terms) & products) <= kept) for place, *terms in sums]


def product(rows: int) -> onnx.ModelProto:
    """Of rounded rows with packed weights."""
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
def test_rounding_to_whole_numbers(rows: int, device: str | None) -> None:
    module = compile_model(product(rows), CompileOptions(target="vulkan", gpu_target=device)).module
    found = [one for code in spirv.codes(module) for one in whole_numbers(code)]
    assert len(found) >= _WORD, "a thread rounds a word of A or more"
    assert set(found) == {(True, True)}
    if shutil.which("spirv-val"):
        assert spirv.faults(module) == []


def softplus(size: int) -> bytes:
    return elementwise("Softplus", ["x"], size)


def elementwise(op: str, names: list[str], size: int) -> bytes:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [size]) for name in (*names, "y")]
    graph = helper.make_graph([helper.make_node(op, names, ["y"])], "g", values[:-1], values[-1:])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return compile_model(proto, CompileOptions(target="vulkan")).module


@pytest.mark.parametrize("size", [64, 65_536])
def test_what_corrects_a_quotient(size: int) -> None:
    (code,) = spirv.codes(elementwise("Div", ["a", "b"], size))
    found = instructions(code)
    quotients = {words[1] for op, words in found if op == _QUOTIENT}
    sums = [words[1:] for op, words in found if op == _SUM and set(words[2:]) & quotients]
    assert len(quotients) == 2 * len(sums) > 0
    assert {place for words in sums for place in words} <= decorated(code)


def test_what_a_sum_has_rounded_off() -> None:
    """Softplus is log(1 + e^-|x|) + max(x, 0)."""
    (code,) = spirv.codes(softplus(64))
    ones = {place for place, bits in numbers(code).items() if bits == _ONE}
    found = instructions(code)
    first = {words[1] for op, words in found if op == _SUM and set(words[2:]) & ones}
    second = [words for op, words in found if op == _DIFFERENCE and words[2] in first and words[3] in ones]
    assert len(second) == 1
    assert {second[0][1], second[0][2]} <= decorated(code)


@pytest.mark.vulkan
@pytest.mark.parametrize("size", [64, 65_536])
def test_small_logarithms(size: int) -> None:
    """Of a gate of -17 and less nothing was left; by scalars and by vectors, as IREE cuts few and many numbers."""
    x = np.linspace(-30, 3, size, dtype=np.float32)
    y = Program.load(softplus(size)).run({"x": x})["y"].astype(np.float64)
    want = np.log1p(np.exp(x.astype(np.float64)))
    assert np.abs(y / want - 1).max() <= BENIGN["float32"]
