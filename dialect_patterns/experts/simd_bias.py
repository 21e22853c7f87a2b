"""The biases of an expert as kernels of strategy ``fused_simd`` add them: vectors of neighbouring columns of a part."""

from __future__ import annotations

from ..emit.kernel_text import Index, KernelText, vector_type


class Bias:
    """The bias of gate or factor.

    Args:
        k: Where to write.
        memref: [E, N], or None.
        layout: How the columns of the parts are mixed, as in the contract; ``plain`` for one part.
        part: Which part.
        columns: Of a part.
    """

    def __init__(self, k: KernelText, memref: str | None, layout: str, part: int, columns: int) -> None:
        self.k, self.memref, self.columns = k, memref, columns
        self.stride = 2 if layout == "interleaved" else 1
        self.offset = part * (columns if layout == "halves" else 1)

    def add(self, value: str, expert: Index, column: Index) -> str:
        """``value``, a scalar or vector of columns from ``column`` on, and its bias; beyond the last one anything."""
        k, lanes = self.k, self.k.lanes(value)
        if self.memref is None:
            return value
        if not lanes:
            return k.addf(value, self._one(expert, column))
        if self.columns % lanes:
            ones = [self._one(expert, k.add(column, lane)) for lane in range(lanes)]
            vector = vector_type(lanes)
            return k.addf(value, k.op(f"vector.from_elements {', '.join(ones)} : {vector}", vector))
        column = k.minimum(column, self.columns - lanes)
        if self.stride == 1:
            return k.addf(value, k.load(self.memref, [expert, k.add(column, self.offset)], lanes))
        start = k.mul(column, 2)
        low, high = (k.load(self.memref, [expert, k.add(start, at)], lanes) for at in (0, lanes))
        return k.addf(value, k.shuffle(low, high, [2 * lane + self.offset for lane in range(lanes)]))

    def _one(self, expert: Index, column: Index) -> str:
        k = self.k
        assert self.memref is not None
        place = k.add(k.mul(k.minimum(column, self.columns - 1), self.stride), self.offset)
        return k.load(self.memref, [expert, place])
