"""What a warp of an NVIDIA GPU (sm_80 and newer) does by instructions of its own: products from registers, copies.

``gpu.subgroup_mma_*`` (``Kernel.matrix_load``) hides where the elements of a matrix lie, so that whatever is done to
sums goes through the workgroup's memory. Here it is known: lane ``4 g + t`` of the sums [16, 8] has columns ``2 t`` and
``2 t + 1`` of row ``g``, then of row ``g + 8``. Instructions are PTX in ``llvm.inline_asm``, which IREE leaves as it
is; a word is an i32 with two numbers of 16 bits, the first one in the low half.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from iree.compiler import ir
from iree.compiler.dialects import arith

from .assembly import assembly
from .scalar import Scalar
from .simt_kernel import Buffer, Kernel

LANES = 32
"""Threads of a warp."""
Sums = list[ir.Value]
"""This lane's four elements of a matrix [16, 8] in f32."""


@dataclass(frozen=True)
class Source:
    """Where in a buffer to copy from.

    Attributes:
        buffer: The buffer.
        address: The place, as i64.
    """

    buffer: Buffer
    address: Scalar


@dataclass(frozen=True)
class ByLane:
    """A number that depends on the lane.

    Attributes:
        of: What it is for a lane, both i32.
        own: This lane's.
    """

    of: Callable[[Scalar], Scalar]
    own: Scalar


