"""GatherBlockQuantized in numpy, in float64: what the operator means. The oracle of the tests; it rounds nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def reference(
    data: NDArray[np.uint8],
    indices: NDArray[np.integer[Any]],
    scales: NDArray[Any],
    zero_points: NDArray[np.uint8] | None = None,
    *,
    bits: int,
    block_size: int,
) -> NDArray[np.float64]:
    """The rows that the indices name.

    Args:
        data: [D, L..., K * bits / 8], packed.
        indices: Of any shape; outside -D to D - 1 the result is 0.
        scales: [D, L..., blocks].
        zero_points: [D, L..., bytes], packed; 2 ** (bits - 1) if None.
        bits: Bits of a weight.
        block_size: Weights that share a scale.
    """
    q = _unpacked(data, bits)
    zeros = np.full(scales.shape, 1 << (bits - 1), np.float64)
    if zero_points is not None:
        zeros = _unpacked(zero_points, bits)[..., : scales.shape[-1]]
    zeros, scale = (
        np.repeat(each, block_size, axis=-1)[..., : q.shape[-1]] for each in (zeros, scales.astype(np.float64))
    )
    table = (q - zeros) * scale
    inside = (indices >= -len(table)) & (indices < len(table))
    rows = table[np.where(inside, indices, 0)]
    return np.where(inside.reshape(*inside.shape, *[1] * (rows.ndim - inside.ndim)), rows, 0.0)


def _unpacked(packed: NDArray[np.uint8], bits: int) -> NDArray[np.float64]:
    fields = packed[..., None] >> np.arange(0, 8, bits, dtype=np.uint8) & (1 << bits) - 1
    return fields.reshape(*packed.shape[:-1], -1).astype(np.float64)
