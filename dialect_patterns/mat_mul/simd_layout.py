"""How strategy ``fused_simd`` packs weights: panels of columns, each [K, columns] in the order in which kernels read.

A module for one machine has panels as wide as its kernels' (two vectors). One for several vector widths stores its
weights once, in panels of 16 columns: those of 256 bits. Kernels of 512 bits read two of them side by side, as two
streams, kernels of 128 bits half of one: both cost less than a panel of 32 columns costs the kernels of 256 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..emit.kernel_text import Index, KernelText
from ..target import Target


@dataclass(frozen=True)
class Layout:
    """Panels of weights.

    Attributes:
        width: Columns of a panel.
        multiple: Columns are filled up with zeros to a multiple of this.
    """

    width: int
    multiple: int

    @property
    def name(self) -> str:
        """Word for the layout."""
        return f"panels{self.width}" + (f"x{self.multiple // self.width}" if self.multiple > self.width else "")

    def panels(self, columns: int) -> int:
        """Panels of so many columns."""
        return -(-columns // self.multiple) * self.multiple // self.width

    def pack(self, weights: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """[K, N] as [panels, K, width]."""
        depth, columns = weights.shape
        packed = np.zeros((self.panels(columns), depth, self.width), weights.dtype)
        whole = columns // self.width
        packed[:whole] = weights[:, : whole * self.width].reshape(depth, whole, self.width).transpose(1, 0, 2)
        if columns % self.width:
            packed[whole, :, : columns % self.width] = weights[:, whole * self.width :]
        return packed

    def place(self, k: KernelText, width: int, panel: Index, column: int) -> tuple[Index, Index]:
        """Panel and column in memory of a column of a kernel's panel.

        Args:
            k: Where to write.
            width: Columns of the kernel's panels; it divides this layout's, or is a multiple of it.
            panel: The kernel's panel.
            column: Counted from the start of that.
        """
        if width > self.width:
            return k.add(k.mul(panel, width // self.width), column // self.width), column % self.width
        share = self.width // width
        return k.div(panel, share), k.add(k.mul(k.rem(panel, share), width), column)

    def starts(self, width: int) -> range:
        """Columns of a kernel's panel with which panels in memory start, at least the first."""
        return range(0, width, self.width)


@dataclass(frozen=True)
class PairLayout(Layout):
    """Panels of words of 32 bits: two bf16 of a column, one above the other in the matrix."""

    @property
    def name(self) -> str:
        """Word for the layout."""
        return f"{super().name}pairs"

    def pack(self, weights: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """[K, N] of 16 bits as [panels, K / 2, width] of 32 bits; an odd K ends with a zero."""
        depth, columns = weights.shape
        pairs = np.zeros((-(-depth // 2), columns, 2), np.uint16)
        halves = weights.view(np.uint16)
        pairs[:, :, 0] = halves[::2]
        pairs[: depth // 2, :, 1] = halves[1::2]
        return super().pack(pairs.view(np.int32)[:, :, 0])


SHARED = Layout(16, 32)
"""Of modules for several vector widths, up to 512 bits."""


def layout(target: Target, width: int) -> Layout:
    """How weights lie for a machine with kernels for panels of ``width`` columns."""
    return SHARED if target.shares_weights else Layout(width, width)
