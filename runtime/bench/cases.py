"""One measured case of an operator: its inputs by seed, the float64 answer, and what it costs at least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from linattn.runtime.device import HostArray, numpy_dtype
from linattn.runtime.errors import InputError

from .lazy import compiler_side

DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
RULES = ("linear", "gated", "delta", "gated_delta")
LIMITS = {"float32": 2e-5, "float16": 5e-3, "bfloat16": 4e-2}
"""Relative error norm above which a result counts as wrong: about ten times what a sound kernel shows."""


@dataclass(frozen=True)
class AttentionCase:
    """A LinearAttention call.

    Attributes:
        tokens: T.
        dtype: Of activations, and of the state unless `state_dtype` says otherwise.
        rule: The update rule.
        batch: B.
        heads: Query heads.
        kv_heads: Heads of key, value and state.
        dk: Key head size.
        dv: Value head size.
        state_dtype: Of past and present state.
        key_decay: Whether there is a decay per key dimension instead of per head.
        seed: Of the inputs.
    """

    tokens: int
    dtype: str
    rule: str = "gated_delta"
    batch: int = 1
    heads: int = 16
    kv_heads: int = 16
    dk: int = 128
    dv: int = 128
    state_dtype: str = "float32"
    key_decay: bool = False
    seed: int = 0

    op_type = "LinearAttention"
    outputs = ("output", "present_state")

    @property
    def attributes(self) -> dict[str, Any]:
        """The node's attributes."""
        return {"q_num_heads": self.heads, "kv_num_heads": self.kv_heads, "update_rule": self.rule}

    def inputs(self) -> dict[str, HostArray]:
        """Arrays by ONNX name: keys of length one, decays of a trained layer's size, all by seed."""
        random = np.random.default_rng(self.seed)
        lead = (self.batch, self.tokens)

        def rows(heads: int, size: int, unit: bool) -> HostArray:
            x = random.standard_normal((*lead, heads, size))
            x = x / np.linalg.norm(x, axis=-1, keepdims=True) if unit else x
            return x.reshape(*lead, heads * size)

        found = {
            "query": rows(self.heads, self.dk, True),
            "key": rows(self.kv_heads, self.dk, True),
            "value": rows(self.kv_heads, self.dv, False),
            "past_state": 0.1 * random.standard_normal((self.batch, self.kv_heads, self.dk, self.dv)),
        }
        if self.rule in ("gated", "gated_delta"):
            width = self.kv_heads * (self.dk if self.key_decay else 1)
            found["decay"] = -np.exp(random.uniform(np.log(1e-3), np.log(0.3), (*lead, width)))
        if self.rule in ("delta", "gated_delta"):
            found["beta"] = 1 / (1 + np.exp(-random.standard_normal((*lead, self.kv_heads))))
        dtypes = {"past_state": self.state_dtype}
        return {name: array.astype(numpy_dtype(dtypes.get(name, self.dtype))) for name, array in found.items()}

    def reference(self, inputs: Mapping[str, HostArray]) -> dict[str, HostArray]:
        """Output and state in float64, from the rounded inputs."""
        with compiler_side():
            from linattn.dialect_patterns.linear_attention.reference import reference
        arrays: Any = dict(inputs)
        results = reference(**arrays, q_num_heads=self.heads, kv_num_heads=self.kv_heads)
        return dict(zip(self.outputs, results, strict=True))

    @property
    def flop(self) -> int:
        """Floating-point operations of the recurrence, two a multiply-add (NUMERICS section 6)."""
        out_heads = max(self.heads, self.kv_heads)
        update = {"linear": 1, "gated": 2, "delta": 2, "gated_delta": 3}[self.rule]
        return 2 * self.batch * self.tokens * self.dk * self.dv * (update * self.kv_heads + out_heads)

    @property
    def bytes(self) -> int:
        """Bytes that must move: every input and output once, the state once in and once out."""
        size, state = numpy_dtype(self.dtype).itemsize, numpy_dtype(self.state_dtype).itemsize
        width = (self.heads + self.kv_heads) * self.dk + (self.kv_heads + max(self.heads, self.kv_heads)) * self.dv
        if self.rule in ("gated", "gated_delta"):
            width += self.kv_heads * (self.dk if self.key_decay else 1)
        width += self.kv_heads if self.rule in ("delta", "gated_delta") else 0
        return self.batch * (self.tokens * width * size + 2 * self.kv_heads * self.dk * self.dv * state)


