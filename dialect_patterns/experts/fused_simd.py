"""Strategy ``fused_simd``: the chosen experts only, as hand-made CPU kernels over weights packed at compile time.

Few tokens, three dispatches; what they read grows with k, not with E:

    %e, %w = flow.dispatch @experts_choice_...(%router)
    %h     = flow.dispatch @experts_first_...(%x, %e, %w1)             a row by the weights of its expert, activated
    %y     = flow.dispatch @experts_second_...(%h, %e, %w, %w2)        summed over the experts of a token

Many tokens, grouped by expert, each expert's weights read once:

    %order, %owner, %spans, %slots = flow.dispatch @experts_groups_...(%e)
    %rows  = flow.dispatch @experts_gather_...(%x, %order)             %h = @experts_product_...(%rows, %w1, %spans)
    %rows2 = flow.dispatch @experts_between_...(%h, ...)               %p = @experts_product_...(%rows2, %w2, %spans)
    %y     = flow.dispatch @experts_combine_...(%p, %slots, %e, %w)

Numbers of experts, rows and tiles that kernels read from memory are made valid ones by whoever reads them.
Legal: on CPUs, for weights of the model. See ``simd_routing``, ``simd_direct``, ``simd_tiled``, ``simd_rows``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from iree.compiler import ir

from ..emit.builder import Builder, Size, spec_of
from ..emit.dispatch import Kernel, dispatch
from ..machines import for_machines
from ..op import LoweringContext, weight_symbol
from ..select import Legality, No, OtherMachine, Yes, rows_text
from ..target import Target
from . import simd_bits, simd_bits_direct, simd_bits_tiled, simd_direct, simd_tiled
from .contract import Experts
from .given import given_choice
from .simd_layers import Layer, first_layers, second_layer
from .simd_routing import choosing_kernel, grouping_kernel, most_tiles
from .simd_rows import activating_kernel, combining_kernel, gathering_kernel

_FEW = 2  # tokens that are never grouped


def is_legal(contract: Experts, target: Target) -> Legality:
    """On CPUs, for weights of the model."""
    if target.is_gpu or not target.vector_bits:
        return (OtherMachine if target.is_gpu else No)("the target is not a CPU with vectors")
    if not contract.constant:
        return No("the experts are not weights of the model")
    if contract.rows == 0:
        return No("there are no tokens")
    layers = [*first_layers(contract), second_layer(contract)] if contract.fc1.bits else []
    reasons = [reason for layer in layers if (reason := simd_bits.reason_against(layer, target))]
    return No(reasons[0]) if reasons else Yes()


def is_few(c: Experts) -> bool:
    """Whether there are hardly two rows for an expert."""
    return c.rows is not None and (c.rows <= _FEW or c.rows * c.chosen <= c.count)


def is_direct(c: Experts, target: Target) -> bool:
    """Whether each row reads its experts by itself: where rows are few, and packed words are met on the stack."""
    if not is_few(c) or not c.fc1.bits:
        return is_few(c)
    layers = (*first_layers(c), second_layer(c))
    return all(simd_bits.plan_of(layer, machine, 1).direct for layer in layers for machine in target.machines)


def describe(contract: Experts, target: Target) -> str:
    """What the report says about it."""
    if is_direct(contract, target):
        return f"{rows_text(contract.rows)}, reading {contract.chosen} chosen experts of {contract.count}"
    return f"{rows_text(contract.rows)} grouped by expert, each expert's weights read once"


def emit_experts_fused_simd(
    context: LoweringContext, contract: Experts, rows: ir.Value, operands: Sequence[ir.Value | None]
) -> ir.Value:
    """Emit the node: [T, H] of x's rows [T, H]."""
    b, c, target = context.builder, contract, context.target
    router = operands[1]
    assert router is not None
    tokens = b.dim(rows, 0)
    if c.given:
        experts, weights = given_choice(b, c, operands)
    else:
        given = [operands[c.router_weights]] if c.router_weights is not None else []
        logits = [value for value in (router, *given) if value is not None]
        kernel = for_machines(target, lambda machine: choosing_kernel(c, machine))
        experts, weights = dispatch(b, kernel, logits, tokens, tokens)
    emit = _direct if is_direct(c, target) else _grouped
    return emit(context, c, operands, rows, experts, weights, tokens)


