"""The CPU's matrix unit (AMX) in a hand-made kernel: eight registers of 16 rows of 64 bytes, named by their numbers.

    c[i, j] += sum over words p of the products of a[i, p] and b[p, j]     words of 2 bf16, or of 4 bytes

16 x 16 sums of 16 words each take 16 cycles: 32 products in f32, or 64 in i32. A process needs Linux's permission for
the registers, which ``linattn.runtime.amx`` asks for. LLVM's intrinsics pass through IREE as they are.
Source: Intel's Software Developer's Manual, chapter 18.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from .kernel_text import Index, KernelText

ROWS = 16
"""Rows of a register."""
ROW_BYTES = 64
SUMS, A, B = (0, 1, 2, 3), (4, 5), (6, 7)
"""The registers by what a kernel of 32 x 32 sums has in them: a sum's are (A[i // 2], B[i % 2])."""


class AmxTiles:
    """Writes a kernel's instructions of the matrix unit.

    Args:
        k: Where to.
        words: Words of a product, at most 16: of the rows of a, and rows of b.
        rows: Rows of a and of sums, at most 16.
    """

    def __init__(self, k: KernelText, words: int = ROWS, rows: int = ROWS) -> None:
        self.k = k
        palette = [0] * 64
        palette[0] = 1
        for register in (*SUMS, *A, *B):
            palette[16 + 2 * register] = 4 * words if register in A else ROW_BYTES
            palette[48 + register] = words if register in B else rows
        config = k.alloca([64], "i8")
        values = k.op(f"arith.constant dense<{palette}> : vector<64xi8>", "vector<64xi8>")
        k.do(f"vector.store {values}, {config}[{k.index(0)}] : memref<64xi8>, vector<64xi8>")
        self._do("ldtilecfg", self._pointer(config, [0]))

    def release(self) -> None:
        """The last instruction: the registers cost every switch of threads while they are in use."""
        self._do("tilerelease")

    def zero(self, register: int) -> None:
        """Zeros."""
        self._do("tilezero", self._number(register))

    def load(self, register: int, memref: str, indices: Sequence[Index]) -> None:
        """Read 64 bytes of each of 16 rows, or as many as the register has.

        Args:
            register: Its number.
            memref: Whose last dimension but one counts rows.
            indices: Of the first element.
        """
        pointer, stride = self._pointer(memref, indices), self._stride(memref)
        self._do("tileloadd64", self._number(register), pointer, stride)

    def store(self, register: int, memref: str, indices: Sequence[Index]) -> None:
        """Write what :meth:`load` reads."""
        pointer, stride = self._pointer(memref, indices), self._stride(memref)
        self._do("tilestored64", self._number(register), pointer, stride)

    def multiply_bf16(self, total: int, a: int, b: int) -> None:
        """Add the products of pairs of bf16, in f32."""
        self._do("tdpbf16ps", *(self._number(register) for register in (total, a, b)))

    def multiply_bytes(self, total: int, a: int, b: int) -> None:
        """Add the products of a's signed bytes by b's unsigned ones, in i32."""
        self._do("tdpbsud", *(self._number(register) for register in (total, a, b)))

    def multiply_signed(self, total: int, a: int, b: int) -> None:
        """Add the products of signed bytes, in i32."""
        self._do("tdpbssd", *(self._number(register) for register in (total, a, b)))

    def _number(self, register: int) -> str:
        return self.k.op(f"llvm.mlir.constant({register} : i8) : i8", "i8")

    def _stride(self, memref: str) -> str:
        sizes, size = sizes_of(self.k, memref)
        return self.k.constant(sizes[-1] * size, "i64")

    def _pointer(self, memref: str, indices: Sequence[Index]) -> str:
        k = self.k
        sizes, size = sizes_of(k, memref)
        offset: Index = 0
        for axis, index in enumerate(indices):
            offset = k.add(offset, k.mul(index, math.prod(sizes[axis + 1 :]) * size))
        base = k.op(f"memref.extract_aligned_pointer_as_index {memref} : {k.types[memref]} -> index", "index")
        address = k.op(f"arith.index_cast {k.add(base, offset)} : index to i64", "i64")
        return k.op(f"llvm.inttoptr {address} : i64 to !llvm.ptr", "!llvm.ptr")

    def _do(self, name: str, *operands: str) -> None:
        types = ", ".join(self.k.types[value] for value in operands)
        self.k.do(f'llvm.call_intrinsic "llvm.x86.{name}"({", ".join(operands)}) : ({types}) -> ()')


def multiply_terms(
    tiles: AmxTiles,
    products: Sequence[tuple[int, int]],
    load_a: Callable[[int, int], None],
    load_b: Callable[[int, int], None],
    meanwhile: Sequence[Callable[[], None]] = (),
) -> None:
    """Add the products of 32 rows by 32 columns, each register loaded just before its first product.

    Prompts are 7 to 23 % shorter so than with all loads, and what is asked for, before the products, on a Sapphire
    Rapids in its slow state (docs/benchmarks.md); in the quiet one a program in C shows no difference.

    Args:
        tiles: The registers.
        products: Which terms of both are multiplied.
        load_a: ``load_a(term, half)``: loads ``A[half]``.
        load_b: ``load_b(term, half)``: loads ``B[half]``.
        meanwhile: What is written between them, in equal shares.
    """
    have: dict[int, int] = {}
    share, rest = -(-len(meanwhile) // (len(products) * len(SUMS))), list(meanwhile)
    for terms in products:
        for register in SUMS:
            row, column = register // len(B), register % len(B)
            if have.get(B[column]) != terms[1]:
                load_b(terms[1], column)
            if have.get(A[row]) != terms[0]:
                load_a(terms[0], row)
            have |= {A[row]: terms[0], B[column]: terms[1]}
            for write in rest[:share]:
                write()
            del rest[:share]
            tiles.multiply_bf16(register, A[row], B[column])


def sizes_of(k: KernelText, memref: str) -> tuple[list[int], int]:
    """The sizes of a memref, of which only the first may be open: as 0, and the bytes of an element."""
    dims = re.findall(r"(\d+|\?)x", k.types[memref])
    assert "?" not in dims[1:], f"no addresses in {k.types[memref]}: only its first size may be open"
    return [0 if dim == "?" else int(dim) for dim in dims], k.element_bytes(memref)
