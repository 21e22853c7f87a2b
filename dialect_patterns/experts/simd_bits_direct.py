"""The kernels of ``simd_direct`` for quantised weights: each weight is multiplied as it is unpacked, in f32."""

from __future__ import annotations

from collections.abc import Sequence

from ..emit.dispatch import Kernel
from ..emit.kernel_text import Index, KernelText, vector_type
from ..mat_mul_n_bits.contract import MatMulNBits
from ..mat_mul_n_bits.simd_columns import Columns
from ..mat_mul_n_bits.simd_direct import DirectProducts
from ..mat_mul_n_bits.simd_edges import Edges
from ..mat_mul_n_bits.simd_plan import Plan
from ..node import TensorSpec
from ..target import Target
from .activation import activate_text
from .contract import Experts
from .simd_bias import Bias
from .simd_bits import plan_of, product, weight_specs
from .simd_layers import Layer, first_layers, second_layer
from .simd_routing import load_number


def first_kernel(c: Experts, target: Target, scales: Sequence[str]) -> Kernel:
    """The first layer and the activation.

    Args:
        c: The contract.
        target: The machine.
        scales: The element type of each layer's scales.
    """
    layers, rows = first_layers(c), c.rows or 0
    p = plan_of(layers[0], target, 1)
    biases = [(m, TensorSpec((c.count, m.columns), m.dtype)) for m in (c.fc1, c.fc3) if m and m.bias is not None]
    weights = [weight_specs(layer, dtype) for layer, dtype in zip(layers, scales, strict=True)]

    def write(k: KernelText, batch: Index, tokens: Index, memrefs: Sequence[str]) -> None:
        del batch, tokens
        given = iter(memrefs)
        x, experts = next(given), next(given)
        stored = [[next(given) for _ in specs] for specs in weights]
        bias = {m.name: next(given) for m, _ in biases}
        h = next(given)
        assignment = k.op("hal.interface.workgroup.id[1] : index", "index")
        token = k.div(assignment, c.chosen)
        expert = load_number(k, experts, [token, k.rem(assignment, c.chosen)], c.count)
        row, at = (x, token) if c.x.dtype == "f32" else (_widened(k, p.lanes, x, token, c.hidden), 0)
        edges = Edges(k, product(layers[0], 1), p, None, h)
        parts: list[tuple[_Part, Bias]] = []
        for layer, memref in zip(layers, stored, strict=True):
            own = bias.get(layer.matrix.name)
            q = p if layer.matrix.bits == c.fc1.bits else plan_of(layer, target, 1)
            for part in range(layer.parts):
                found = _Part(k, layer, q, memref, row, at, expert, part)
                parts.append((found, Bias(k, own, layer.layout, part, c.inner)))

        def tile(column: Index) -> None:
            columns = [k.add(column, v * p.lanes) for v in range(p.vectors)]
            values: list[list[str]] = []
            for part, own in parts:
                sums = part.sums(column, edges.after(column))
                values.append([own.add(s, expert, place) for s, place in zip(sums, columns, strict=True)])
            factors = values[1] if len(values) > 1 else [None] * p.vectors
            active = [activate_text(k, c.activation, g, f) for g, f in zip(values[0], factors, strict=True)]
            edges.write(assignment, column, active)

        edges.each_tile(tile)

    ends = "".join(f"_{m.name}" for m, _ in biases)
    keys = "_".join(f"{layer.matrix.key}{s}" for layer, s in zip(layers, scales, strict=True))
    shape = f"{rows}x{c.hidden}x{c.inner}_{c.chosen}of{c.count}"
    return Kernel(
        name=f"experts_first_{keys}_{shape}_{c.layout}_{c.activation.key}{ends}_v{32 * p.lanes}",
        inputs=(
            TensorSpec((rows, c.hidden), c.x.dtype),
            TensorSpec((rows, c.chosen), "i32"),
            *(spec for specs in weights for spec in specs),
            *(spec for _, spec in biases),
        ),
        outputs=(TensorSpec((rows * c.chosen, c.inner), "f32"),),
        axes=("__",) * (3 + sum(map(len, weights)) + len(biases)),
        workgroups=(-(-c.inner // p.workgroup_columns), 1),
        write=write,
    )


class _Part:
    """The products of a row by one part of an expert's weights."""

    def __init__(
        self,
        k: KernelText,
        layer: Layer,
        p: Plan,
        memrefs: Sequence[str],
        row: str,
        at: Index,
        expert: Index,
        part: int,
    ) -> None:
        c = product(layer, 1)
        before = k.mul(k.add(k.mul(expert, layer.parts), part), layer.columns)
        self.k, self.before = k, before
        self.products = _products(k, c, p, memrefs, row, at)

    def sums(self, column: Index, after: Index) -> list[str]:
        """The vectors at a column."""
        return self.products.tile(self.k.add(self.before, column), self.k.add(self.before, after))[0]


def _products(k: KernelText, c: MatMulNBits, p: Plan, memrefs: Sequence[str], row: str, at: Index) -> DirectProducts:
    words, scales, *zeros = memrefs
    return DirectProducts(k, c, p, Columns(k, c, p, words, scales, zeros[0] if zeros else None), [row], [at])


def _widened(k: KernelText, lanes: int, memref: str, row: Index, size: int) -> str:
    """A row of 16-bit floats as f32 on the stack."""
    wide = k.alloca([1, size])
    whole = size // lanes * lanes

    def copy(at: str, _: list[str]) -> list[str]:
        k.store(k.load(memref, [row, at], lanes), wide, [0, at])
        return []

    k.loop(whole, [], copy, step=lanes)
    for at in range(whole, size):
        k.store(k.load(memref, [row, at]), wide, [0, at])
    return wide


def second_kernel(c: Experts, target: Target, scales: str) -> Kernel:
    """The second layer, and the sum over the experts of a token."""
    layer, rows = second_layer(c), c.rows or 0
    p, weights = plan_of(layer, target, 1), weight_specs(layer, scales)
    bias = [TensorSpec((c.count, c.hidden), c.x.dtype)] if c.fc2.bias is not None else []

    def write(k: KernelText, batch: Index, tokens: Index, memrefs: Sequence[str]) -> None:
        del batch, tokens
        h, experts, shares = memrefs[:3]
        stored = memrefs[3 : 3 + len(weights)]
        given = Bias(k, memrefs[3 + len(weights)] if bias else None, "plain", 0, c.hidden)
        token = k.op("hal.interface.workgroup.id[1] : index", "index")
        edges = Edges(k, product(layer, 1), p, None, memrefs[-1])

        def tile(column: Index) -> None:
            columns = [k.add(column, v * p.lanes) for v in range(p.vectors)]

            def one(j: Index, totals: list[str]) -> list[str]:
                expert = load_number(k, experts, [token, j], c.count)
                row = k.add(k.mul(token, c.chosen), j)
                sums = _Part(k, layer, p, stored, h, row, expert, 0).sums(column, edges.after(column))
                sums = [given.add(s, expert, place) for s, place in zip(sums, columns, strict=True)]
                weight = k.splat(k.load(shares, [token, j]), p.lanes)
                return [k.fma(s, weight, total) for s, total in zip(sums, totals, strict=True)]

            zero = k.constant(0.0, vector_type(p.lanes))
            edges.write(token, column, k.loop(c.chosen, [zero] * p.vectors, one))

        edges.each_tile(tile)

    shape = f"{rows}x{c.inner}x{c.hidden}_{c.chosen}of{c.count}"
    return Kernel(
        name=f"experts_second_{layer.matrix.key}{scales}_{shape}{'_bias' if bias else ''}_v{32 * p.lanes}",
        inputs=(
            TensorSpec((rows * c.chosen, c.inner), "f32"),
            TensorSpec((rows, c.chosen), "i32"),
            TensorSpec((rows, c.chosen), "f32"),
            *weights,
            *bias,
        ),
        outputs=(TensorSpec((rows, c.hidden), c.x.dtype),),
        axes=("__",) * (4 + len(weights) + len(bias)),
        workgroups=(-(-c.hidden // p.workgroup_columns), 1),
        write=write,
    )