@dataclass(frozen=True)
class ConvCase:
    """A CausalConvWithState call: [B, C, T], with SiLU, no bias.

    Attributes:
        tokens: T.
        dtype: Of everything.
        batch: B.
        channels: C.
        taps: k.
        seed: Of the inputs.
    """

    tokens: int
    dtype: str
    batch: int = 1
    channels: int = 6144
    taps: int = 4
    seed: int = 0

    op_type = "CausalConvWithState"
    outputs = ("output", "present_state")

    @property
    def attributes(self) -> dict[str, Any]:
        """The node's attributes."""
        return {"activation": "silu"}

    def inputs(self) -> dict[str, HostArray]:
        """Arrays by ONNX name, by seed; the weight, too."""
        random = np.random.default_rng(self.seed)
        shapes = {
            "input": (self.batch, self.channels, self.tokens),
            "weight": (self.channels, 1, self.taps),
            "past_state": (self.batch, self.channels, self.taps - 1),
        }
        dtype = numpy_dtype(self.dtype)
        return {name: random.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}

    def reference(self, inputs: Mapping[str, HostArray]) -> dict[str, HostArray]:
        """Output and state in float64, from the rounded inputs."""
        with compiler_side():
            from linattn.dialect_patterns.causal_conv.reference import reference
        results = reference(inputs["input"], inputs["weight"], None, inputs["past_state"], activation="silu")
        return dict(zip(self.outputs, results, strict=True))

    @property
    def flop(self) -> int:
        """Floating-point operations of the taps, two a multiply-add; the SiLU is not counted."""
        return 2 * self.batch * self.tokens * self.channels * self.taps

    @property
    def bytes(self) -> int:
        """Bytes that must move: every input and output once, the state once in and once out."""
        elements = self.batch * self.channels * (2 * self.tokens + 2 * (self.taps - 1)) + self.channels * self.taps
        return elements * numpy_dtype(self.dtype).itemsize


Case = AttentionCase | ConvCase


def judge(case: Case, results: Mapping[str, HostArray], reference: Mapping[str, HostArray]) -> dict[str, Any]:
    """The error of a subject's results.

    Args:
        case: Gives the limit.
        results: What the subject returned.
        reference: The answer in float64.

    Returns:
        Norm of the difference over the norm of the reference, for `output` and `state`; `limit`; whether it is `ok`.
        A result of another shape, or with a NaN, is infinitely wrong.
    """
    output, state = (relative_error(results[name], reference[name]) for name in case.outputs)
    limit = LIMITS[case.dtype]
    return {"output": output, "state": state, "limit": limit, "ok": max(output, state) <= limit}


def relative_error(found: HostArray, wanted: HostArray) -> float:
    """Norm of the difference over the norm of what was wanted; infinite for NaN or another shape."""
    if found.shape != wanted.shape:
        return float("inf")
    exact = wanted.astype(np.float64)
    error = float(np.linalg.norm((found.astype(np.float64) - exact).ravel()))
    norm = float(np.linalg.norm(exact.ravel()))
    if not np.isfinite(error):
        return float("inf")
    return error / norm if norm else (0.0 if not error else float("inf"))


def dtype_name(short: str) -> str:
    """`f32`, `f16` or `bf16` as a numpy name.

    Raises:
        InputError: Another word.
    """
    if short not in DTYPES:
        raise InputError("unknown dtype", where="--dtype", got=repr(short), expected=" | ".join(DTYPES))
    return DTYPES[short]
