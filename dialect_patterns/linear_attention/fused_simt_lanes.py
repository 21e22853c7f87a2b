"""Products and sums that the lanes of a column share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir

from ..emit.scalar import Scalar
from ..emit.simt_kernel import Buffer, Kernel
from .fused_simt_plan import Plan


@dataclass(frozen=True)
class Lanes:
    """A thread among those of its column.

    Attributes:
        k: Emits instructions.
        p: The work of a thread.
        lane: This thread's number among the lanes.
        place: The column's number in the workgroup.
        scratch: The workgroup's memory, for targets without subgroup operations.
        rows: Query heads of a state.
        alternate: Whether sums of use 0 and 1 take turns; else all are of one use, and blocks take turns.
    """

    k: Kernel
    p: Plan
    lane: Scalar
    place: Scalar
    scratch: Buffer | None
    rows: int
    alternate: bool

    def scatter(self, reads: list[ir.Value]) -> tuple[list[ir.Value], Scalar, int]:
        """Halve the values while doubling the sums in them: a lane keeps one half and gives the other one away.

        Returns:
            The values, the index of the first of them, and how many lanes still share them.
        """
        k, lanes, index = self.k, self.p.lanes, Scalar.constant(0, "index")
        while lanes > 1 and len(reads) % 2 == 0:
            lanes, half = lanes // 2, len(reads) // 2
            upper = (self.lane & lanes) > 0
            index = index + upper.select(Scalar.constant(half, "index"), Scalar.constant(0, "index"))
            offset = lanes * self.p.inside
            halves = list(zip(reads[:half], reads[half:], strict=True))
            kept = [k.select(upper, second, first) for first, second in halves]
            given = [k.select(upper, first, second) for first, second in halves]
            reads = [
                k.add(mine, k.join([k.shuffle_xor(e, offset) for e in k.elements(theirs)]))
                for mine, theirs in zip(kept, given, strict=True)
            ]
        return reads, index, lanes

    def dot(self, factors: Sequence[ir.Value], state: Sequence[ir.Value]) -> ir.Value:
        """This thread's part of a product; in a few sums, which do not wait for each other."""
        k, width = self.k, len(self.k.elements(state[0]))
        chains = max(1, min(4 // width, len(state) // 4))
        sums: list[ir.Value] = []
        for i, (f, s) in enumerate(zip(factors, state, strict=True)):
            if i < chains:
                sums.append(k.mul(f, s))
            else:
                sums[i % chains] = k.fma(f, s, sums[i % chains])
        while len(sums) > 1:
            sums = [k.add(sums[i], sums[i + 1]) if i + 1 < len(sums) else sums[i] for i in range(0, len(sums), 2)]
        return sums[0]

    def sum(self, parts: Sequence[ir.Value], use: int, turn: Scalar, lanes: int | None = None) -> list[ir.Value]:
        """Each part summed over the lanes (or the ``lanes`` that still share it); every lane gets the sums.

        ``turn`` is one more in each block than in the one before.
        """
        lanes = self.p.lanes if lanes is None else lanes
        if lanes == 1:
            return list(parts)
        k, split = self.k, [self.k.elements(part) for part in parts]
        values = [element for elements in split for element in elements]
        if self.p.subgroup == 0:
            values = self._sum_in_memory(values, use, turn)
        else:
            offset = inside = self.p.inside
            while offset < inside * (lanes // self.p.sharing):
                values = [k.add(value, k.shuffle_xor(value, offset)) for value in values]
                offset *= 2
        rest = iter(values)
        return [k.join([next(rest) for _ in elements]) for elements in split]

    def _sum_in_memory(self, values: Sequence[ir.Value], use: int, turn: Scalar) -> list[ir.Value]:
        """Through the workgroup's memory.

        Two halves take turns, so that one barrier a sum is enough: who still reads one half is waited for at the
        barrier of the other.
        """
        k, p = self.k, self.p
        across, region = p.threads // p.lanes, self.p.slots(self.rows) * p.threads
        assert self.scratch is not None
        base = Scalar.constant(use * region, "index") if self.alternate else (turn & 1) * region
        for i, value in enumerate(values):
            k.store(value, self.scratch, base + i * p.threads + self.lane * across + self.place)
        k.barrier()
        sums: list[ir.Value] = []
        for i in range(len(values)):
            start = base + i * p.threads + self.place
            found = [k.load(self.scratch, start + lane * across) for lane in range(p.lanes)]
            while len(found) > 1:
                found = [k.add(found[j], found[j + 1]) for j in range(0, len(found), 2)]
            sums.append(found[0])
        return sums
