"""MatMulNBits against ONNX Runtime; its kernels for constant weights, which are the ones models get.

On the CPU strategy ``fused_simd`` is chosen wherever it can be; ``dequantised`` is forced in tests of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from comparing import DTYPES, MICROSOFT, assert_matches, normal
from harness import CPUS, FLAGS, TARGETS, compile_module, node_for, spec
from iree.compiler import ir
from iree.compiler.api import Session
from linattn.dialect_patterns.emit.builder import Builder
from linattn.dialect_patterns.mat_mul_n_bits import contract as mat_mul_n_bits
from linattn.dialect_patterns.op import LoweringContext, LoweringOptions
from linattn.dialect_patterns.rewrite import lower_operators
from linattn.runtime.errors import UnsupportedModelError

OP = "MatMulNBits"
N = 48


PORTABLE = LoweringOptions("dequantised")


def shape_attributes(depth: int, block: int, bits: int = 4, accuracy: int = 0, columns: int = N) -> dict[str, int]:
    return {"K": depth, "N": columns, "bits": bits, "block_size": block, "accuracy_level": accuracy}


def operands(
    attributes: dict[str, int],
    leading: tuple[int, ...],
    *,
    zeros: str = "",
    bias: bool = False,
    dtype: Any = np.float32,
) -> list[np.ndarray | None]:
    rng = np.random.default_rng(0)
    depth, columns, block, bits = (attributes[name] for name in ("K", "N", "block_size", "bits"))
    blocks = -(-depth // block)
    packed = rng.integers(0, 256, (columns, blocks, block * bits // 8)).astype(np.uint8)
    scales = (0.1 * normal(columns, blocks)).astype(dtype)
    zero_points = None
    if zeros == "packed":
        zero_points = rng.integers(0, 256, (columns, -(-blocks * bits // 8))).astype(np.uint8)
    elif zeros == "float":
        zero_points = ((1 << bits - 1) + normal(columns, blocks)).astype(dtype)
    inputs = [normal(*leading, depth, dtype=dtype), packed, scales, zero_points, None, normal(columns, dtype=dtype)]
    return inputs if bias else inputs[: 4 if zeros else 3]


def check(attributes: dict[str, int], inputs: list[np.ndarray | None], **run: Any) -> None:
    constants = [i for i in range(1, len(inputs)) if inputs[i] is not None]
    assert_matches(OP, inputs, attributes, domain=MICROSOFT, version=1, constants=constants, **run)


@pytest.mark.parametrize(("block", "tokens"), [(16, 1), (32, 5), (64, 1), (128, 5), (256, 1)])
def test_block_sizes(block: int, tokens: int):
    attributes = shape_attributes(256, block)
    check(attributes, operands(attributes, (1, tokens)))


@pytest.mark.parametrize(
    ("bits", "zeros", "tokens"),
    [(4, "packed", 1), (4, "float", 5), (8, "", 5), (8, "packed", 1), (2, "", 1), (2, "packed", 5)],
)
def test_bits_and_zero_points(bits: int, zeros: str, tokens: int):
    attributes = shape_attributes(96, 32, bits)  # three blocks: rows of packed zero points end inside a byte
    check(attributes, operands(attributes, (1, tokens), zeros=zeros))


@pytest.mark.parametrize(("bits", "tokens"), [(4, 1), (4, 5), (8, 5)])
def test_rounded_to_int8(bits: int, tokens: int):
    attributes = shape_attributes(128, 32, bits, accuracy=4)
    inputs = operands(attributes, (1, tokens), zeros="packed")
    inputs[0][0, 0, 32:64] = 0.0  # a block without a largest value
    check(attributes, inputs)


# 1 to 4 rows are multiplied as weights are unpacked, more with unpacked tiles for 66 rows; 3 blocks are less than are
# read at once, 37 two slabs; 300 columns are several workgroups with a partial tile.
@pytest.mark.parametrize("accuracy", [0, 4])
@pytest.mark.parametrize(
    ("bits", "block", "zeros", "depth", "columns", "tokens"),
    [
        (4, 32, "", 1184, 300, 70),
        (4, 32, "packed", 1184, 300, 2),
        (4, 16, "packed", 88, 41, 9),
        (4, 16, "float", 88, 41, 4),
        (4, 256, "packed", 900, 12, 1),
        (4, 128, "", 900, 12, 7),
        (8, 64, "packed", 328, 41, 1),
        (8, 32, "", 328, 41, 67),
        (2, 16, "packed", 328, 41, 1),
        (2, 64, "packed", 328, 41, 6),
    ],
)
def test_edges(bits: int, block: int, zeros: str, depth: int, columns: int, tokens: int, accuracy: int):
    attributes = shape_attributes(depth, block, bits, accuracy, columns)
    check(attributes, operands(attributes, (1, tokens), zeros=zeros, bias=tokens % 2 == 1))


@pytest.mark.parametrize(
    ("bits", "block", "zeros", "tokens", "accuracy"),
    [(4, 32, "packed", 5, 4), (4, 16, "", 1, 0), (8, 32, "", 1, 4), (2, 64, "packed", 6, 0)],
)
def test_portable_form(bits: int, block: int, zeros: str, tokens: int, accuracy: int):
    attributes = shape_attributes(72, block, bits, accuracy)
    check(attributes, operands(attributes, (1, tokens), zeros=zeros, bias=True), options=PORTABLE)


@pytest.mark.parametrize("target", CPUS)
@pytest.mark.parametrize(("tokens", "accuracy"), [(1, 4), (9, 4), (9, 0)])
def test_vectors_of_any_cpu(tokens: int, accuracy: int, target: str):
    """All widths, and all ways to multiply bytes."""
    if accuracy == 0 and "vnni" in target:
        return  # has no products of bytes
    attributes = shape_attributes(328, 32, 4, accuracy, columns=41)
    check(attributes, operands(attributes, (1, tokens), zeros="packed"), target=target)


def test_fewer_columns_than_a_vector():
    attributes = shape_attributes(64, 32, columns=3)
    check(attributes, operands(attributes, (1, 5)))


@pytest.mark.parametrize("tokens", [1, 3])
def test_depth_within_a_block_and_bias(tokens: int):
    attributes = shape_attributes(72, 32)
    check(attributes, operands(attributes, (1, tokens), bias=True))


@pytest.mark.parametrize("leading", [(), (2, 3, 2)])
def test_leading_dimensions(leading: tuple[int, ...]):
    attributes = shape_attributes(64, 32)
    inputs = operands(attributes, leading)
    if not leading:
        inputs[0] = inputs[0].reshape(64)
    check(attributes, inputs)


def test_flat_scales_and_zero_points():
    attributes = shape_attributes(64, 32)
    inputs = operands(attributes, (1, 3), zeros="packed")
    inputs[2], inputs[3] = inputs[2].reshape(-1), inputs[3].reshape(-1)
    check(attributes, inputs)


@pytest.mark.parametrize("accuracy", [0, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_with_open_tokens(dtype: Any, accuracy: int):
    attributes = shape_attributes(64, 32, 4, accuracy)
    check(attributes, operands(attributes, (1, 5), bias=True, dtype=dtype), open_axes={0: (0, 1)})


@pytest.mark.parametrize("accuracy", [0, 4])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_dtypes_with_one_token(dtype: Any, accuracy: int):
    attributes = shape_attributes(64, 32, 4, accuracy)
    check(attributes, operands(attributes, (1, 1), zeros="packed", bias=True, dtype=dtype))


@pytest.mark.parametrize("tokens", [1, 5])
def test_constant_weights_stay_packed(tokens: int):
    """IREE computes with constants at compile time where it may: 48 KiB of weights would become 256."""
    attributes = shape_attributes(256, 32) | {"N": 256}
    weights, scales = np.arange(256 * 8 * 16, dtype=np.int64).astype(np.uint8), normal(256 * 8)
    types = "!torch.vtensor<[256,8,16],ui8>", "!torch.vtensor<[256,8],f32>"
    a, y = f"!torch.vtensor<[1,{tokens},256],f32>", f"!torch.vtensor<[1,{tokens},256],f32>"
    onnx = "".join(f", torch.onnx.{name} = {value} : si64" for name, value in attributes.items())
    session = Session()
    session.set_flags(*FLAGS["cpu"], "--iree-input-type=none")
    session.context.load_all_available_dialects()
    with session.context, ir.Location.unknown():
        module = ir.Module.parse(f"""
