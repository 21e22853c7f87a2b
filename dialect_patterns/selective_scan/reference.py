"""SelectiveScan in numpy and float64, token by token; the oracle of the tests."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def reference(
    value: Array, step: Array, rate: Array, key: Array, query: Array, past_state: Array | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Output and present state, not rounded.

    Args:
        value: [B, T, D].
        step: [B, T, D].
        rate: [D, N].
        key: [B, T, N].
        query: [B, T, N].
        past_state: [B, D, N], zeros if None.
    """
    value, step, rate, key, query = (a.astype(np.float64) for a in (value, step, rate, key, query))
    batch, tokens, channels = value.shape
    state = np.zeros((batch, channels, rate.shape[1])) if past_state is None else past_state.astype(np.float64)
    output = np.zeros(value.shape)
    for t in range(tokens):
        written = value[:, t, :, None] * key[:, t, None, :]
        state = np.exp(step[:, t, :, None] * rate) * state + written
        output[:, t] = np.einsum("bdn,bn->bd", state, query[:, t])
    return output, state
