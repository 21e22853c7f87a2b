"""Inputs for the two state operators, harmless ones and those that break weak algorithms (NUMERICS section 8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Shape:
    """Sizes of a LinearAttention call and which gates it has.

    Attributes:
        rule: The update rule.
        decay: ``head`` or ``key``, for the gated rules.
        beta: ``head`` or ``shared``, for the delta rules.
    """

    rule: str = "gated_delta"
    decay: str = "head"
    beta: str = "head"
    q_heads: int = 4
    k_heads: int = 2
    kv_heads: int = 2
    dk: int = 16
    dv: int = 8

    @property
    def attributes(self) -> dict[str, Any]:
        return {"update_rule": self.rule, "q_num_heads": self.q_heads, "kv_num_heads": self.kv_heads}


def _unit(keys: np.ndarray) -> np.ndarray:
    return keys / np.linalg.norm(keys, axis=-1, keepdims=True)


def _silu_keys(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    x = rng.standard_normal(shape)
    return _unit(x / (1 + np.exp(-x)))


def _near_keys(rng: np.random.Generator, shape: tuple[int, ...], distance: float) -> np.ndarray:
    base = rng.standard_normal((shape[0], 1, *shape[2:]))
    return _unit(_unit(base) + distance * _unit(rng.standard_normal(shape)))


def _keys(name: str, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    if name == "silu":
        return _silu_keys(rng, shape)
    if name in ("identical", "near"):
        return _near_keys(rng, shape, 0.0 if name == "identical" else 0.3)
    return _unit(rng.standard_normal(shape))


def _log_decay(name: str, rng: np.random.Generator, shape: tuple[int, ...], swing: float) -> np.ndarray:
    small = -rng.exponential(0.1, shape)
    if name in ("silu", "identical", "near", "beta2"):
        return np.zeros(shape)
    if name == "reset":
        return np.where(rng.random(shape) < 0.1, -np.inf, small)
    if name == "cliff":
        return np.where(rng.random(shape) < 0.1, -1000.0, small)
    if name == "steps":
        return np.where(rng.random(shape) < 0.3, -30.0, 0.0)
    if name == "strong":
        return -rng.uniform(1.0, 100.0, shape)
    if name == "positive":  # a bounded walk: the state grows by up to e^4 and back again
        walk = swing * np.sin(np.cumsum(rng.uniform(0.0, 1.5, shape), axis=1))
        return np.diff(walk, axis=1, prepend=0.0)
    return small


DATA = ("random", "silu", "identical", "near", "beta2", "reset", "cliff", "steps", "strong", "positive")
HARD_DATA = ("identical", "beta2", "positive")


def linear_attention(
    shape: Shape,
    batch: int,
    tokens: int,
    *,
    name: str = "random",
    seed: int = 0,
    dtype: Any = np.float32,
    state_dtype: Any = None,
    past: bool = True,
) -> list[np.ndarray | None]:
    """The six inputs of a call."""
    rng = np.random.default_rng(seed)
    lead = (batch, tokens)
    query = rng.standard_normal((*lead, shape.q_heads, shape.dk))
    key = _keys(name, rng, (*lead, shape.k_heads, shape.dk))
    value = rng.standard_normal((*lead, shape.kv_heads, shape.dv))
    state = rng.standard_normal((batch, shape.kv_heads, shape.dk, shape.dv)) if past else None
    decay = beta = None
    if "gated" in shape.rule:
        width = shape.kv_heads * (shape.dk if shape.decay == "key" else 1)
        swing = 1.0 if shape.decay == "key" and "delta" in shape.rule else 4.0  # more, and the rule itself diverges
        decay = _log_decay(name, rng, (*lead, width), swing).astype(dtype)
    if "delta" in shape.rule:
        width = shape.kv_heads if shape.beta == "head" else 1
        fixed = {"silu": 1.0, "identical": 1.0, "near": 1.0, "beta2": 2.0}.get(name)
        beta = rng.uniform(0.0, 1.0, (*lead, width)) if fixed is None else np.full((*lead, width), fixed)
        beta = beta.astype(dtype)
    packed = [x.reshape(*lead, x.shape[2] * x.shape[3]).astype(dtype) for x in (query, key, value)]
    return [*packed, None if state is None else state.astype(state_dtype or dtype), decay, beta]


def causal_conv(
    batch: int,
    channels: int,
    tokens: int,
    taps: int,
    *,
    seed: int = 0,
    dtype: Any = np.float32,
    bias: bool = True,
    past: bool = True,
) -> list[np.ndarray | None]:
    """The four inputs of a call."""
    rng = np.random.default_rng(seed)
    return [
        rng.standard_normal((batch, channels, tokens)).astype(dtype),
        rng.standard_normal((channels, 1, taps)).astype(dtype),
        rng.standard_normal(channels).astype(dtype) if bias else None,
        rng.standard_normal((batch, channels, taps - 1)).astype(dtype) if past else None,
    ]
