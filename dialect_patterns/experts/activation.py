"""What is between the two layers of an expert, for linalg and GPU kernels (scalars) and for CPU kernels (vectors).

swiglu   min(g, limit) sigmoid(alpha min(g, limit)) (clamp(l, limit) + beta)
gelu     g sigmoid(2 sqrt(2 / pi) (g + 0.044715 g^3)), which is its tanh form
"""

from __future__ import annotations

import math

from ..emit.kernel_text import KernelText
from ..emit.scalar import Scalar
from .contract import Activation

_CUBIC = 0.044715
_SLOPE = 2 * math.sqrt(2 / math.pi)


def activate(a: Activation, gate: Scalar, factor: Scalar | None) -> Scalar:
    """The activated f32 scalar."""
    if a.kind == "swiglu":
        assert factor is not None
        limited = math.isfinite(a.limit)
        gate = gate.minimum(a.limit) if limited and not a.limit_after else gate
        value = gate * (gate if a.alpha == 1.0 else gate * a.alpha).sigmoid()
        value = value.minimum(a.limit) if limited and a.limit_after else value
        factor = factor.minimum(a.limit).maximum(-a.limit) if limited else factor
        return value * (factor if a.beta == 0.0 else factor + a.beta)
    if a.kind in ("gelu", "geglu"):
        value = gate * ((gate + gate * gate * gate * _CUBIC) * _SLOPE).sigmoid()
    elif a.kind == "silu":
        value = gate.silu()
    elif a.kind == "identity":
        value = gate
    else:
        value = gate.maximum(0.0)
        value = value * value if a.kind == "relu2" else value
    return value if factor is None else value * factor


def activate_text(k: KernelText, a: Activation, gate: str, factor: str | None) -> str:
    """The activated f32 scalar or vector of a CPU kernel."""
    dtype = k.types[gate]

    def number(value: float) -> str:
        return k.constant(value, dtype)

    def sigmoid(value: str) -> str:
        return k.divf(number(1.0), k.addf(number(1.0), k.exp(k.negate(value))))

    if a.kind == "swiglu":
        assert factor is not None
        limited = math.isfinite(a.limit)
        gate = k.minf(gate, number(a.limit)) if limited and not a.limit_after else gate
        value = k.mulf(gate, sigmoid(gate if a.alpha == 1.0 else k.mulf(gate, number(a.alpha))))
        value = k.minf(value, number(a.limit)) if limited and a.limit_after else value
        factor = k.maxf(k.minf(factor, number(a.limit)), number(-a.limit)) if limited else factor
        return k.mulf(value, factor if a.beta == 0.0 else k.addf(factor, number(a.beta)))
    if a.kind in ("gelu", "geglu"):
        cube = k.mulf(k.mulf(gate, gate), k.mulf(gate, number(_CUBIC)))
        value = k.mulf(gate, sigmoid(k.mulf(k.addf(gate, cube), number(_SLOPE))))
    elif a.kind == "silu":
        value = k.mulf(gate, sigmoid(gate))
    elif a.kind == "identity":
        value = gate
    else:
        value = k.maxf(gate, number(0.0))
        value = k.mulf(value, value) if a.kind == "relu2" else value
    return value if factor is None else k.mulf(value, factor)
