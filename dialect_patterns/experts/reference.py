"""MoE and QMoE in numpy, token by token in float64: what the operators mean. It rounds nothing.

Source: see ``contract``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .contract import Activation, Experts, Matrix

Array = NDArray[Any]
Wide = NDArray[np.float64]


def reference(contract: Experts, inputs: Sequence[Array | None]) -> Wide:
    """The operator in float64.

    Args:
        contract: What the node says.
        inputs: Its inputs, by number.

    Returns:
        The output, of the input's shape.
    """
    c = contract
    x, router = (_wide(inputs, port) for port in (0, 1))
    rows = x.reshape(-1, c.hidden)
    p = np.exp(router - router.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    weights = p if c.router_weights is None else _wide(inputs, c.router_weights)
    first, second = _layer(c.fc1, inputs), _layer(c.fc2, inputs)
    third = _layer(c.fc3, inputs) if c.fc3 is not None else None
    y = np.zeros((len(rows), c.fc2.columns))
    for t, row in enumerate(rows):
        chosen = np.argsort(-p[t, ::-1], kind="stable")[: c.chosen]
        chosen = c.count - 1 - chosen  # of equal ones the later
        w = weights[t, chosen]
        for e, weight in zip(chosen, w / w.sum() if c.normalise else w, strict=True):
            hidden = first[0][e] @ row + first[1][e]
            gate, factor = _parts(c.layout, hidden, None if third is None else third[0][e] @ row + third[1][e])
            y[t] += weight * (second[0][e] @ activate(c.activation, gate, factor) + second[1][e])
    return y.reshape(x.shape)


def activate(activation: Activation, gate: Wide, factor: Wide | None) -> Wide:
    """What is between the layers."""
    a, limit = activation, activation.limit
    if a.kind == "swiglu":
        assert factor is not None
        gate = gate if a.limit_after else np.minimum(gate, limit)
        gate = gate / (1 + np.exp(-a.alpha * gate))
        gate = np.minimum(gate, limit) if a.limit_after else gate
        return gate * (np.clip(factor, -limit, limit) + a.beta)
    if a.kind in ("gelu", "geglu"):
        value = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    elif a.kind == "silu":
        value = gate / (1 + np.exp(-gate))
    else:
        value = gate if a.kind == "identity" else np.maximum(gate, 0) ** (2 if a.kind == "relu2" else 1)
    return value if factor is None else value * factor


def dequantised(matrix: Matrix, inputs: Sequence[Array | None]) -> Wide:
    """The weights [E, N, K]."""
    m, stored = matrix, inputs[matrix.weights]
    assert stored is not None
    if not m.bits:
        return stored.astype(np.float64)
    scales = _wide(inputs, m.scales)
    count = len(stored)
    q = _unpacked(stored, m.bits).reshape(count, m.columns, m.blocks, m.block_size)
    zeros: Wide | float = float(1 << (m.bits - 1))
    packed = inputs[m.zeros] if m.zeros is not None else None
    if packed is not None and packed.ndim == 2:  # a byte of several columns' zero points
        zeros = _unpacked(packed, m.bits)[:, : m.columns].reshape(count, m.columns, 1, 1)
    elif packed is not None:
        zeros = _unpacked(packed, m.bits)[..., : m.blocks, None]
    return ((q - zeros) * scales.reshape(count, m.columns, m.blocks, 1)).reshape(count, m.columns, m.depth)


def _unpacked(packed: Array, bits: int) -> Wide:
    """Bytes as the numbers in them, low bits first."""
    parts = [(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, -1).reshape(*packed.shape[:-1], -1).astype(np.float64)


def _layer(matrix: Matrix, inputs: Sequence[Array | None]) -> tuple[Wide, Wide]:
    weights = dequantised(matrix, inputs)
    return weights, np.zeros(weights.shape[:2]) if matrix.bias is None else _wide(inputs, matrix.bias)


def _parts(layout: str, hidden: Wide, third: Wide | None) -> tuple[Wide, Wide | None]:
    if layout == "interleaved":
        return hidden[0::2], hidden[1::2]
    if layout == "halves":
        return hidden[: len(hidden) // 2], hidden[len(hidden) // 2 :]
    return hidden, third


def _wide(inputs: Sequence[Array | None], port: int | None) -> Wide:
    assert port is not None
    array = inputs[port]
    assert array is not None
    return array.astype(np.float64)