class Warp:
    """Emits the instructions.

    Args:
        k: Emits all others.
        half: Type of the factors: ``f16`` or ``bf16``.
        memory: The workgroup's memory, in chunks, that addresses are of.
    """

    def __init__(self, k: Kernel, half: str, memory: Buffer) -> None:
        self.k, self.half, self.memory = k, half, memory
        self.lane = k.thread().divide_unsigned(LANES)[1].to("i32")

    def by_lane(self, of: Callable[[Scalar], Scalar]) -> ByLane:
        """What ``of`` says of each lane, an i32 as the lane is."""
        return ByLane(of, of(self.lane))

    # ---- memory ----------------------------------------------------------------------------------------------------
    def shared_address(self) -> Scalar:
        """Where the workgroup's memory starts, as i32; offsets are bytes."""
        return self._pointer(self.memory).to("i32")

    def source(self, buffer: Buffer, offset: Scalar) -> Source:
        """So many bytes (i64) from the start of a buffer."""
        return Source(buffer, self._pointer(buffer).to("i64") + offset)

    def _pointer(self, buffer: Buffer) -> Scalar:
        operation = "memref.extract_aligned_pointer_as_index"
        return Scalar(ir.Operation.create(operation, results=[ir.IndexType.get()], operands=[buffer.value]).result)

    def copy(self, to: Scalar, to_offset: int, start: Source, offset: int, is_there: Scalar) -> None:
        """Begin to copy 16 bytes from a buffer to the workgroup's memory, or zeros; reads nothing then."""
        size = is_there.select(Scalar.constant(16, "i32"), Scalar.constant(0, "i32"))
        text = f"cp.async.cg.shared.global [$0 + {to_offset}], [$1 + {offset}], 16, $2;"
        assembly(text, "r,l,r,~{memory}", [to.value, start.address.value, size.value])

    def wait(self) -> None:
        """Wait for this thread's copies; others' are there after a barrier."""
        assembly("cp.async.wait_all;", "~{memory}")

    def meet(self, group: Scalar, warps: int) -> None:
        """Wait for the warps of a group, and what they wrote to the workgroup's memory."""
        number = (group + 1).to("i32")  # 0 is the workgroup's
        assembly(f"bar.sync $0, {warps * LANES};", "r,~{memory}", [number.value])

    def load_word(self, address: Scalar, offset: int = 0) -> ir.Value:
        """A word of the workgroup's memory."""
        text = f"ld.shared.b32 $0, [$1 + {offset}];"
        return assembly(text, "=r,r", [address.value], ["i32"])[0]

    def load_number(self, address: Scalar, offset: int = 0) -> ir.Value:
        """An f32 of the workgroup's memory."""
        text = f"ld.shared.f32 $0, [$1 + {offset}];"
        return assembly(text, "=f,r", [address.value], ["f32"])[0]

    def load_matrices(
        self, base: Scalar, rows: ByLane, xor: int, offset: int, *, transposed: bool = False
    ) -> list[ir.Value]:
        """Four matrices of 8 x 8 whose rows of 16 bytes each lane gives one address of, eight lanes a matrix.

        Args:
            base: An address.
            rows: What a lane adds to it,
            xor: after changing these bits of that.
            offset: What all add.
            transposed: Whether to transpose each matrix.

        Returns:
            Of each matrix this lane's word: of row ``g`` columns ``2 t`` and ``2 t + 1``, or where transposed, of
            column ``g`` rows ``2 t`` and ``2 t + 1``.
        """
        address = base + (rows.own ^ Scalar.constant(xor, "i32"))
        kind = "x4.trans" if transposed else "x4"
        text = f"ldmatrix.sync.aligned.m8n8.{kind}.shared.b16 {{$0, $1, $2, $3}}, [$4 + {offset}];"
        return assembly(text, "=r,=r,=r,=r,r", [address.value], ["i32"] * 4)

    # ---- matrices --------------------------------------------------------------------------------------------------
    def zero(self) -> Sums:
        """Sums of zero."""
        return [self.k.constant(0.0)] * 4

    def sums(self, values: Sequence[ir.Value]) -> Sums:
        """Sums from this lane's values."""
        return list(values)

    def values(self, sums: Sums) -> list[ir.Value]:
        """This lane's values."""
        return list(sums)

    def multiply_add(self, a: Sequence[ir.Value], b: Sequence[ir.Value], c: Sums) -> Sums:
        """``a b + c`` with a [16, 16] in four words and b [16, 8] in two: transposed halves of sums (:meth:`turn`)."""
        kind = f"f32.{self.half}.{self.half}.f32"
        text = (
            f"mma.sync.aligned.m16n8k16.row.col.{kind} "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
        )
        return assembly(text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [*a, *b, *c], ["f32"] * 4, is_pure=True)

    def turn(self, words: Sequence[ir.Value]) -> list[ir.Value]:
        """Matrices of 8 x 8 with row ``g``, columns ``2 t`` and ``2 t + 1`` in each lane's word, transposed."""
        text = "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;"
        return [assembly(text, "=r,r", [word], ["i32"])[0] for word in words]

    def pair(self, low: ir.Value, high: ir.Value) -> ir.Value:
        """Two f32, rounded, as a word."""
        return assembly(f"cvt.rn.{self.half}x2.f32 $0, $1, $2;", "=r,f,f", [high, low], ["i32"], is_pure=True)[0]

    def parts(self, word: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The two numbers of a word, in f32."""
        if self.half == "f16":
            single = ir.Operation.create(
                "vector.broadcast", results=[ir.Type.parse("vector<1xi32>")], operands=[word]
            ).result
            pair = ir.Type.parse("vector<2xf16>")
            halves = ir.Operation.create("vector.bitcast", results=[pair], operands=[single]).result
            low, high = self.k.elements(arith.ExtFOp(self.k.type(2), halves).result)
            return low, high
        bits = Scalar(word)
        shifted = arith.ShLIOp(word, Scalar.constant(16, "i32").value).result
        masked = (bits & Scalar.constant(-(1 << 16), "i32")).value
        f32 = self.k.type(1)
        return arith.BitcastOp(f32, shifted).result, arith.BitcastOp(f32, masked).result

    # ---- over the lanes --------------------------------------------------------------------------------------------
    def largest(self, bits: Scalar) -> Scalar:
        """The largest i32, none of them negative, of all lanes."""
        text = "redux.sync.max.u32 $0, $1, 0xffffffff;"
        return Scalar(assembly(text, "=r,r", [bits.value], ["i32"])[0])

    def add_rows(self, value: ir.Value) -> ir.Value:
        """The sum over the lanes with the same columns, for all of them."""
        for offset in (4, 8, 16):
            value = self.k.add(value, self.k.shuffle_xor(value, offset))
        return value
