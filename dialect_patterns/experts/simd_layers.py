"""How strategy ``fused_simd`` multiplies by an expert's weights where those are floats: sizes, and how weights lie.

All experts' matrices are packed as those of MatMul are, one after the other: [E x parts x panels, K, W]. Gate and
factor that fc1 has together are two parts, whatever way it mixes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..emit.workers import slowest_share
from ..mat_mul.simd_layout import Layout
from ..mat_mul.simd_plan import Plan, best_tile, longest_chunk, panel_layout, plan
from ..node import TensorSpec
from ..target import Target
from .contract import Experts, Matrix

_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
_START_BYTES = 1 << 13  # of weights that would take as long as the start of a workgroup
_MOST_BYTES = 1 << 19  # of weights of a workgroup


@dataclass(frozen=True)
class Layer:
    """One layer of all experts.

    Attributes:
        matrix: Its weights.
        experts: E.
        columns: Of a part.
        layout: How the columns of the parts are mixed in the model, as in the contract; ``plain`` for one part.
    """

    matrix: Matrix
    experts: int
    columns: int
    layout: str

    @property
    def parts(self) -> int:
        """Matrices of an expert."""
        return 1 if self.layout == "plain" else 2

    def direct(self, target: Target, assignments: int) -> Plan:
        """The sizes for one row and each of ``assignments`` experts."""
        m = self.matrix
        p = plan(1, m.depth, self.columns, target, panel_layout(target), _BYTES[m.dtype])
        each = m.depth * p.width * _BYTES[m.dtype] * self.parts
        most = min(p.panels, max(1, _MOST_BYTES // each))

        def slowest(group: int) -> float:
            return slowest_share(-(-p.panels // group) * assignments, _START_BYTES + group * each)

        return replace(p, group=min(range(1, most + 1), key=slowest))

    def tiled(self, target: Target, rows: int | None) -> Plan:
        """The sizes for tiles of rows of one expert each; ``rows`` of all, None where open."""
        m = self.matrix
        p = plan(None, m.depth, self.columns, target, panel_layout(target), _BYTES[m.dtype])
        width = p.layout.multiple
        p = replace(p, columns=self.parts * -(-self.columns // width) * width)
        if rows is None:
            return p
        tile = best_tile(-(-rows // min(self.experts, rows)), p.tile)
        return replace(p, tile=tile, chunk=longest_chunk(tile, p.width))

    def panels(self, p: Plan) -> int:
        """Panels of a kernel for one part."""
        return p.layout.panels(self.columns) * p.layout.width // p.width

    def packed(self, layout: Layout) -> TensorSpec:
        """The type of the packed weights."""
        count = self.experts * self.parts * layout.panels(self.columns)
        return TensorSpec((count, self.matrix.depth, layout.width), self.matrix.dtype)

    def pack(self, layout: Layout) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
        """What packs the weights [E, N, K]."""

        def pack(weights: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            parts = columns_of(weights, self.layout)
            found = [layout.pack(part[e].T) for e in range(self.experts) for part in parts]
            return np.concatenate(found)

        return pack


def columns_of(array: np.ndarray[Any, Any], layout: str) -> list[np.ndarray[Any, Any]]:
    """The parts of fc1's columns, which are dimension 1."""
    if layout == "interleaved":
        return [array[:, 0::2], array[:, 1::2]]
    if layout == "halves":
        half = array.shape[1] // 2
        return [array[:, :half], array[:, half:]]
    return [array]


def first_layers(c: Experts) -> list[Layer]:
    """What is multiplied with the tokens: fc1 with one part or two, and fc3."""
    mixed = c.layout if c.layout in ("interleaved", "halves") else "plain"
    layers = [Layer(c.fc1, c.count, c.inner, mixed)]
    return layers if c.fc3 is None else [*layers, Layer(c.fc3, c.count, c.inner, "plain")]


def second_layer(c: Experts) -> Layer:
    """What is multiplied with what is between the layers."""
    return Layer(c.fc2, c.count, c.hidden, "plain")
