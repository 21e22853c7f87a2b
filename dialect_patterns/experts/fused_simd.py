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

from collections.abc import Sequence

from iree.compiler import ir

from ..emit.builder import Builder, Size, spec_of
from ..emit.dispatch import dispatch
from ..machines import for_machines
from ..mat_mul.simd_layout import Layout
from ..node import TensorSpec
from ..op import LoweringContext, weight_symbol
from ..select import Legality, No, Yes
from ..target import Target
from .contract import Experts
from .simd_direct import first_kernel, second_kernel
from .simd_layers import Layer, first_layers, second_layer
from .simd_routing import choosing_kernel, grouping_kernel, most_tiles
from .simd_rows import activating_kernel, combining_kernel, gathering_kernel
from .simd_tiled import product_kernel

_FEW = 2  # tokens that are never grouped


def is_legal(contract: Experts, target: Target) -> Legality:
    """On CPUs, for weights of the model."""
    if target.is_gpu or not target.vector_bits:
        return No("the target is not a CPU with vectors")
    if not contract.constant:
        return No("the experts are not weights of the model")
    if contract.fc1.bits:
        return No("the weights are quantised")
    if contract.rows == 0:
        return No("there are no tokens")
    return Yes()


def is_direct(c: Experts) -> bool:
    """Whether each row reads its experts by itself: where there are hardly two rows for an expert."""
    return c.rows is not None and (c.rows <= _FEW or c.rows * c.chosen <= c.count)


def describe(contract: Experts) -> str:
    """What the report says about it."""
    rows = "?" if contract.rows is None else contract.rows
    if is_direct(contract):
        return f"{rows} rows read the {contract.chosen} experts they chose, of {contract.count}"
    return f"{rows} rows grouped by expert, each expert's weights read once"


def emit_experts_fused_simd(
    context: LoweringContext, contract: Experts, operands: Sequence[ir.Value | None]
) -> ir.Value:
    """Emit the node."""
    b, c, target = context.builder, contract, context.target
    x, router = operands[:2]
    assert x is not None
    assert router is not None
    lead = b.shape(x)[:-1]
    x = b.refine(x, TensorSpec((*spec_of(x).shape[:-1], c.hidden), c.x.dtype))
    rows = b.collapse(x, 0, 1) if len(lead) > 1 else x
    tokens = b.dim(rows, 0)
    given = [operands[c.router_weights]] if c.router_weights is not None else []
    logits = [value for value in (router, *given) if value is not None]
    kernel = for_machines(target, lambda machine: choosing_kernel(c, machine))
    experts, weights = dispatch(b, kernel, logits, tokens, tokens)
    emit = _direct if is_direct(c) else _grouped
    y = emit(context, c, operands, rows, experts, weights, tokens)
    return b.expand(y, 0, lead) if len(lead) > 1 else y


def _direct(
    context: LoweringContext,
    c: Experts,
    operands: Sequence[ir.Value | None],
    rows: ir.Value,
    experts: ir.Value,
    weights: ir.Value,
    tokens: Size,
) -> ir.Value:
    b, target = context.builder, context.target
    first = for_machines(target, lambda machine: first_kernel(c, machine))
    layers = first_layers(c)
    layout = layers[0].direct(target.machines[0], 1).layout
    packed = [_packed(context, layer, operands, layout) for layer in layers]
    (h,) = dispatch(b, first, [rows, experts, *packed, *_biases(c, operands)], b.mul(tokens, c.chosen), tokens)
    second = for_machines(target, lambda machine: second_kernel(c, machine))
    arguments = [h, experts, weights, _packed(context, second_layer(c), operands, layout)]
    bias = operands[c.fc2.bias] if c.fc2.bias is not None else None
    return dispatch(b, second, arguments if bias is None else [*arguments, bias], tokens, tokens)[0]


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
    assignments = None if c.rows is None else c.rows * c.chosen
    machine = target.machines[0]
    plans = [layer.tiled(machine, assignments) for layer in (*layers, last)]
    tile, layout = plans[0].tile, plans[0].layout
    tiles = most_tiles(c, tile)
    count = _tiles(b, c, tokens, tile) if tiles is None else tiles
    order, owner, spans, slots = dispatch(b, grouping_kernel(c, tile), [experts], 1, tokens, count)

    def product(layer: Layer, given: ir.Value) -> ir.Value:
        kernel = for_machines(target, lambda m: product_kernel(c, layer, layer.tiled(m, assignments)))
        packed = _packed(context, layer, operands, layout)
        return dispatch(b, kernel, [given, packed, spans], c.count, tokens, count)[0]

    kernel = for_machines(target, lambda m: gathering_kernel(c, m, tile, across=True))
    (gathered,) = dispatch(b, kernel, [rows, order], count, tokens, count)
    products = [product(layer, gathered) for layer in layers]
    columns = [p.columns for p in plans[:-1]]
    kernel = for_machines(target, lambda m: activating_kernel(c, m, tile, columns, across=True))
    (between,) = dispatch(b, kernel, [*products, order, owner, *_biases(c, operands)], count, tokens, count)
    kernel = for_machines(target, lambda m: combining_kernel(c, m, tile, plans[-1].columns))
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


def _packed(context: LoweringContext, layer: Layer, operands: Sequence[ir.Value | None], layout: Layout) -> ir.Value:
    weights = operands[layer.matrix.weights]
    assert weights is not None
    assert context.weights is not None
    symbol = weight_symbol(weights)
    assert symbol is not None
    return context.weights.repacked(symbol, f"experts_{layer.layout}_{layout.name}", layer.pack(layout))