def _direct(
    context: LoweringContext,
    c: Experts,
    operands: Sequence[ir.Value | None],
    rows: ir.Value,
    experts: ir.Value,
    weights: ir.Value,
    tokens: Size,
) -> ir.Value:
    b, target, layers, last = context.builder, context.target, first_layers(c), second_layer(c)
    if c.fc1.bits:
        scales = [_scale_type(layer, operands) for layer in layers]
        first = for_machines(target, lambda m: simd_bits_direct.first_kernel(c, m, scales))
        second = for_machines(target, lambda m: simd_bits_direct.second_kernel(c, m, _scale_type(last, operands)))
    else:
        first = for_machines(target, lambda machine: simd_direct.first_kernel(c, machine))
        second = for_machines(target, lambda machine: simd_direct.second_kernel(c, machine))
    packed = [value for layer in layers for value in _packed(context, layer, operands)]
    (h,) = dispatch(b, first, [rows, experts, *packed, *_biases(c, operands)], b.mul(tokens, c.chosen), tokens)
    arguments = [h, experts, weights, *_packed(context, last, operands)]
    bias = operands[c.fc2.bias] if c.fc2.bias is not None else None
    return dispatch(b, second, arguments if bias is None else [*arguments, bias], tokens, tokens)[0]


@dataclass(frozen=True)
class _Tiles:
    """How many tokens are cut, and what multiplies a layer: (kernel for a machine, columns it writes)."""

    tile: int
    across: bool
    kernel: Callable[[Layer, Target], Kernel]
    columns: Callable[[Layer], int]


def _tiling(context: LoweringContext, c: Experts, operands: Sequence[ir.Value | None]) -> _Tiles:
    machine = context.target.machines[0]
    if c.fc1.bits:
        return _Tiles(
            simd_bits.plan_of(first_layers(c)[0], machine, None).rows,
            False,
            lambda layer, m: simd_bits_tiled.product_kernel(c, layer, m, _scale_type(layer, operands)),
            lambda layer: layer.parts * layer.columns,
        )
    assignments = None if c.rows is None else c.rows * c.chosen
    return _Tiles(
        first_layers(c)[0].tiled(machine, assignments).tile,
        True,
        lambda layer, m: simd_tiled.product_kernel(c, layer, layer.tiled(m, assignments)),
        lambda layer: layer.tiled(machine, assignments).columns,
    )


def _grouped(
    context: LoweringContext,
    c: Experts,
    operands: Sequence[ir.Value | None],
    rows: ir.Value,
    experts: ir.Value,
    weights: ir.Value,
    tokens: Size,
) -> ir.Value:
    b, target, layers, last = context.builder, context.target, first_layers(c), second_layer(c)
    tiling = _tiling(context, c, operands)
    tile, across = tiling.tile, tiling.across
    tiles = most_tiles(c, tile)
    count = _tiles(b, c, tokens, tile) if tiles is None else tiles
    order, owner, spans, slots = dispatch(b, grouping_kernel(c, tile), [experts], 1, tokens, count)

    def product(layer: Layer, given: ir.Value) -> ir.Value:
        kernel = for_machines(target, lambda machine: tiling.kernel(layer, machine))
        return dispatch(b, kernel, [given, *_packed(context, layer, operands), spans], c.count, tokens, count)[0]

    kernel = for_machines(target, lambda machine: gathering_kernel(c, machine, tile, across=across))
    (gathered,) = dispatch(b, kernel, [rows, order], count, tokens, count)
    products = [product(layer, gathered) for layer in layers]
    columns = [tiling.columns(layer) for layer in layers]
    kernel = for_machines(target, lambda machine: activating_kernel(c, machine, tile, columns, across=across))
    (between,) = dispatch(b, kernel, [*products, order, owner, *_biases(c, operands)], count, tokens, count)
    kernel = for_machines(target, lambda machine: combining_kernel(c, machine, tile, tiling.columns(last)))
    arguments = [product(last, between), slots, experts, weights]
    bias = operands[c.fc2.bias] if c.fc2.bias is not None else None
    return dispatch(b, kernel, arguments if bias is None else [*arguments, bias], tokens, tokens, count)[0]


def _tiles(b: Builder, c: Experts, tokens: Size, tile: int) -> Size:
    """Tiles that an open number of tokens can need."""
    return b.add(b.floordiv(b.mul(tokens, c.chosen), tile), c.count)


def _biases(c: Experts, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """Of the first layer."""
    found = [operands[m.bias] for m in (c.fc1, c.fc3) if m is not None and m.bias is not None]
    return [value for value in found if value is not None]


def _packed(context: LoweringContext, layer: Layer, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """A layer's weights as its kernels read them."""
    if layer.matrix.bits:
        return simd_bits.packed_weights(context, layer, operands)
    weights = operands[layer.matrix.weights]
    assert weights is not None
    assert context.weights is not None
    symbol = weight_symbol(weights)
    assert symbol is not None
    layout = layer.direct(context.target.machines[0], 1).layout
    return [context.weights.repacked(symbol, f"experts_{layer.layout}_{layout.name}", layer.pack(layout))]


def _scale_type(layer: Layer, operands: Sequence[ir.Value | None]) -> str:
    scales = operands[layer.matrix.scales] if layer.matrix.scales is not None else None
    assert scales is not None
    return spec_of(scales).dtype
