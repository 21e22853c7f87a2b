"""LinearAttention in numpy, token by token in float64: what the operator means, for both domains.

    S <- exp(g) * S                  rows of S where g is per key dimension; no g: linear, delta
    u  = beta * (v - k S)            no beta: u = v (linear, gated)
    S <- S + k^T u
    o  = scale * q S

The oracle of the tests; it rounds nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def reference(
    query: Array,
    key: Array,
    value: Array,
    past_state: Array | None = None,
    decay: Array | None = None,
    beta: Array | None = None,
    *,
    q_num_heads: int,
    kv_num_heads: int,
    scale: float = 0.0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The operator in float64; the update rule follows from which of decay and beta are given.

    Args:
        query: [B, T, Hq * dk].
        key: [B, T, Hk * dk]; Hk may be a divisor of Hkv (com.microsoft).
        value: [B, T, Hkv * dv].
        past_state: [B, Hkv, dk, dv], zeros if None.
        decay: Log decay, [B, T, Hkv] or [B, T, Hkv * dk].
        beta: Update rate, [B, T, Hkv] or [B, T, 1].
        q_num_heads: Hq, a multiple or (com.microsoft) a divisor of Hkv.
        kv_num_heads: Hkv.
        scale: Factor of the output; 0 means 1 / sqrt(dk).

    Returns:
        Output [B, T, max(Hq, Hkv) * dv] and present state [B, Hkv, dk, dv], not rounded.
    """
    batch, tokens = query.shape[:2]
    dk, dv = query.shape[2] // q_num_heads, value.shape[2] // kv_num_heads
    out_heads = max(q_num_heads, kv_num_heads)

    def heads(x: Array, size: int, count: int) -> NDArray[np.float64]:
        """[B, T, n * size] as [T, B, count, size], each head repeated count / n times."""
        x = x.astype(np.float64).reshape(batch, tokens, x.shape[2] // size, size)
        return np.repeat(x, count // x.shape[2], axis=2).transpose(1, 0, 2, 3)

    q, k, v = heads(query, dk, out_heads), heads(key, dk, kv_num_heads), heads(value, dv, kv_num_heads)
    state = np.zeros((batch, kv_num_heads, dk, dv)) if past_state is None else past_state.astype(np.float64)
    a = None if decay is None else np.exp(heads(decay, decay.shape[2] // kv_num_heads, kv_num_heads))
    rate = None if beta is None else heads(beta, 1, kv_num_heads)
    output = np.empty((tokens, batch, out_heads, dv))
    for t in range(tokens):
        if a is not None:
            state = state * a[t][..., None]
        u = v[t]
        if rate is not None:
            u = rate[t] * (u - np.einsum("bhd,bhde->bhe", k[t], state))
        state = state + k[t][..., :, None] * u[..., None, :]
        read = np.repeat(state, out_heads // kv_num_heads, axis=1)
        output[t] = np.einsum("bhd,bhde->bhe", q[t], read)
    output *= scale or 1.0 / np.sqrt(dk)
    return output.transpose(1, 0, 2, 3).reshape(batch, tokens, out_heads * dv), state
