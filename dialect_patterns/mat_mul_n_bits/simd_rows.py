"""Rows of A as the products of strategy ``fused_simd`` take them.

For products in f32: f32 [M, padded K], rounded to int8 steps where the contract says so. For products of bytes:

    s = max |a| / 127 over a block,  q = round(a / s)
    bytes: q, as i32 [M, groups]: the four elements that meet one field of a word of weights side by side
    steps: s, f32 [M, blocks]
    offsets: -s * sum(q) (times the default zero point), f32 [M, blocks]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..emit.kernel_text import Index, KernelText, vector_type
from ..node import Dim, TensorSpec
from .contract import INT8_MAX, MatMulNBits
from .simd_plan import Plan, groups

_UNROLL = 8
_MAGNITUDE = 0x7FFFFFFF
# Added, it leaves small numbers no bits for a fraction: f32 rounds them to even. (math.roundeven is a scalar call.)
_NO_FRACTION = 1.5 * 2**23

_Body = Callable[[Index, list[str]], list[str]]


def is_arranged(c: MatMulNBits, p: Plan) -> bool:
    """Whether A is anything but read as it is."""
    return p.instruction is not None or c.rounds_a or c.a.dtype != "f32" or c.depth % c.block_size != 0


def arranged_specs(c: MatMulNBits, p: Plan, rows: Dim) -> list[TensorSpec]:
    """What a row becomes."""
    if p.instruction is None:
        return [TensorSpec((rows, c.padded_depth), "f32")]
    factors = TensorSpec((rows, c.blocks), "f32")
    return [TensorSpec((rows, c.row_words * groups(c)), "i32"), factors, factors]


class RowWriter:
    """Writes the code that arranges one row.

    Args:
        k: Where to.
        c: What is computed.
        p: Its sizes.
        source: Memref of A, [M, K].
        targets: Memrefs of :func:`arranged_specs`.
    """

    def __init__(self, k: KernelText, c: MatMulNBits, p: Plan, source: str, targets: Sequence[str]) -> None:
        self.k, self.c, self.p, self.source, self.targets = k, c, p, source, targets
        self.lanes = max(p.lanes, c.per_word)
        self.tail = c.depth % c.block_size
        self.copy = k.alloca([1, c.block_size]) if self.tail else ""

    def write(self, row: Index, target: Index) -> None:
        """Row ``row`` of A to row ``target`` of the targets."""
        k, c = self.k, self.c

        def block(b: str, _: list[str]) -> list[str]:
            self._block(self.source, row, k.mul(b, c.block_size), target, b)
            return []

        k.loop(c.depth // c.block_size, [], block)
        if self.tail:
            start, zero = c.depth - self.tail, k.constant(0.0, "f32")
            for i in range(c.block_size):
                value = k.load(self.source, [row, start + i]) if i < self.tail else zero
                k.store(value, self.copy, [0, i])
            self._block(self.copy, 0, 0, target, c.blocks - 1)

    def _each_vector(self, carried: list[str], body: _Body) -> list[str]:
        """``body(offset in the block, carried)`` for each vector of a block."""
        step = self.lanes
        if self.c.block_size > _UNROLL * step:
            return self.k.loop(self.c.block_size, carried, body, step=step)
        for offset in range(0, self.c.block_size, step):
            carried = list(body(offset, carried))
        return carried

    def _block(self, memref: str, row: Index, start: Index, target: Index, block: Index) -> None:
        k, c, lanes = self.k, self.c, self.lanes
        ints, floats = vector_type(lanes, "i32"), vector_type(lanes)

        def load(offset: Index) -> str:
            return k.load(memref, [row, k.add(start, offset)], lanes)

        if not c.rounds_a:

            def copy(offset: Index, _: list[str]) -> list[str]:
                k.store(load(offset), self.targets[0], [target, k.add(k.mul(block, c.block_size), offset)])
                return []

            self._each_vector([], copy)
            return

        def largest(offset: Index, carried: list[str]) -> list[str]:
            bits = k.as_type(load(offset), ints, "arith.bitcast")
            magnitude = k.andi(bits, k.constant(_MAGNITUDE, ints))
            return [k.op(f"arith.maxui {carried[0]}, {magnitude} : {ints}", ints)]

        # As integers, magnitudes have the same order, NaN above all.
        (found,) = self._each_vector([k.constant(0, ints)], largest)
        most = k.as_type(k.op(f"vector.reduction <maxui>, {found} : {ints} into i32", "i32"), "f32", "arith.bitcast")
        step = k.divf(most, k.constant(INT8_MAX, "f32"))
        zero = k.constant(0.0, "f32")
        is_zero = k.op(f"arith.cmpf oeq, {step}, {zero} : f32", "i1")
        inverse = k.divf(k.constant(INT8_MAX, "f32"), most)  # as ONNX Runtime: 1 / step rounds some halves otherwise
        inverse = k.splat(k.op(f"arith.select {is_zero}, {zero}, {inverse} : f32", "f32"), lanes)

        def rounded(offset: Index) -> str:
            shift = k.constant(_NO_FRACTION, floats)
            # The product is rounded first, as in ONNX Runtime: without a fence LLVM makes it one fma with the sum.
            steps = k.intrinsic("llvm.arithmetic.fence", [k.mulf(load(offset), inverse)], floats)
            return k.subf(k.addf(steps, shift), shift)

        if self.p.instruction is None:

            def store(offset: Index, _: list[str]) -> list[str]:
                at = [target, k.add(k.mul(block, c.block_size), offset)]
                k.store(k.mulf(rounded(offset), step), self.targets[0], at)
                return []

            self._each_vector([], store)
            return

        def store_bytes(offset: Index, carried: list[str]) -> list[str]:
            whole = k.as_type(rounded(offset), ints, "arith.fptosi")
            narrow = k.as_type(whole, vector_type(lanes, "i8"), "arith.trunci")
            per_byte = groups(c)
            order = [
                word + byte * per_byte + group
                for word in range(0, lanes, c.per_word)
                for group in range(per_byte)
                for byte in range(4)
            ]
            packed = k.as_type(k.shuffle(narrow, narrow, order), vector_type(lanes // 4, "i32"), "vector.bitcast")
            k.store(packed, self.targets[0], self._word(target, block, k.div(offset, 4)))
            return [k.addi(carried[0], whole)]

        (sums,) = self._each_vector([k.constant(0, ints)], store_bytes)
        total = k.op(f"vector.reduction <add>, {sums} : {ints} into i32", "i32")
        offset = k.negate(k.mulf(step, k.as_type(total, "f32", "arith.sitofp")))
        if c.zero_points == "default":
            offset = k.mulf(offset, k.constant(c.default_zero, "f32"))
        k.store(step, self.targets[1], self._factor(target, block))
        k.store(offset, self.targets[2], self._factor(target, block))

    def _word(self, row: Index, block: Index, word: Index) -> list[Index]:
        """Where a block's word of four bytes goes."""
        return [row, self.k.add(self.k.mul(block, self.c.block_size // 4), word)]

    def _factor(self, row: Index, block: Index) -> list[Index]:
        """Where a block's step and offset go."""
        return [row, block]
