"""The contract of SelectiveScan, a node that the frontend makes of Mamba-1's recurrence.

    linattn.SelectiveScan(value [B, T, D], step [B, T, D], rate [D, N], key [B, T, N], query [B, T, N],
                          past_state [B, D, N]) -> output [B, T, D], present_state [B, D, N]

    S[d, n] <- exp(step[t, d] * rate[d, n]) * S[d, n] + value[t, d] * key[t, n]
    output[t, d] = sum_n query[t, n] * S[d, n]

It is LinearAttention's rule ``gated`` with D heads, keys of N elements, values of one, and a decay per key; as that its
decays, keys and queries would be N or D times as large in memory. All of it is f32, as models compute it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..checks import require_dtype, require_shape
from ..node import Node, TensorSpec

INPUTS = ("value", "step", "rate", "key", "query", "past_state")


@dataclass(frozen=True)
class SelectiveScan:
    """Contract.

    Attributes:
        where: The node, as errors name it.
        value: [B, T, D], D static.
        states: N, elements of the state of a channel.
        has_past: Whether a past state is given; zeros else.
        used_outputs: For each output of the node whether it is wanted.
    """

    where: str
    value: TensorSpec
    states: int
    has_past: bool
    used_outputs: tuple[bool, ...]

    @property
    def channels(self) -> int:
        """D."""
        return self.value.shape[2] or 0

    @property
    def keys(self) -> TensorSpec:
        """Type of keys and queries."""
        return TensorSpec((*self.value.shape[:2], self.states), "f32")

    @property
    def state(self) -> TensorSpec:
        """Type of the past and the present state."""
        return TensorSpec((self.value.shape[0], self.channels, self.states), "f32")

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Types of all inputs that the node has."""
        rate = TensorSpec((self.channels, self.states), "f32")
        return (self.value, self.value, rate, self.keys, self.keys, *([self.state] if self.has_past else []))


def parse(node: Node) -> SelectiveScan:
    """Check the node; see the contract."""
    specs = [node.required(i, name) for i, name in enumerate(INPUTS[:5])]
    past = node.input(5)
    node.refuse_other_inputs()
    for name, spec in zip(INPUTS, [*specs, past], strict=True):
        if spec is not None:
            require_dtype(node, name, spec, "f32")
    value, step, rate, key, query = specs
    require_shape(node, "rate", rate, (None, None))
    channels, states = rate.shape
    if not channels or not states:
        raise node.error("input 'rate' has an open or empty shape", got=rate, expected="static [D, N]")
    require_shape(node, "value", value, (None, None, channels))
    batch, tokens = value.shape[:2]
    require_shape(node, "step", step, (batch, tokens, channels))
    require_shape(node, "key", key, (batch, tokens, states))
    require_shape(node, "query", query, (batch, tokens, states))
    if past is not None:
        require_shape(node, "past_state", past, (batch, channels, states))
        batch = batch if batch is not None else past.shape[0]
    value = TensorSpec((batch, tokens, channels), "f32")
    used = node.used_outputs or (True,) * node.num_outputs
    return SelectiveScan(node.where, value, states, past is not None, used)


def output_types(contract: SelectiveScan) -> Sequence[TensorSpec | None]:
    """The types of the node's outputs, None for one that it leaves out."""
    specs = (contract.value, contract.state)
    return [spec if used else None for spec, used in zip(specs, contract.used_outputs, strict=False)]
