"""What every strategy does with the operands first: static sizes in the types, and a state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir

from ..emit.builder import Builder, Size
from .contract import LinearAttention


@dataclass(frozen=True)
class Operands:
    """The operands in their own types, with everything static that the contract knows.

    Attributes:
        query: [B, T, Hq * dk].
        key: [B, T, Hk * dk].
        value: [B, T, Hkv * dv].
        decay: [B, T, Hkv] or [B, T, Hkv * dk], None if the rule has none.
        beta: [B, T, Hkv] or [B, T, 1], None if the rule has none.
        batch: B.
        tokens: T.
        past: [B, Hkv, dk, dv], None where the node has no past state.
        state: The past state as [B * Hkv, dk, dv], None where the node has none. Strategies leave out products with
            it then: IREE 3.13 may take a product with constant zeros, plus a tensor, for one with that tensor (MLIR's
            ``CanonicalizeContractAdd`` replaces the zero accumulator in all operands), where tiles are alike.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    decay: ir.Value | None
    beta: ir.Value | None
    batch: Size
    tokens: Size
    past: ir.Value | None
    state: ir.Value | None


def refine_inputs(b: Builder, contract: LinearAttention, values: Sequence[ir.Value | None]) -> list[ir.Value | None]:
    """All six operands with the static sizes in their types, None where left out."""
    return [
        b.refine(value, spec) if value is not None and spec is not None else None
        for value, spec in zip([*values, *[None] * (6 - len(values))], contract.input_specs, strict=True)
    ]


def prepare(b: Builder, contract: LinearAttention, values: Sequence[ir.Value | None]) -> Operands:
    """Put the static sizes into the operands' types and fill in the past state."""
    query, key, value, past, decay, beta = refine_inputs(b, contract, values)
    assert query is not None
    assert key is not None
    assert value is not None
    batch = b.dim(query, 0)
    state = None if past is None else b.collapse(past, 0, 1)
    return Operands(query, key, value, decay, beta, batch, b.dim(query, 1), past, state)


def state_or_zeros(b: Builder, contract: LinearAttention, x: Operands) -> ir.Value:
    """The past state in f32, to start a loop or to be returned."""
    if x.state is None:
        return b.full(0.0, [b.mul(x.batch, contract.kv_heads), contract.dk, contract.dv], "f32")
    return b.cast(x.state, "f32")


def present_state(b: Builder, contract: LinearAttention, batch: Size, state: ir.Value) -> ir.Value:
    """The carried state [B * Hkv, dk, dv] in f32 as the operator's second output; the one rounding of a call."""
    return b.expand(b.cast(state, contract.state_dtype), 0, [batch, contract.kv_heads])


def kernel_name(c: LinearAttention, x: Operands | None, plan: str) -> str:
    """The name of a GPU kernel: all that it depends on; short, since IREE names files after it, twice.

    Args:
        c: What it computes.
        x: The operands, for open sizes; None for one token.
        plan: How the work is cut.
    """
    sizes = (c.batch, 1) if x is None else (x.batch, x.tokens)
    lead = "x".join("n" if not isinstance(size, int) else str(size) for size in sizes)
    heads = str(c.kv_heads) if c.q_heads == c.k_heads == c.kv_heads else f"{c.q_heads}_{c.k_heads}_{c.kv_heads}"
    types = c.dtype if c.dtype == c.state_dtype else f"{c.dtype}_{c.state_dtype}"
    name = f"linear_attention_{c.rule}_fused_simt_{types}_{lead}_h{heads}_d{c.dk}x{c.dv}_{plan}"
    if c.decay == "key":
        name += "_key_decay"
    if c.beta == "shared":
        name += "_shared_beta"
    if not c.has_past:
        name += "_no_past"
    if c.scale != 1.0 / math.sqrt(c.dk):
        name += f"_scale{c.scale.hex()}".replace(".", "p").replace("-", "m").replace("+", "")
    return name
