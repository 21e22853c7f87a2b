"""What a warp does by its own instructions, by scalar code through the workgroup's memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from iree.compiler import ir
from iree.compiler.dialects import arith, vector
from linattn.dialect_patterns.emit.scalar import Scalar
from linattn.dialect_patterns.emit.simt_kernel import Buffer, Kernel
from linattn.dialect_patterns.emit.warp import LANES, ByLane, Source, Warp

_WORDS = 32  # of a lane


class _Sums(list):
    """Four sums of a lane, and the factors of products that are still to be added."""

    terms: tuple[Any, ...] = ()


@dataclass(frozen=True)
class _Left:
    """A left factor that is read when it is wanted."""

    base: Scalar
    rows: ByLane
    xor: int
    offset: int
    transposed: bool


class EmulatedWarp(Warp):
    """A warp whose lanes see each other's words in the workgroup's memory."""

    def __init__(self, k: Kernel, half: str, memory: Buffer) -> None:
        super().__init__(k, half, memory)
        size = ir.ShapedType(memory.value.type).get_dim_size(0)
        self.words = k.shared(4 * size)  # instead of ``memory``: a load of a word is one load
        self.scratch = k.shared(_WORDS * k.group.threads)
        self.thread = k.thread()
        self.start = self.thread - self.thread.divide_unsigned(LANES)[1]  # the warp's first thread
        self.row, self.place = self.thread.divide_unsigned(LANES)[1].divide_unsigned(4)

    # ---- memory ----------------------------------------------------------------------------------------------------
    def shared_address(self) -> Scalar:
        return Scalar.constant(0, "i32")

    def source(self, buffer: Buffer, offset: Scalar) -> Source:
        return Source(buffer, offset)

    def copy(self, to: Scalar, to_offset: int, start: Source, offset: int, is_there: Scalar) -> None:
        k = self.k
        zeros = [k.constant(0.0)] * 4
        place = self._index(start.address + offset, 16)

        def load() -> list[ir.Value]:
            return k.elements(k.load(start.buffer, place))

        words = k.choose(is_there, load, lambda: zeros, [zero.type for zero in zeros])
        for i, word in enumerate(words):
            k.store(word, self.words, self._index(to + (to_offset + 4 * i), 4))

    def wait(self) -> None:
        pass

    def meet(self, group: Scalar, warps: int) -> None:
        self.k.barrier()

    @staticmethod
    def _index(address: Scalar, size: int) -> Scalar:
        return address.to("index").divide_unsigned(size)[0]

    def load_word(self, address: Scalar, offset: int = 0) -> ir.Value:
        return self.k.bits(self.load_number(address, offset)).value

    def load_number(self, address: Scalar, offset: int = 0) -> ir.Value:
        return self.k.load(self.words, self._index(address + offset, 4))

    def load_matrices(self, base: Scalar, rows: ByLane, xor: int, offset: int, *, transposed: bool = False) -> Any:
        return _Left(base, rows, xor, offset, transposed)

    # ---- what other lanes have -------------------------------------------------------------------------------------
    def _show(self, words: Sequence[ir.Value]) -> None:
        """Write words where all lanes see them."""
        k = self.k
        assert len(words) <= _WORDS
        for i, word in enumerate(words):
            k.store(arith.BitcastOp(k.type(1), word).result, self.scratch, self.thread + i * self.k.group.threads)
        k.barrier()

    def _seen(self, lane: Scalar, word: Scalar | int = 0) -> ir.Value:
        """A word of a lane of this warp."""
        if isinstance(word, int):
            word = Scalar.constant(word, "index")
        place = word * self.k.group.threads + self.start + lane
        return self.k.bits(self.k.load(self.scratch, place)).value

    @staticmethod
    def _half(word: ir.Value, upper: Scalar) -> ir.Value:
        """One half's bits."""
        high = Scalar(word).shift_right(16)
        low = Scalar(word) & Scalar.constant(0xFFFF, "i32")
        return upper.equals(0).select(low, high).value

    @staticmethod
    def _word(low: ir.Value, high: ir.Value) -> ir.Value:
        return arith.OrIOp(low, arith.ShLIOp(high, Scalar.constant(16, "i32").value).result).result

    # ---- matrices --------------------------------------------------------------------------------------------------
    def zero(self) -> Any:
        return _Sums([self.k.constant(0.0)] * 4)

    def sums(self, values: Sequence[ir.Value]) -> Any:
        return _Sums(values)

    def multiply_add(self, a: Any, b: Sequence[ir.Value], c: Any) -> Any:
        """Put off until the sums are wanted, so that one loop does: each product by itself is minutes of compiling."""
        found = _Sums(c)
        found.terms = (*c.terms, (a, b))
        return found

    def values(self, sums: Any) -> list[ir.Value]:
        k = self.k
        if not sums.terms:
            return list(sums)
        lefts: list[_Left] = [left for left, _ in sums.terms]
        first = lefts[0]
        assert all((left.rows, left.transposed) == (first.rows, first.transposed) for left in lefts)
        self._show([word for _, right in sums.terms for word in right])

        def step(i: Scalar, found: list[ir.Value]) -> list[ir.Value]:
            term, part = i.divide_unsigned(8)
            upper, pair = part.divide_unsigned(4)
            xor, offset = _int(first.xor), _int(first.offset)
            for n, left in enumerate(lefts[1:], 1):
                xor = term.equals(n).select(_int(left.xor), xor)
                offset = term.equals(n).select(_int(left.offset), offset)

            def row(lane: Scalar) -> Scalar:
                return first.base + offset + (first.rows.of(lane.to("i32")) ^ xor)

            factors: list[ir.Value] = []
            for e in range(2):
                matrix = upper * 16 + 8 * e
                if first.transposed:
                    word, half = self.row.divide_unsigned(2)
                    starts = [row(matrix + pair * 2 + n) + word.to("i32") * 4 for n in range(2)]
                    halves = [self._half(self.load_word(start), half) for start in starts]
                    factors.append(self._word(*halves))
                else:
                    factors.append(self.load_word(row(matrix + self.row) + pair.to("i32") * 4))
            rights = [self._seen(self.place * 8 + pair + 4 * e, term * 2 + upper) for e in range(2)]
            a, b = ([self.parts(x) for x in two] for two in (factors, rights))
            for e in range(4):
                for x, y in zip(a[e // 2], b[e % 2], strict=True):
                    found[e] = k.fma(x, y, found[e])
            return found

        zero, last = (Scalar.constant(n, "index") for n in (0, 8 * len(lefts)))
        found = k.loop(zero, last, 1, list(sums), step)
        k.barrier()
        return found

    def turn(self, words: Sequence[ir.Value]) -> list[ir.Value]:
        self._show(words)
        column, upper = self.row.divide_unsigned(2)
        found: list[ir.Value] = []
        for i in range(len(words)):
            seen = [self._seen(self.place * 8 + column + 4 * e, i) for e in range(2)]
            found.append(self._word(*(self._half(word, upper) for word in seen)))
        self.k.barrier()
        return found

    def pair(self, low: ir.Value, high: ir.Value) -> ir.Value:
        k = self.k
        if self.half == "f16":
            both = arith.TruncFOp(k.type(2, "f16"), k.join([low, high])).result
            single = ir.Type.parse("vector<1xi32>")
            return vector.ExtractOp(vector.BitCastOp(single, both).result, [], [0]).result
        return self._word(k.bf16_bits(low), k.bf16_bits(high))

    # ---- over the lanes --------------------------------------------------------------------------------------------
    def largest(self, bits: Scalar) -> Scalar:
        self._show([bits.value])

        def step(i: Scalar, found: list[ir.Value]) -> list[ir.Value]:
            return [arith.MaxSIOp(found[0], self._seen(i)).result]

        zero, last = (Scalar.constant(n, "index") for n in (0, LANES))
        (found,) = self.k.loop(zero, last, 1, [bits.value], step)
        self.k.barrier()
        return Scalar(found)

    def add_rows(self, value: ir.Value) -> ir.Value:
        self._show([self.k.bits(value).value])
        found = self.k.constant(0.0)
        for i in range(8):
            found = self.k.add(found, self.k.from_bits(Scalar(self._seen(self.place + 4 * i))))
        self.k.barrier()
        return found


def _int(value: int) -> Scalar:
    return Scalar.constant(value, "i32")
