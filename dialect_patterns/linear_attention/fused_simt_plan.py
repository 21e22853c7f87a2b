"""How the fused GPU kernel cuts LinearAttention into threads."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..emit.simt_kernel import Group
from ..target import Target
from .contract import LinearAttention

_THREADS = 128  # every Vulkan device has at least these
_REGISTERS = 128  # what a thread may hold of the state, and of loads under way
MAX_ROWS = 8  # query heads of one state


@dataclass(frozen=True)
class Plan:
    """The work of a thread: ``rows`` x ``columns`` elements of one state.

    The ``lanes`` threads of a column each hold every lanes-th group of ``width`` rows.

    Attributes:
        lanes: Threads that share a column.
        columns: Neighbouring columns of a thread.
        width: Elements of one load of query or key.
        loads: Loads of a key for a thread.
        threads: Threads of a workgroup.
        prefetch: Tokens whose loads are under way.
        block: Tokens whose reads of the state share one sum over the lanes; divides ``prefetch``.
        subgroup: Threads of a subgroup, 0 to do without its operations.
    """

    lanes: int
    columns: int
    width: int
    loads: int
    threads: int
    prefetch: int
    block: int
    subgroup: int

    def slots(self, rows: int) -> int:
        """Values of a thread in one sum over the lanes, for that many query heads of a state."""
        return max(self.columns * self.block + self.block * (self.block - 1) // 2, self.columns * self.block * rows)

    @property
    def group(self) -> Group:
        """The threads of a workgroup."""
        return Group(self.threads, self.subgroup)

    @property
    def tile(self) -> int:
        """Columns of a workgroup."""
        return self.threads // self.lanes * self.columns

    def __str__(self) -> str:
        return f"l{self.lanes}c{self.columns}t{self.threads}p{self.prefetch}b{self.block}g{self.subgroup}"


def make_plan(
    c: LinearAttention, lanes: int, columns: int, threads: int, prefetch: int, block: int, subgroup: int
) -> Plan | None:
    """The plan with at most so many lanes, columns, threads and tokens at once; None if there is none."""
    width = next(w for w in (4, 2, 1) if c.dk % w == 0)
    while c.dk % (width * lanes):
        lanes //= 2
    while c.dv % columns or (columns > 1 and c.dk // lanes * columns > _REGISTERS):
        columns //= 2
    if c.dk // lanes * columns > _REGISTERS:
        return None
    if subgroup == 0:  # no more threads than columns need
        while threads > lanes and threads // lanes * columns >= 2 * c.dv:
            threads //= 2
    else:
        while threads > subgroup and threads // lanes * columns > c.dv:
            threads //= 2
    values = c.dk // lanes * (1 + c.rows + (c.decay == "key")) + columns + 2
    while prefetch > 1 and prefetch * values > _REGISTERS:
        prefetch //= 2
    if c.tokens is not None:
        prefetch = min(prefetch, max(c.tokens, 1))
    block = math.gcd(block, prefetch)
    return Plan(lanes, columns, width, c.dk // (lanes * width), max(threads, lanes), prefetch, block, subgroup)


def plan_for(c: LinearAttention, target: Target) -> Plan | None:
    """The plan for a target, None if a thread could not hold its part of the state; sizes by measurement (H100)."""
    subgroup = target.subgroup_size
    if subgroup == 0:
        return make_plan(c, 8, 1, _THREADS, 2, 2, 0)
    if c.tokens == 1:  # wide loads of the state count: 16 columns a workgroup
        lanes, columns = min(8, subgroup), 4
        while columns > 1 and c.dk // lanes * columns > target.thread_values:
            columns //= 2
        return make_plan(c, lanes, columns, subgroup * (4 // columns), 1, 1, subgroup)
    # Decays a key dimension would have to be multiplied with each other before they meet the state and could overflow.
    block = 2 if c.decay == "key" else 4
    return make_plan(c, min(16, subgroup), 2, max(subgroup, 64), 4, block, subgroup)
