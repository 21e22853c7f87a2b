"""What the LinearAttention strategies emit, by structure."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from data import Shape, linear_attention
from harness import lowered
from iree.compiler import ir
from linattn.dialect_patterns.op import LoweringOptions
from state_ops import specs_of


def emit(shape: Shape, tokens: int, strategy: str | None, *, open_dims: bool | str = False, **data: Any) -> ir.Module:
    inputs = linear_attention(shape, 1, tokens, **data)
    specs = specs_of("LinearAttention", inputs, open_dims)
    return lowered("", "LinearAttention", 27, specs, shape.attributes, 2, "cpu", LoweringOptions(strategy, 16))


def operations(module: ir.Module) -> list[ir.Operation]:
    found: list[ir.Operation] = []

    def visit(op: ir.Operation) -> ir.WalkResult:
        found.append(op)
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return found


def count(module: ir.Module) -> Counter[str]:
    return Counter(op.name for op in operations(module))


# Matrix products with C = 16: the scores, two levels of merging for the inverse and its two products, and in the loop
# over chunks u and the state (delta rules) and the two terms of the output.
@pytest.mark.parametrize(
    ("rule", "decay", "products", "exps"),
    [
        ("linear", "head", 2 + 2, 0),
        ("gated", "head", 2 + 2, 3),
        ("gated", "key", 1 + 4 + 2, 1),
        ("delta", "head", 2 + 4 + 2 + 4, 0),
        ("gated_delta", "head", 2 + 4 + 2 + 4, 3),
        ("gated_delta", "key", 4 + 4 + 2 + 4, 1),
    ],
)
def test_chunked(rule: str, decay: str, products: int, exps: int) -> None:
    module = emit(Shape(rule, decay), 64, "chunked", open_dims=True)
    ops = count(module)
    assert ops["torch.operator"] == 0
    assert ops["scf.for"] == 1
    assert ops["linalg.batch_matmul"] == products
    assert ops["math.exp"] == exps
    (loop,) = (op for op in operations(module) if op.name == "scf.for")
    assert [str(value.type) for value in loop.results] == ["tensor<?x16x8xf32>", "tensor<?x?x32x8xf32>"]


def test_static_tokens_are_unrolled() -> None:
    chunks = 4
    ops = count(emit(Shape("gated_delta"), chunks * 16, "chunked"))
    assert ops["scf.for"] == 0
    assert ops["linalg.batch_matmul"] == 2 + 4 + 2 + 4 * chunks
    assert ops["util.optimization_barrier"] == chunks


def test_many_static_chunks_are_a_loop() -> None:
    assert count(emit(Shape("gated"), 129 * 16, "chunked"))["scf.for"] == 1


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("rule", ["linear", "gated", "delta", "gated_delta"])
def test_recurrent(rule: str, tokens: int) -> None:
    ops = count(emit(Shape(rule), tokens, "recurrent"))
    assert ops["torch.operator"] == ops["linalg.batch_matmul"] == 0
    assert ops["scf.for"] == (tokens > 1)
    assert ops["math.exp"] == ("gated" in rule)


@pytest.mark.parametrize("strategy", ["chunked", "recurrent"])
def test_the_state_is_rounded_once(strategy: str) -> None:
    module = emit(Shape(), 40, strategy, open_dims=True, dtype=np.float16)
    (loop,) = (op for op in operations(module) if op.name == "scf.for")
    assert str(loop.results[0].type) == "tensor<?x16x8xf32>"
    assert count(module)["arith.truncf"] == 2  # once for the output, once for the state


@pytest.mark.parametrize("strategy", ["chunked", "recurrent"])
def test_wide_copies_of_16_bit_inputs_are_not_left_to_fusion(strategy: str) -> None:
    """IREE's Vulkan code generation gets a bare f16 -> f32 loop in front of a reduction wrong."""
    module = emit(Shape(), 1 if strategy == "recurrent" else 40, strategy, dtype=np.float16, state_dtype=np.float32)
    for op in operations(module):
        if op.name == "linalg.generic":
            body = [inner.name for inner in op.regions[0].blocks[0].operations]
            assert body != ["arith.extf", "linalg.yield"]


def test_no_tokens_is_no_work() -> None:
    ops = count(emit(Shape(), 0, None))
    assert not {"scf.for", "linalg.generic", "linalg.batch_matmul"} & set(ops)


def test_only_the_wanted_output() -> None:
    inputs = linear_attention(Shape(), 1, 1)
    specs = specs_of("LinearAttention", inputs, False)
    module = lowered("", "LinearAttention", 27, specs, Shape().attributes, 2, used=[False, True])
    assert count(module)["torch.operator"] == 0
    assert "-> !torch.vtensor<[1,2,16,8],f32>" in str(module)
