"""Strategy ``fused_simt``: the chosen experts only, as hand-made GPU kernels.

    %e, %w = flow.dispatch @experts_choice_simt_...(%router)               a workgroup per token
    %order, %owner = flow.dispatch @experts_groups_simt_...(%e)            many tokens: tiles of rows of one expert
    %h = flow.dispatch @experts_simt_...(%x, %e, %w1)                      activated, by assignment
    %y = flow.dispatch @experts_simt_...(%h, %e, %w2)
    sum over the experts of a token                                        linalg, fused with what follows

A row or a tile of rows reads its expert's weights; where tokens are few, no more than the chosen experts' are read.
Numbers of experts and assignments that kernels read from memory are made valid ones by whoever reads them.
Legal: on GPUs, for weights of the model, if 4 divides the sizes (quantised: whole words, blocks of 16 on).
"""

from __future__ import annotations

from collections.abc import Sequence

from iree.compiler import ir

from ..op import LoweringContext
from ..select import Legality, No, OtherMachine, Yes, rows_text
from ..target import Target
from . import simd_bits
from .contract import Experts
from .given import given_choice
from .simd_layers import Layer, first_layers, second_layer
from .simt_groups import emit_groups
from .simt_product import VECTOR, Items, Weights, emit_product
from .simt_routing import choice_bytes, emit_choice

_MOST_ROWS = 8
_FEW = 2  # tokens that are never grouped


def is_legal(contract: Experts, target: Target) -> Legality:
    """On a GPU, for weights of the model."""
    c = contract
    if not target.is_gpu:
        return OtherMachine(f"{target.name} is not a GPU")
    if not c.constant:
        return No("the experts are not weights of the model")
    if not c.given and choice_bytes(c) > target.workgroup_memory:
        return No(f"{c.count} experts do not fit into the memory of a workgroup")
    if c.hidden % VECTOR or c.inner % VECTOR:
        return No(f"{c.hidden} or {c.inner} elements are not whole vectors of {VECTOR}")
    for layer in (*first_layers(c), second_layer(c)):
        reason = _against(layer)
        if reason:
            return No(reason)
    return Yes()


def _against(layer: Layer) -> str | None:
    m = layer.matrix
    if not m.bits:
        return None
    if simd_bits.block_size(m) < simd_bits.LEAST_BLOCK:
        return f"{m.name}: {m.depth} weights of a column are not whole blocks of {simd_bits.LEAST_BLOCK}"
    columns, product = layer.experts * layer.parts * layer.columns, simd_bits.product(layer, None)
    if m.zeros is not None and columns * -(-product.blocks * m.bits // 8) % 4:
        return f"{m.name}: the zero points are not whole words"
    return None


def rows_of_a_tile(c: Experts) -> int:
    """Rows that share a read of an expert's weights; 1 where tokens are not grouped."""
    if c.rows is None:
        return _MOST_ROWS // 2
    if c.rows <= _FEW or c.rows * c.chosen <= c.count:
        return 1
    return _MOST_ROWS if c.rows * c.chosen >= _MOST_ROWS * c.count else _MOST_ROWS // 2


def describe(contract: Experts, target: Target) -> str:
    """What the report says about it."""
    del target
    tile = rows_of_a_tile(contract)
    if tile == 1:
        return f"{rows_text(contract.rows)}, reading {contract.chosen} chosen experts of {contract.count}"
    return f"{rows_text(contract.rows)} grouped by expert, {tile} share a read of its weights"


def emit_experts_fused_simt(
    context: LoweringContext, contract: Experts, rows: ir.Value, operands: Sequence[ir.Value | None]
) -> ir.Value:
    """Emit the node: [T, H] of x's rows [T, H]."""
    b, c = context.builder, contract
    router = operands[1]
    assert router is not None
    tokens = b.dim(rows, 0)
    size = b.mul(tokens, c.chosen)
    if c.given:
        experts, weights = (b.collapse(value, 0, 1) for value in given_choice(b, c, operands))
    else:
        given = operands[c.router_weights] if c.router_weights is not None else None
        experts, weights = emit_choice(context, c, router, given)
    tile = rows_of_a_tile(c)
    items = Items(size, 1, experts, None)
    if tile > 1:
        most = b.minimum(size, c.count) if isinstance(size, int) else c.count
        tiles = b.add(b.floordiv(size, tile), most)
        order, owner = emit_groups(context, c, experts, size, tiles, tile)
        items = Items(tiles, tile, owner, order)
    layers = [_weights(context, layer, operands) for layer in first_layers(c)]
    h = emit_product(context, c, items, rows, c.chosen, layers, size, activated=True)
    last = [_weights(context, second_layer(c), operands)]
    y = emit_product(context, c, items, h, 1, last, size, activated=False)
    total = b.reduce(
        "tkh,tk->th", lambda acc, v, w: acc + v * w, b.expand(y, 0, [tokens, c.chosen]),
        b.expand(weights, 0, [tokens, c.chosen]), initial=0.0,
    )  # fmt: skip
    return b.cast(total, c.x.dtype)


def _weights(context: LoweringContext, layer: Layer, operands: Sequence[ir.Value | None]) -> Weights:
    m = layer.matrix
    bias = operands[m.bias] if m.bias is not None else None
    if not m.bits:
        weights = operands[m.weights]
        assert weights is not None
        return Weights(layer, [weights], bias)
    values = simd_bits.packed_weights(context, layer, operands)
    if m.zeros is not None:
        values[2] = simd_bits.as_words(values[2])
    return Weights(layer, values, bias)
