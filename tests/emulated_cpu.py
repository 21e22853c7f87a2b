"""Instructions that few CPUs have, written out with those that all have: the kernels around them run anywhere.

AVX512_BF16's products of pairs and AMX's registers. Where a machine has them the same tests run them for real.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from linattn.dialect_patterns.emit.amx_tiles import REGISTERS, ROW_BYTES, ROWS
from linattn.dialect_patterns.emit.kernel_text import Index, KernelText, vector_type
from linattn.dialect_patterns.mat_mul import fused_amx, simd_pairs
from linattn.frontend import compile as compiling

PAIRS = frozenset({"avx512bf16"})
AMX = PAIRS | fused_amx.FEATURES


def emulate(monkeypatch: pytest.MonkeyPatch, features: frozenset[str]) -> None:
    """Models compiled in this process are for this machine with 512-bit vectors and these features besides."""
    resolve = compiling.resolve_target

    def with_features(*given: Any) -> Any:
        target = resolve(*given)
        machine = target.capabilities
        machine = replace(machine, vector_bits=512, features=machine.features | features)
        return replace(target, capabilities=machine)

    monkeypatch.setattr(compiling, "resolve_target", with_features)
    monkeypatch.setattr(simd_pairs, "dot", dot)
    monkeypatch.setattr(fused_amx, "AmxTiles", Tiles)


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


class Tiles:
    """The matrix unit's registers as memory on the stack."""

    def __init__(self, k: KernelText) -> None:
        self.k = k
        self.registers = [k.alloca([ROWS, ROWS]) for _ in range(REGISTERS)]

    def release(self) -> None:
        """Leaves the registers undefined: nothing here."""

    def zero(self, register: int) -> None:
        zero = self.k.constant(0.0, vector_type(ROWS))
        self._rows(lambda i: self.k.store(zero, self.registers[register], [i, 0]))

    def load(self, register: int, memref: str, indices: Sequence[Index]) -> None:
        k, lanes = self.k, ROW_BYTES // self.k.element_bytes(memref)

        def row(i: Index) -> None:
            value = k.load(memref, self._row(indices, i), lanes, raw=True)
            value = k.as_type(value, vector_type(ROWS), "vector.bitcast")
            k.store(value, self.registers[register], [i, 0])

        self._rows(row)

    def store(self, register: int, memref: str, indices: Sequence[Index]) -> None:
        k = self.k
        assert k.element_type(memref) == "f32"
        self._rows(lambda i: k.store(k.load(self.registers[register], [i, 0], ROWS), memref, self._row(indices, i)))

    def multiply_bf16(self, total: int, a: int, b: int) -> None:
        k = self.k

        def row(i: Index) -> None:
            def pair(p: str, sums: list[str]) -> list[str]:
                word = k.as_type(k.load(self.registers[a], [i, p]), "i32", "arith.bitcast")
                words = k.load(self.registers[b], [p, 0], ROWS)
                words = k.as_type(words, vector_type(ROWS, "i32"), "vector.bitcast")
                return [dot(k, k.splat(word, ROWS), words, sums[0])]

            (sums,) = k.loop(ROWS, [k.load(self.registers[total], [i, 0], ROWS)], pair)
            k.store(sums, self.registers[total], [i, 0])

        self._rows(row)

    def _row(self, indices: Sequence[Index], i: Index) -> list[Index]:
        return [*indices[:-2], self.k.add(indices[-2], i), indices[-1]]

    def _rows(self, body: Any) -> None:
        def once(i: str, _: list[str]) -> list[str]:
            body(i)
            return []

        self.k.loop(ROWS, [], once)
