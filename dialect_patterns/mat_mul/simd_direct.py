"""The body of strategy ``fused_simd`` for few rows: one tile, read where it is, by a group of panels.

for each panel:  acc[r, :] += a[r, k] * b[k, :]         streaming through the weights once
"""

from __future__ import annotations

from collections.abc import Sequence

from ..emit.kernel_text import Index, KernelText, vector_type
from .simd_edges import store_rows
from .simd_pairs import load_half, load_pairs, multiply_add, widened
from .simd_plan import LINE, Plan
from .simd_unit import RowUnit

_AHEAD, _AHEAD_OF_WIDE = 1024, 4096
"""Bytes of 16-bit weights that are asked for ahead, the second with vectors of 512 bits: widening fills the window of
instructions, and the machine sees less far ahead by itself. 8 % (f16) and 20 % (bf16) faster on Zen 2; with f32 it
would be 10 % slower. A Sapphire Rapids reads f16 at 24.0 GB/s with 4096, at 20.6 with 1024 and at 18.0 with none."""
_WIDE = 16  # lanes


def write_direct(k: KernelText, p: Plan, memrefs: Sequence[str]) -> None:
    """The whole body.

    Args:
        k: Where to.
        p: Sizes of the product.
        memrefs: The rows [M, K], the weights [panels, K, W], and y [M, N].
    """
    group = k.op("hal.interface.workgroup.id[0] : index", "index")
    unit = RowUnit(k, p) if p.unit else None
    write_group(k, p, memrefs, group, unit)
    if unit:
        unit.release()


def write_group(k: KernelText, p: Plan, memrefs: Sequence[str], group: Index, unit: RowUnit | None) -> None:
    """A group of panels; ``unit`` where the matrix unit multiplies."""
    a, b, y = memrefs
    first = k.mul(group, p.group)
    end = k.add(first, p.group)

    def panel(index: Index, _: list[str]) -> list[str]:
        products = unit.products(p, a, b, index) if unit else direct_products(k, p, a, b, index)
        store_rows(k, p, y, p.tile, 0, index, products)
        return []

    k.loop(end if p.panels % p.group == 0 else k.minimum(end, p.panels), [], panel, start=first)


def direct_products(k: KernelText, p: Plan, a: str, b: str, panel: Index, row: Index = 0) -> list[str]:
    """The vectors of each row, row after row.

    Args:
        k: Where to.
        p: Sizes of the product.
        a: Memref of the rows.
        b: Memref of the weights [panels, K, W].
        panel: The panel, counted from the first of all weights.
        row: The first row.
    """
    sets = max(1, min(p.unroll, 4 // p.tile))  # sums side by side: one multiply-add takes as long as several
    size = p.tile * p.vectors
    vectors = [p.layout.place(k, p.width, panel, v * p.lanes) for v in range(p.vectors)]
    streams = [p.layout.place(k, p.width, panel, column)[0] for column in p.layout.starts(p.width)]
    row_bytes = p.layout.width * k.element_bytes(b)
    ahead = _AHEAD_OF_WIDE if p.lanes >= _WIDE else _AHEAD

    def step(at: Index, sums: list[str]) -> list[str]:
        for line in range(0, p.unroll * row_bytes, LINE) if k.element_bytes(b) < 4 else ():
            for stream in streams:
                k.prefetch(b, [stream, k.add(at, (ahead + line) // row_bytes), 0])
        load = load_pairs if p.pairs and not p.widened else _load_elements
        rows = [load(k, a, k.add(row, i), k.mul(at, p.parts), p.unroll * p.parts) for i in range(p.tile)]
        for u in range(p.unroll):
            first = (u % sets) * size
            for part, weights in enumerate(loaded(k.add(at, u))):
                elements = [k.extract(values, u * p.parts + part) for values in rows]
                sums[first : first + size] = multiply(weights, elements, sums[first : first + size])
        return sums

    def loaded(depth: Index) -> list[list[str]]:
        """The weights' vectors in a row, or in both elements of its pairs."""
        weights = [k.load(b, [stored, depth, column], p.lanes) for stored, column in vectors]
        return [list(part) for part in zip(*(widened(k, w) for w in weights), strict=True)] if p.widened else [weights]

    def multiply(weights: list[str], elements: list[str], sums: list[str]) -> list[str]:
        values = [k.splat(element, p.lanes) for element in elements for _ in weights]
        return [
            multiply_add(k, value, weight, total)
            for value, weight, total in zip(values, weights * p.tile, sums, strict=True)
        ]

    whole = p.depth - p.half
    sums = k.loop(whole, [k.constant(0.0, vector_type(p.lanes))] * (sets * size), step, step=p.unroll)
    totals = sums[:size]
    if p.half:
        (last,) = loaded(whole)
        totals = multiply(last, [load_half(k, a, k.add(row, i), whole) for i in range(p.tile)], totals)
    for other in range(size, len(sums), size):
        totals = [k.addf(x, y) for x, y in zip(totals, sums[other : other + size], strict=True)]
    return totals


def _load_elements(k: KernelText, memref: str, row: Index, at: Index, count: int) -> str:
    return k.load(memref, [row, at], count)
