"""The rows of each expert's tiles, for strategy ``fused_simd`` with many tokens: gathered, activated, combined.

    x [T, H], order          ->  [tiles, ...] f32: the token of each row; a row without one has some other token
    gate, factor             ->  [tiles, ...] f32: activated
    y [tiles, tile, H]       ->  [T, H]: sum over the k rows of a token

Products take a tile either with the elements of its rows side by side (``across``) or row after row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..emit.dispatch import Kernel
from ..emit.kernel_text import Index, KernelText, vector_type
from ..node import TensorSpec
from ..target import Target
from .activation import activate_text
from .contract import Experts
from .simd_bias import Bias
from .simd_layers import first_layers
from .simd_routing import dimension, load_number, most_tiles

_TOKENS = 8  # of a workgroup that combines


def _lanes(target: Target) -> int:
    return max(target.vector_bits // 32, 4)


def _each_vector(k: KernelText, size: int, lanes: int, body: Callable[[Index, int], None]) -> None:
    """``body(start, lanes)`` for vectors of ``size`` elements, and ``body(start, 0)`` for each of the rest."""
    whole = size // lanes * lanes

    def vector(at: str, _: list[str]) -> list[str]:
        body(at, lanes)
        return []

    if whole:
        k.loop(whole, [], vector, step=lanes)
    for at in range(whole, size):
        body(at, 0)


def _store(k: KernelText, value: str, target: str, tile: Index, rows: int, row: int, at: Index, across: bool) -> None:
    """One element or some of a row of a tile."""
    lanes = k.lanes(value)
    if not across:
        k.store(value, target, [tile, row, at])
        return
    for lane in range(max(lanes, 1)):
        place = k.add(k.mul(k.add(at, lane), rows), row)
        k.store(k.extract(value, lane) if lanes else value, target, [tile, place])


def rows_spec(c: Experts, tile: int, size: int, across: bool) -> TensorSpec:
    """What products take: tiles of rows of ``size`` elements."""
    tiles = most_tiles(c, tile)
    return TensorSpec((tiles, tile * size) if across else (tiles, tile, size), "f32")


def _letters(across: bool) -> str:
    return "R_" if across else "R__"


def gathering_kernel(c: Experts, target: Target, tile: int, *, across: bool) -> Kernel:
    """The tokens of each tile."""
    lanes, size = _lanes(target), c.hidden

    def write(k: KernelText, batch: Index, tokens: Index, memrefs: Sequence[str]) -> None:
        del batch
        x, order, rows = memrefs
        at_tile = k.op("hal.interface.workgroup.id[1] : index", "index")

        def fill() -> list[str]:
            places = [
                k.div(load_number(k, order, [at_tile, i], k.mul(tokens, c.chosen)), c.chosen) for i in range(tile)
            ]

            def some(at: Index, count: int) -> None:
                for i, value in enumerate([k.load(x, [place, at], count) for place in places]):
                    _store(k, value, rows, at_tile, tile, i, at, across)

            _each_vector(k, size, lanes, some)
            return []

        k.when(_is_used(k, order, at_tile), [], fill, lambda: [])

    tiles = most_tiles(c, tile)
    return Kernel(
        name=f"experts_gather_{c.x.dtype}_{_shape(c)}_{size}_t{tile}{'a' if across else 'r'}_v{32 * lanes}",
        inputs=(TensorSpec((c.rows, size), c.x.dtype), TensorSpec((tiles, tile), "i32")),
        outputs=(rows_spec(c, tile, size, across),),
        axes=("T_", "R_", _letters(across)),
        workgroups=(1, 1),
        write=write,
    )


def _is_used(k: KernelText, order: str, tile: Index) -> str:
    """Whether a tile has any rows; they come first."""
    first = k.load(order, [tile, 0], raw=True)
    return k.op(f"arith.cmpi sge, {first}, {k.constant(0, 'i32')} : i32", "i1")


def activating_kernel(c: Experts, target: Target, tile: int, columns: Sequence[int], *, across: bool) -> Kernel:
    """What is between the layers; ``columns`` of each product, whose parts are halves of them."""
    lanes, layers, tiles = _lanes(target), first_layers(c), most_tiles(c, tile)
    biases = [(m, TensorSpec((c.count, m.columns), m.dtype)) for m in (c.fc1, c.fc3) if m and m.bias is not None]

    def write(k: KernelText, batch: Index, tokens: Index, memrefs: Sequence[str]) -> None:
        del batch, tokens
        products = memrefs[: len(layers)]
        order, owner = memrefs[len(layers) : len(layers) + 2]
        given = dict(zip([m.name for m, _ in biases], memrefs[len(layers) + 2 :], strict=False))
        rows = memrefs[-1]
        at_tile = k.op("hal.interface.workgroup.id[1] : index", "index")
        parts = [
            (products[i], part * (columns[i] // layer.parts), Bias(k, given.get(m.name), layer.layout, part, c.inner))
            for i, (layer, m) in enumerate(zip(layers, (c.fc1, c.fc3), strict=False))
            for part in range(layer.parts)
            if m is not None
        ]

        def fill() -> list[str]:
            expert = load_number(k, owner, [at_tile], c.count)

            def some(at: Index, count: int) -> None:
                for i in range(tile):
                    values = [
                        bias.add(k.load(memref, [at_tile, i, k.add(at, offset)], count), expert, at)
                        for memref, offset, bias in parts
                    ]
                    value = activate_text(k, c.activation, values[0], values[1] if len(values) > 1 else None)
                    _store(k, value, rows, at_tile, tile, i, at, across)

            _each_vector(k, c.inner, lanes, some)
            return []

        k.when(_is_used(k, order, at_tile), [], fill, lambda: [])

    ends = "".join(f"_{m.name}" for m, _ in biases)
    kind = f"{c.layout}_{c.activation.key}{ends}_{'_'.join(map(str, columns))}"
    return Kernel(
        name=f"experts_between_{c.x.dtype}_{_shape(c)}_{c.inner}_{kind}_t{tile}{'a' if across else 'r'}_v{32 * lanes}",
        inputs=(
            *(TensorSpec((tiles, tile, n), "f32") for n in columns),
            TensorSpec((tiles, tile), "i32"),
            TensorSpec((tiles,), "i32"),
            *(spec for _, spec in biases),
        ),
        outputs=(rows_spec(c, tile, c.inner, across),),
        axes=(*("R__" for _ in columns), "R_", "R", *("__" for _ in biases), _letters(across)),
        workgroups=(1, 1),
        write=write,
    )


def combining_kernel(c: Experts, target: Target, tile: int, columns: int) -> Kernel:
    """The sum over the experts of each token; ``columns`` that the products have written."""
    lanes = _lanes(target)
    bias = [TensorSpec((c.count, c.hidden), c.x.dtype)] if c.fc2.bias is not None else []

    def write(k: KernelText, batch: Index, tokens: Index, memrefs: Sequence[str]) -> None:
        del batch
        y, slots, experts, weights = memrefs[:4]
        given, out = Bias(k, memrefs[4] if bias else None, "plain", 0, c.hidden), memrefs[-1]
        group = k.op("hal.interface.workgroup.id[1] : index", "index")
        first = k.mul(group, _TOKENS)
        rows = k.mul(dimension(k, y), tile)

        def token(t: str, _: list[str]) -> list[str]:
            def some(at: Index, count: int) -> None:
                def one(j: Index, total: list[str]) -> list[str]:
                    slot = load_number(k, slots, [t, j], rows)
                    expert = load_number(k, experts, [t, j], c.count)
                    value = k.load(y, [k.div(slot, tile), k.rem(slot, tile), at], count)
                    return [k.fma(given.add(value, expert, at), k.load(weights, [t, j]), total[0])]

                zero = k.constant(0.0, vector_type(count) if count else "f32")
                k.store(k.loop(c.chosen, [zero], one)[0], out, [t, at])

            _each_vector(k, c.hidden, lanes, some)
            return []

        k.loop(k.minimum(k.add(first, _TOKENS), tokens), [], token, start=first)

    ends = "_bias" if bias else ""
    return Kernel(
        name=f"experts_combine_{c.x.dtype}_{_shape(c)}_{c.hidden}of{columns}{ends}_t{tile}_v{32 * lanes}",
        inputs=(
            TensorSpec((most_tiles(c, tile), tile, columns), "f32"),
            TensorSpec((c.rows, c.chosen), "i32"),
            TensorSpec((c.rows, c.chosen), "i32"),
            TensorSpec((c.rows, c.chosen), "f32"),
            *bias,
        ),
        outputs=(TensorSpec((c.rows, c.hidden), c.x.dtype),),
        axes=("R__", "T_", "T_", "T_", *("__" for _ in bias), "T_"),
        workgroups=(1, 1),
        write=write,
        share=_TOKENS,
    )


def _shape(c: Experts) -> str:
    return f"{'x' if c.rows is None else c.rows}_{c.chosen}of{c.count}"
