"""CausalConvWithState in numpy and float64: what the operator means, for both domains.

    padded  = concat(past_state, input)                    along the sequence
    y_t     = bias + sum_j weight_j * padded_{t + j * dilation}
    output  = y or silu(y);  present_state = the last (k - 1) * dilation columns of padded

The oracle of the tests; it rounds nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]


def reference(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    past_state: Array | None = None,
    *,
    activation: str = "none",
    dilation: int = 1,
    channels_last: bool = False,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The operator in float64.

    Args:
        x: [B, C, T], or [B, T, d_1, ..., d_n] with ``channels_last``.
        weight: [C, 1, k].
        bias: [C], zeros if None.
        past_state: [B, C, (k - 1) * dilation] (or sequence first), zeros if None.
        activation: ``none``, ``silu`` or ``swish``.
        dilation: Tokens between two taps.
        channels_last: Whether the sequence comes before the channels.

    Returns:
        Output like ``x`` and present state, not rounded.
    """
    if channels_last:
        trailing = x.shape[2:]
        flat = [
            None if a is None else a.reshape(*a.shape[:2], int(np.prod(a.shape[2:]))).transpose(0, 2, 1)
            for a in (x, past_state)
        ]
        assert flat[0] is not None
        results = reference(flat[0], weight, bias, flat[1], activation=activation, dilation=dilation)
        out, present = (r.transpose(0, 2, 1).reshape(r.shape[0], r.shape[2], *trailing) for r in results)
        return out, present
    batch, channels, tokens = x.shape
    taps = weight.shape[2]
    length = (taps - 1) * dilation
    past = np.zeros((batch, channels, length)) if past_state is None else past_state.astype(np.float64)
    padded = np.concatenate([past, x.astype(np.float64)], axis=2)
    y = np.zeros((batch, channels, tokens))
    for j in range(taps):
        start = j * dilation
        y += weight[:, 0, j, None].astype(np.float64) * padded[:, :, start : start + tokens]
    if bias is not None:
        y += bias[:, None].astype(np.float64)
    if activation != "none":
        y = y / (1.0 + np.exp(-y))
    return y, padded[:, :, padded.shape[2] - length :]
