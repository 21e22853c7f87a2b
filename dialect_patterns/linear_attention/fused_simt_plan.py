"""How the fused GPU kernel cuts LinearAttention into threads."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..emit.simt_kernel import Group
from ..target import Target
from .contract import LinearAttention

_THREADS = 128  # every Vulkan device has at least these
_REGISTERS = 128  # what a thread may hold of the state, and of loads under way
_WIDE = 4  # columns, or rows, of one load
_STEP_TILE = 32  # columns of a workgroup, of one token: a line of memory; half of them where there are few states
_ENOUGH_GROUPS = 100  # workgroups that keep a large GPU busy
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
        sharing: Subgroups that the lanes of a column lie in; of one token only.
    """

    lanes: int
    columns: int
    width: int
    loads: int
    threads: int
    prefetch: int
    block: int
    subgroup: int
    sharing: int = 1

    def slots(self, rows: int) -> int:
        """Values of a thread in one sum over the lanes, for that many query heads of a state."""
        return max(self.columns * self.block + self.block * (self.block - 1) // 2, self.columns * self.block * rows)

    @property
    def group(self) -> Group:
        """The threads of a workgroup."""
        return Group(self.threads, self.subgroup)

    @property
    def inside(self) -> int:
        """Threads of a subgroup that share a row, neighbours in columns."""
        return self.subgroup * self.sharing // self.lanes

    @property
    def tile(self) -> int:
        """Columns of a workgroup."""
        return self.threads // self.lanes * self.columns

    def __str__(self) -> str:
        return f"l{self.lanes}c{self.columns}t{self.threads}p{self.prefetch}b{self.block}g{self.subgroup}" + (
            f"s{self.sharing}" if self.sharing > 1 else ""
        )


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


def step_plan(c: LinearAttention, target: Target, tile: int) -> Plan | None:
    """The plan for one token: a thread has four columns of few rows, so that its loads are all under way at once.

    As many subgroups share ``tile`` columns as that takes. None where the sizes do not divide.
    """
    subgroup, across, rows = target.subgroup_size, tile // _WIDE, tile // _WIDE
    while across > 1 and across // 2 * _WIDE >= c.dv:
        across //= 2
    lanes = c.dk // rows
    threads = lanes * across
    if c.dk % rows or c.dv % _WIDE or subgroup % across or threads % subgroup or threads > target.max_threads:
        return None
    return Plan(lanes, _WIDE, _WIDE, rows // _WIDE, threads, 1, 1, subgroup, threads // subgroup)


def _narrow_step_plan(c: LinearAttention, target: Target) -> Plan | None:
    """The plan for one token within a subgroup."""
    subgroup = target.subgroup_size
    lanes, columns = min(8, subgroup), _WIDE
    while columns > 1 and c.dk // lanes * columns > target.thread_values:
        columns //= 2
    return make_plan(c, lanes, columns, subgroup * (_WIDE // columns), 1, 1, subgroup)


def plan_for(c: LinearAttention, target: Target) -> Plan | None:
    """The plan for a target, None if a thread could not hold its part of the state; sizes by measurement (H100)."""
    subgroup = target.subgroup_size
    if subgroup == 0:
        return make_plan(c, 8, 1, _THREADS, 2, 2, 0)
    if c.tokens == 1:
        wide = (c.batch or 1) * c.kv_heads * (c.dv // _STEP_TILE) >= _ENOUGH_GROUPS
        return step_plan(c, target, _STEP_TILE if wide else _STEP_TILE // 2) or _narrow_step_plan(c, target)
    # Decays a key dimension would have to be multiplied with each other before they meet the state and could overflow.
    block = 2 if c.decay == "key" else 4
    return make_plan(c, min(16, subgroup), 2, max(subgroup, 64), 4, block, subgroup)
