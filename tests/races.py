"""Finds races in the GPU kernels as they are emitted: memory of a workgroup that a thread writes and another one reads
with no barrier between. Lavapipe runs a workgroup's threads in one order and shows none of them.

Interprets a kernel's integers for all threads of the first workgroup at once; what is computed from data is not known:
both ways of a condition on it are followed, and places computed from it are not looked at.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from iree.compiler import ir

Threads = np.ndarray
Known = Threads | None
"""A value of every thread; None: not known."""

_BINARY: dict[str, Callable[[Threads, Threads], Threads]] = {
    "arith.addi": np.add,
    "arith.subi": np.subtract,
    "arith.muli": np.multiply,
    "arith.divui": np.floor_divide,
    "arith.ceildivui": lambda a, b: -(-a // b),
    "arith.remui": np.remainder,
    "arith.andi": np.bitwise_and,
    "arith.ori": np.bitwise_or,
    "arith.xori": np.bitwise_xor,
    "arith.shli": np.left_shift,
    "arith.shrui": np.right_shift,
    "arith.minui": np.minimum,
    "arith.minsi": np.minimum,
    "arith.maxui": np.maximum,
    "arith.maxsi": np.maximum,
}
_PASSED = {"arith.index_cast", "arith.index_castui", "arith.extui", "arith.extsi", "arith.trunci", "util.assume.int"}
_COMPARED = [np.equal, np.not_equal, *[np.less, np.less_equal, np.greater, np.greater_equal] * 2]
"""By the number of arith's predicate; indices are not negative."""


class _Run:
    """One workgroup's run of a kernel."""

    def __init__(self, threads: int, numbers: Mapping[int, int]) -> None:
        self.threads, self.numbers = threads, numbers
        self.values: dict[Any, Known] = {}
        self.mask = np.ones(threads, bool)
        self.found: list[str] = []
        self._forget()

    def _forget(self) -> None:
        self.written: dict[Any, list[Threads]] = defaultdict(list)
        self.read: dict[Any, list[Threads]] = defaultdict(list)

    def get(self, value: ir.Value) -> Known:
        return self.values.get(value)

    def block(self, block: ir.Block) -> list[Known]:
        """Runs the operations; what the last one yields."""
        for op in block.operations:
            if op.operation.name in ("scf.yield", "scf.condition", "func.return"):
                return [self.get(value) for value in op.operation.operands]
            self.operation(op.operation)
        return []

    def operation(self, op: ir.Operation) -> None:
        name, operands = op.name, [self.get(value) for value in op.operands]
        results: list[Known] = [None] * len(op.results)
        if name == "scf.for":
            results = self._loop(op, operands)
        elif name == "scf.while":
            self._repeat(op)
        elif name == "scf.if":
            results = self._branch(op, operands[0])
        elif name == "gpu.barrier":
            if not self.mask.all():
                self.found.append("a barrier that not all threads reach")
            self._check()
        elif name in ("memref.load", "memref.store"):
            self._access(op, name == "memref.store")
        elif name == "arith.constant":
            value = op.attributes["value"]
            if isinstance(value, ir.IntegerAttr):
                results = [np.full(self.threads, int(value.value))]
        elif name == "gpu.thread_id":
            results = [np.arange(self.threads)]
        elif name == "hal.interface.workgroup.id":
            results = [np.zeros(self.threads, int)]
        elif name == "hal.interface.constant.load":
            results = [np.full(self.threads, self.numbers[int(ir.IntegerAttr(op.attributes["ordinal"]).value)])]
        elif name in _BINARY and None not in [None if value is None else 0 for value in operands]:
            results = [_BINARY[name](*operands)]  # type: ignore[arg-type]
        elif name in _PASSED:
            results = [operands[0]]
        elif name == "arith.cmpi" and operands[0] is not None and operands[1] is not None:
            predicate = _COMPARED[int(ir.IntegerAttr(op.attributes["predicate"]).value)]
            results = [predicate(operands[0], operands[1])]
        elif name == "arith.select" and all(value is not None for value in operands):
            results = [np.where(*operands)]  # type: ignore[arg-type]
        self.values.update(zip(op.results, results, strict=True))

    def _loop(self, op: ir.Operation, operands: list[Known]) -> list[Known]:
        bounds, carried = operands[:3], operands[3:]
        first, stop, step = bounds
        block, before = op.regions[0].blocks[0], self.mask
        if first is None or stop is None or step is None:  # computed from data: twice, to see one turn after another
            for _ in range(2):
                self.values.update(dict.fromkeys(block.arguments, None))
                self.block(block)
            return [None] * len(carried)
        index = first
        while (before & (index < stop)).any():
            self.mask = before & (index < stop)
            self.values.update(zip(block.arguments, [index, *carried], strict=True))
            following = self.block(block)
            carried = [
                None if old is None or new is None else np.where(self.mask, new, old)
                for old, new in zip(carried, following, strict=True)
            ]
            index = index + step
        self.mask = before
        return carried

    def _repeat(self, op: ir.Operation) -> None:
        """A loop whose end is computed from data: twice, to see one turn after another, and its condition once more."""
        before, after = (region.blocks[0] for region in op.regions)
        for block in (before, after, before, after, before):
            self.values.update(dict.fromkeys(block.arguments, None))
            self.block(block)

    def _branch(self, op: ir.Operation, condition: Known) -> list[Known]:
        before, results = self.mask, list[list[Known]]()
        for number, region in enumerate(op.regions):
            if len(list(region.blocks)) == 0:
                continue
            taken = before if condition is None else before & (condition.astype(bool) ^ bool(number))
            self.mask = taken
            results.append(self.block(region.blocks[0]) if taken.any() else [None] * len(op.results))
        self.mask = before
        if len(results) < 2 or condition is None:
            return [None] * len(op.results)
        return [
            None if one is None or other is None else np.where(condition, one, other)
            for one, other in zip(*results, strict=True)
        ]

    def _access(self, op: ir.Operation, is_store: bool) -> None:
        memory, *indices = list(op.operands)[1 if is_store else 0 :]
        if "workgroup" not in str(memory.type):
            return
        (at,) = [self.get(index) for index in indices]
        if at is None:  # a rank of data, say
            return
        seen = self.written if is_store else self.read
        seen[memory].append(np.stack([at, np.arange(self.threads)])[:, self.mask])

    def _check(self) -> None:
        """What came since the last barrier."""
        for memory, stores in self.written.items():
            if self.read[memory]:
                written, read = np.concatenate(stores, 1), np.concatenate(self.read[memory], 1)
                size = 1 + max(int(written[0].max()), int(read[0].max()))
                (first, last), (low, high) = _ends(written, size), _ends(read, size)
                bad = (last >= 0) & (high >= 0) & (np.minimum(first, low) != np.maximum(last, high))
                self.found += [f"[{at}] written by {first[at]}, read by {high[at]}" for at in np.flatnonzero(bad)[:3]]
        self._forget()


