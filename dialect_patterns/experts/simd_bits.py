"""How strategy ``fused_simd`` multiplies by an expert's weights where those are quantised: as MatMulNBits does.

The columns of all experts are those of one matrix of packed words, [E x parts x N, words of K], gate before factor. A
scale for a whole column is repeated for blocks of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from iree.compiler import ir

from ..emit.builder import spec_of, tensor_type
from ..mat_mul_n_bits.contract import MatMulNBits
from ..mat_mul_n_bits.simd_plan import Plan, plan
from ..node import TensorSpec
from ..op import LoweringContext, WeightStore, weight_symbol
from ..target import Target
from .contract import Matrix
from .simd_layers import Layer, columns_of

LEAST_BLOCK = 16
"""The smallest block of weights that kernels know."""

_MOST_BLOCK = 128  # of a column that has one scale

Array = np.ndarray[Any, Any]


def block_size(matrix: Matrix) -> int:
    """Weights that share a scale as kernels read them."""
    if matrix.block_size < matrix.depth:
        return matrix.block_size
    return min(matrix.depth & -matrix.depth, _MOST_BLOCK)


def reason_against(layer: Layer, target: Target) -> str | None:
    """Why an expert's weights cannot be read so."""
    m = layer.matrix
    if block_size(m) < LEAST_BLOCK:
        return f"{m.name}: {m.depth} weights of a column are not whole blocks of {LEAST_BLOCK}"
    for machine in target.machines:
        found = plan(product(layer, None), machine)
        if isinstance(found, str):
            return f"{m.name}: {found}"
    return None


def product(layer: Layer, rows: int | None) -> MatMulNBits:
    """The product of f32 rows by all parts of one expert; of one part where there is one row."""
    m = layer.matrix
    return MatMulNBits(
        where=m.name,
        a=TensorSpec((rows, m.depth), "f32"),
        columns=layer.columns if rows == 1 else layer.parts * layer.columns,
        depth=m.depth,
        bits=m.bits,
        block_size=block_size(m),
        zero_points="default" if m.zeros is None else "packed",
        with_bias=False,
        rounds_a=False,
    )


def plan_of(layer: Layer, target: Target, rows: int | None) -> Plan:
    """The sizes, for one row or for tiles of an open number."""
    found = plan(product(layer, rows), target)
    assert isinstance(found, Plan)
    return found


def weight_specs(layer: Layer, scale_dtype: str) -> list[TensorSpec]:
    """Words, scales, and zero points if there are any."""
    c, columns = product(layer, None), layer.experts * layer.parts * layer.columns
    specs = [TensorSpec((columns, c.row_words), "i32"), TensorSpec((columns, c.blocks), scale_dtype)]
    if c.zero_points == "packed":
        specs.append(TensorSpec((columns, -(-c.blocks * c.bits // 8)), "i8"))
    return specs


def packed_weights(context: LoweringContext, layer: Layer, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """The weights as :func:`weight_specs` says."""
    m, store = layer.matrix, context.weights
    assert store is not None
    words, *_ = weight_specs(layer, m.dtype)
    word = f"experts_{layer.layout}_{block_size(m)}"
    found = [_repacked(store, operands[m.weights], word, lambda a: _columns(layer, a))]
    bits = as_words(found[0], words.shape)
    assert m.scales is not None
    values = [bits, _repacked(store, operands[m.scales], word, lambda a: _blocks(layer, a))]
    if m.zeros is not None:
        values.append(_repacked(store, operands[m.zeros], f"{word}_zeros{m.bits}", lambda a: _zeros(layer, a)))
    return values


def as_words(value: ir.Value, shape: Sequence[int | None] | None = None) -> ir.Value:
    """Bytes as words of 32 bits: in one dimension, or of a shape."""
    count = math.prod(size or 0 for size in spec_of(value).shape) // 4
    view = tensor_type(shape or (count,), "i32")
    no_dims = {"operandSegmentSizes": ir.DenseI32ArrayAttr.get([1, 0, 0])}
    return ir.Operation.create("flow.tensor.bitcast", results=[view], operands=[value], attributes=no_dims).result


def _repacked(store: WeightStore, value: ir.Value | None, word: str, pack: Callable[[Array], Array]) -> ir.Value:
    assert value is not None
    symbol = weight_symbol(value)
    assert symbol is not None
    return store.repacked(symbol, word, pack)


def _columns(layer: Layer, array: Array) -> Array:
    """[E, N, ...] as [E x parts x columns, ...]."""
    parts = np.stack(columns_of(array, layer.layout), axis=1)
    return np.ascontiguousarray(parts).reshape(-1, array.shape[-1])


def _blocks(layer: Layer, scales: Array) -> Array:
    """Scales [E, N] or [E, N, blocks], one for each block that kernels know."""
    wide = scales if scales.ndim == 3 else scales[..., None]
    return _columns(layer, np.repeat(wide, product(layer, None).blocks // wide.shape[-1], axis=-1))


def _zeros(layer: Layer, packed: Array) -> Array:
    """Zero points [E, bytes of N] or [E, N, bytes of blocks] as the second, a number for each block."""
    m, c = layer.matrix, product(layer, None)
    parts = [(packed >> shift) & ((1 << m.bits) - 1) for shift in range(0, 8, m.bits)]
    numbers = np.stack(parts, -1).reshape(*packed.shape[:-1], -1)
    if packed.ndim == 2:
        numbers = np.repeat(numbers[:, : m.columns, None], c.blocks, axis=-1)
    else:
        numbers = np.repeat(numbers[..., : m.blocks], c.blocks // m.blocks, axis=-1)
    per_byte = 8 // m.bits
    padding = [(0, 0)] * 2 + [(0, -c.blocks % per_byte)]
    fields = np.pad(numbers, padding).reshape(*numbers.shape[:2], -1, per_byte)
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(m.bits)
    return _columns(layer, np.bitwise_or.reduce(fields << shifts, axis=-1).astype(np.uint8))