func.func @main(%a: {a}) -> {y} attributes {{torch.onnx_meta.opset_version = 21 : si64}} {{
  %b = torch.vtensor.literal(dense<"0x{weights.tobytes().hex()}"> : tensor<256x8x16xui8>) : {types[0]}
  %s = torch.vtensor.literal(dense<"0x{scales.tobytes().hex()}"> : tensor<256x8xf32>) : {types[1]}
  %y = torch.operator "onnx.MatMulNBits"(%a, %b, %s) {{linattn.domain = "{MICROSOFT}", linattn.version = 1 : i64,
      linattn.node = "test"{onnx}}} : ({a}, {types[0]}, {types[1]}) -> {y}
  return %y : {y}
}}""")
        assert lower_operators(module, LoweringContext(Builder(), TARGETS["cpu"])) == 1
    packed = weights.nbytes + scales.nbytes
    assert packed < len(compile_module(module, session, "cpu")) < 2 * packed


@pytest.mark.vulkan
@pytest.mark.parametrize(("zeros", "tokens"), [("", 1), ("", 5), ("packed", 5)])
def test_portable_form_on_vulkan(zeros: str, tokens: int):
    attributes = shape_attributes(128, 32, accuracy=4)
    check(attributes, operands(attributes, (1, tokens), zeros=zeros), target="vulkan", options=PORTABLE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "attribute 'bits', got 3, expected 2, 4 or 8"),
        ({"block_size": 24}, "attribute 'block_size', got 24, expected a power of two"),
        ({"K": 96}, "last dimension of input 'A', got 1x2x64xf32, expected K = 96"),
        ({"N": 12}, r"input 'B' has the wrong shape, got 48x2x16xi8, expected \[12,2,16\]"),
        ({"weight_prepacked": 1}, "attribute 'weight_prepacked', got 1, expected 0"),
    ],
)
def test_invalid_attributes(change: dict[str, int], message: str):
    attributes = shape_attributes(64, 32)
    inputs = [spec(array) for array in operands(attributes, (1, 2))]
    with pytest.raises(UnsupportedModelError, match=message):
        mat_mul_n_bits.parse(node_for(MICROSOFT, OP, 1, inputs, attributes | change, 1))


def test_reordered_weights_are_refused():
    attributes = shape_attributes(64, 32)
    inputs = [spec(a) for a in [*operands(attributes, (1, 2)), None, np.zeros(64, np.int32)]]
    with pytest.raises(UnsupportedModelError, match="input 'g_idx' is not supported"):
        mat_mul_n_bits.parse(node_for(MICROSOFT, OP, 1, inputs, attributes, 1))


def test_reordered_weights_in_the_place_of_zero_points():
    attributes = shape_attributes(64, 32)
    inputs = [spec(a) for a in [*operands(attributes, (1, 2)), np.zeros(64, np.int32)]]
    with pytest.raises(UnsupportedModelError, match=r"input 3 is no 'zero_points' but a 'g_idx', .* got 64xi32"):
        mat_mul_n_bits.parse(node_for(MICROSOFT, OP, 1, inputs, attributes, 1))