def _ends(accesses: Threads, size: int) -> tuple[Threads, Threads]:
    """The first and the last thread at each place; the last is -1 where there is none."""
    first, last = np.full(size, 1 << 30), np.full(size, -1)
    np.minimum.at(first, accesses[0], accesses[1])
    np.maximum.at(last, accesses[0], accesses[1])
    return first, last


def races(module: ir.Module, numbers: Mapping[int, int] | None = None) -> list[str]:
    """What is wrong with the kernels of a lowered module, a line each; nothing is well.

    Args:
        module: With its kernels as `hal.executable.source`.
        numbers: What the dispatch gives, by ordinal.
    """
    found: list[str] = []
    kernels = 0

    def visit(op: ir.Operation) -> ir.WalkResult:
        nonlocal kernels
        if op.name == "func.func" and "translation_info" in op.attributes:
            text = str(op.attributes["translation_info"])
            threads = int(text.partition("workgroup_size = [")[2].partition(",")[0])
            run = _Run(threads, {} if numbers is None else numbers)
            run.block(op.regions[0].blocks[0])
            run._check()
            found.extend(f"{ir.StringAttr(op.attributes['sym_name']).value}: {line}" for line in run.found[:3])
            kernels += 1
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    assert kernels, "no kernel to look at"
    return found


def races_in(text: str) -> list[str]:
    """The same for the text of a module; the dispatch gives 136 for every size, no multiple of a chunk or tile."""
    context = ir.Context()
    context.load_all_available_dialects()
    with context:
        return races(ir.Module.parse(text), defaultdict(lambda: 136))
