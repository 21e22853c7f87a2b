"""Instructions that few CPUs have, written out with those that all have: the kernels around them run anywhere.

AVX512_BF16's products of pairs, AMX's registers, and what Arm's BF16 makes of pairs. Where a machine has them the same
tests run them for real.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from linattn.dialect_patterns.attention import amx_kernel
from linattn.dialect_patterns.emit.amx_tiles import ROWS, SUMS, A, B, sizes_of
from linattn.dialect_patterns.emit.kernel_text import Index, KernelText, vector_type
from linattn.dialect_patterns.mat_mul import fused_amx, simd_pairs, simd_squares, simd_unit
from linattn.dialect_patterns.mat_mul_n_bits import fused_amx as bytes_amx
from linattn.dialect_patterns.mat_mul_n_bits import fused_amx_bf16 as bits_amx
from linattn.frontend import compile as compiling

PAIRS = frozenset({"avx512bf16"})
ARM = frozenset({"bf16"})
STACK = "--iree-llvmcpu-stack-allocation-limit=262144"
"""What kernels with emulated registers take beside what those with real ones do."""
AMX = PAIRS | fused_amx.FEATURES | bytes_amx.FEATURES


def emulate(monkeypatch: pytest.MonkeyPatch, features: frozenset[str]) -> None:
    """Models compiled in this process are for this machine with these features, without its own of their kind.

    A CPU with AMX would take that for what the others are to show, and no CPU has those of Arm beside it.
    """
    resolve, bits = compiling.resolve_target, 128 if features >= ARM else 512

    def with_features(*given: Any) -> Any:
        target = resolve(*given)
        machine = target.capabilities
        machine = replace(machine, vector_bits=bits, features=machine.features - (AMX | ARM) | features)
        return replace(target, capabilities=machine, flags=(*target.flags, STACK))

    monkeypatch.setattr(compiling, "resolve_target", with_features)
    monkeypatch.setattr(simd_pairs, "dot", dot)
    monkeypatch.setattr(simd_squares, "multiply", multiply_squares)
    for kernels in (fused_amx, bytes_amx, bits_amx, simd_unit, amx_kernel):
        monkeypatch.setattr(kernels, "AmxTiles", Tiles)


def dot(k: KernelText, a: str, b: str, total: str) -> str:
    """The sum of the products of pairs of bf16 in words, and of a vector of f32."""
    kind = k.types[a]

    def as_f32(words: str) -> str:
        return k.as_type(words, re.sub("i32", "f32", kind), "vector.bitcast")

    def upper(words: str) -> str:
        return as_f32(k.andi(words, k.constant(-65536, kind)))

    def lower(words: str) -> str:
        return as_f32(k.op(f"arith.shli {words}, {k.constant(16, kind)} : {kind}", kind))

    return k.fma(upper(a), upper(b), k.fma(lower(a), lower(b), total))


def multiply_squares(k: KernelText, a: str, b: str, total: str) -> str:
    """The sums of two rows by two columns, of two words each, and what is given."""
    for word in range(2):
        rows, columns = ([word + i for i in places] for places in ((0, 0, 2, 2), (0, 2, 0, 2)))
        total = dot(k, k.shuffle(a, a, rows), k.shuffle(b, b, columns), total)
    return total


def dot_bytes(k: KernelText, a: str, b: str, total: str, *, signed: bool = False) -> str:
    """The sum of the products of four bytes of words, a's signed and b's as said, and of a vector of i32."""
    kind = k.types[a]
    for byte in range(4):
        up = k.constant(24 - 8 * byte, kind)
        left = [k.op(f"arith.shli {value}, {up} : {kind}", kind) for value in (a, b)]
        down = k.constant(24, kind)
        shifts = ("arith.shrsi", "arith.shrsi" if signed else "arith.shrui")
        bytes_of = [k.op(f"{shift} {value}, {down} : {kind}", kind) for shift, value in zip(shifts, left, strict=True)]
        product = k.op(f"arith.muli {bytes_of[0]}, {bytes_of[1]} : {kind}", kind)
        total = k.addi(total, product)
    return total


class Tiles:
    """The matrix unit's registers as memory on the stack."""

    def __init__(self, k: KernelText, words: int = ROWS, rows: int = ROWS) -> None:
        self.k, self.words, self.rows = k, words, rows
        self.registers = [k.alloca([ROWS, ROWS]) for _ in (*SUMS, *A, *B)]

    def release(self) -> None:
        """Leaves the registers undefined: nothing here."""

    def zero(self, register: int) -> None:
        zero = self.k.constant(0.0, vector_type(ROWS))
        self._rows(lambda i: self.k.store(zero, self.registers[register], [i, 0]), self.rows)

    def load(self, register: int, memref: str, indices: Sequence[Index]) -> None:
        k, words = self.k, self.words if register in A else ROWS
        sizes_of(k, memref)  # fails where the unit's instruction would have no address
        lanes = 4 * words // k.element_bytes(memref)

        def row(i: Index) -> None:
            value = k.load(memref, self._row(indices, i), lanes, raw=True)
            k.store(k.as_type(value, vector_type(words), "vector.bitcast"), self.registers[register], [i, 0])

        self._rows(row, self.words if register in B else self.rows)

    def store(self, register: int, memref: str, indices: Sequence[Index]) -> None:
        k, dtype = self.k, self.k.element_type(memref)

        def row(i: Index) -> None:
            value = k.load(self.registers[register], [i, 0], ROWS)
            k.store(k.as_type(value, vector_type(ROWS, dtype), "vector.bitcast"), memref, self._row(indices, i))

        self._rows(row, self.rows)

    def multiply_bf16(self, total: int, a: int, b: int) -> None:
        self._multiply(total, a, b, "f32", lambda words, row, sums: dot(self.k, words, row, sums))

    def multiply_bytes(self, total: int, a: int, b: int) -> None:
        self._multiply(total, a, b, "i32", lambda words, row, sums: dot_bytes(self.k, words, row, sums))

    def multiply_signed(self, total: int, a: int, b: int) -> None:
        self._multiply(total, a, b, "i32", lambda *words: dot_bytes(self.k, *words, signed=True))

    def _multiply(self, total: int, a: int, b: int, dtype: str, products: Callable[[str, str, str], str]) -> None:
        k, ints = self.k, vector_type(ROWS, "i32")

        def row(i: Index) -> None:
            def word(p: str, sums: list[str]) -> list[str]:
                element = k.as_type(k.load(self.registers[a], [i, p]), "i32", "arith.bitcast")
                columns = k.as_type(k.load(self.registers[b], [p, 0], ROWS), ints, "vector.bitcast")
                return [products(k.splat(element, ROWS), columns, sums[0])]

            before = k.load(self.registers[total], [i, 0], ROWS)
            before = k.as_type(before, vector_type(ROWS, dtype), "vector.bitcast")
            (sums,) = k.loop(self.words, [before], word)
            k.store(k.as_type(sums, vector_type(ROWS), "vector.bitcast"), self.registers[total], [i, 0])

        self._rows(row, self.rows)

    def _row(self, indices: Sequence[Index], i: Index) -> list[Index]:
        return [*indices[:-2], self.k.add(indices[-2], i), indices[-1]]

    def _rows(self, body: Callable[[str], None], count: int) -> None:
        def once(i: str, _: list[str]) -> list[str]:
            body(i)
            return []

        self.k.loop(count, [], once)
