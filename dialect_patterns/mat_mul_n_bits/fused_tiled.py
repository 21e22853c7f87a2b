"""Strategy ``fused_tiled``: many rows times packed weights as one GPU kernel, without matrix units.

    hal.executable.source @mat_mul_n_bits_fused_tiled_... {
      the tiles of ``tiled_product.py``; a tile of weights is unpacked on its way into the workgroup's memory
    }

A weight is unpacked once a row of tiles, in registers, and lies unpacked in the workgroup's memory only. Where
``accuracy_level`` 4 has A rounded, that is a dispatch before.

Legal: on GPUs, for any number of rows, open ones too, if 4 divides N. Cost: all multiply-adds in f32, 16 reads of 16
bytes from the workgroup's memory for 256 of them. On an H100 (Vulkan) 64 and 512 rows, K=1024 to N=3584, take 39 and
134 us, 40 % of its rate for the latter; the portable form 190 and 353 us.
"""

from __future__ import annotations

from iree.compiler import ir

from ..emit.builder import spec_of, tensor_type
from ..emit.scalar import Scalar
from ..emit.simt_kernel import Group, Kernel, dispatch
from ..emit.tiled_product import DEPTH, STRIDE, VECTOR, Plan, TiledProduct, places, plan_for
from ..op import LoweringContext
from ..select import Legality, No, OtherMachine
from ..target import Target
from .contract import MatMulNBits
from .operands import Operands
from .rounded_simt import emit_a
from .simt_weights import PackedWeights, bound, readable


def is_legal(contract: MatMulNBits, target: Target) -> Legality:
    """On any GPU."""
    if not target.is_gpu:
        return OtherMachine(f"{target.name} is not a GPU")
    if contract.columns % VECTOR:
        return No(f"N={contract.columns} is not a multiple of {VECTOR}")
    return readable(contract)


def describe(contract: MatMulNBits, target: Target) -> str:
    """What the report says about it."""
    del target
    plan = plan_for(contract.rows, contract.columns)
    return f"f32 products of {plan.rows} rows with unpacked tiles of {plan.columns} columns"


def emit_mat_mul_n_bits_fused_tiled(context: LoweringContext, contract: MatMulNBits, x: Operands) -> ir.Value:
    """Emit the product [M, N]."""
    c, b, plan = contract, context.builder, plan_for(contract.rows, contract.columns)
    a, rows = emit_a(b, c, x.a, "f32"), b.dim(x.a, 0)
    dtype = spec_of(a).dtype

    def body(k: Kernel) -> None:
        count = k.number(0)
        rows_of_a = k.buffer(0, dtype, count * (c.padded_depth // VECTOR), VECTOR)
        weights = PackedWeights(k, c, _width(c, plan))
        y = k.buffer(weights.output, c.a.dtype, count * (c.columns // VECTOR), VECTOR)
        product = TiledProduct(k, plan, rows_of_a, y, count, c.padded_depth, c.columns)
        product.emit(_PackedTile(product, c, weights))

    open_sizes = [rows] if not isinstance(rows, int) else []
    outputs: list[tuple[ir.RankedTensorType, list[ir.Value]]] = [
        (tensor_type((c.rows, c.columns), c.a.dtype), open_sizes)
    ]
    name = f"mat_mul_n_bits_fused_tiled_{dtype}_{c.key}_nx{c.depth}x{c.columns}_{plan}"
    items, tiles = b.index(b.floordiv(b.add(rows, plan.rows - 1), plan.rows)), -(-c.columns // plan.columns)
    group, inputs = Group(plan.threads, context.target.subgroup_size), [a, *bound(c, x)]
    return dispatch(name, group, tiles, items, [b.index(rows)], inputs, outputs, body)[0]


def _width(c: MatMulNBits, plan: Plan) -> int:
    """Words of a load: of a column's step, or fewer if that gives more threads a load."""
    words = DEPTH // c.per_word
    return max(1, min(words, plan.columns * words // plan.threads))


class _PackedTile:
    """See :class:`WeightsTile`.

    Args:
        product: Whose tile.
        contract: What to compute.
        weights: Loads and unpacks.
    """

    def __init__(self, product: TiledProduct, contract: MatMulNBits, weights: PackedWeights) -> None:
        self.k, self.p, self.c, self._weights, self._product = product.k, product.p, contract, weights, product
        self._share = DEPTH // weights.per_load  # loads of a column
        self._places = places(product.thread, self.p.columns * self._share, self.p.columns, self.p.threads)
        self._columns = [product.column(slot).minimum(contract.columns - 1) for _, slot in self._places]

    def load(self, step: Scalar) -> list[ir.Value]:
        """This thread's part of a step's weights, as stored."""
        found = zip(self._columns, self._places, strict=True)
        return [
            value for column, (place, _) in found for value in self._weights.load(column, step * self._share + place)
        ]

    def put(self, loads: list[ir.Value], step: Scalar) -> None:
        """Write them, in f32."""
        k, weights, chunks = self.k, self._weights, self._weights.per_load // VECTOR
        size = len(loads) // len(self._places)

        def write() -> None:
            for i, (place, slot) in enumerate(self._places):
                part = loads[i * size : (i + 1) * size]
                values = weights.dequantise(part, self._columns[i], step * self._share + place)
                for j in range(chunks):
                    chunk = k.join(values[j * VECTOR : (j + 1) * VECTOR])
                    k.store(chunk, self._product.tile_b, slot * STRIDE + place * chunks + j)

        if self.p.columns * self._share < self.p.threads:  # with few bits there are fewer loads than threads
            k.when(self._product.thread < self.p.columns * self._share, write)
        else:
            write()

    def bias(self, column: Scalar) -> ir.Value | None:
        """The bias of a column."""
        return self._weights.bias(column) if self.c.with_bias else None
