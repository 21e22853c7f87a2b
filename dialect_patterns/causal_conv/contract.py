"""The contract of CausalConvWithState: one dataclass for both domains, and every check a model can fail.

Source: ONNX schema CausalConvWithState-27; ONNX Runtime 1.32, contrib_ops/cpu/bert/causal_conv_with_state.cc.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..node import FLOATS, Dim, Node, TensorSpec
from ..op import MICROSOFT

ACTIVATIONS = ("none", "silu", "swish")
INPUTS = ("input", "weight", "bias", "past_state")
# Attributes of com.microsoft that we take only at their default: (default, what the user can do).
_ONLY_DEFAULT = {
    "ndim": (1, "pack the other axes into the batch or the channels"),
    "state_window": (0, "export the model without a state window"),
    "state_update_capacity": (0, "export the model without state updates"),
    "state_channels_last": (-1, "let the state follow channels_last"),
    "state_length": (0, "let the state be as long as the kernel needs"),
    "input_channel_offset": (0, "slice the channels with a Slice node"),
    "input_channels": (0, "slice the channels with a Slice node"),
}
_MAX_STATE = 2**31 - 1
_MAX_KERNEL = 256  # taps; they are unrolled, and models have 2 to 8


@dataclass(frozen=True)
class CausalConv:
    """What a CausalConvWithState node computes.

    Attributes:
        input: [B, C, T], or [B, T, d_1, ..., d_n] with ``channels_last``.
        channels: C, static.
        kernel: Taps of the kernel.
        dilation: Tokens between two taps.
        activation: ``none`` or ``silu``.
        channels_last: Whether the sequence comes before the channels.
        has_bias: Whether there is a bias [C].
        has_past: Whether a past state is given; zeros else.
        used_outputs: For each output of the node whether it is wanted.
        where: The node, as errors name it.
    """

    input: TensorSpec
    channels: int
    kernel: int
    dilation: int
    activation: str
    channels_last: bool
    has_bias: bool
    has_past: bool
    used_outputs: tuple[bool, ...]
    where: str

    @property
    def state_length(self) -> int:
        """Tokens that the state holds."""
        return (self.kernel - 1) * self.dilation

    @property
    def state_spec(self) -> TensorSpec:
        """Type of the past and the present state."""
        shape = self.input.shape
        if self.channels_last:
            return TensorSpec((shape[0], self.state_length, *shape[2:]), self.input.dtype)
        return TensorSpec((shape[0], shape[1], self.state_length), self.input.dtype)


def output_specs(contract: CausalConv) -> tuple[TensorSpec, TensorSpec]:
    """Types of output, which is like the input, and present_state, wanted or not."""
    return contract.input, contract.state_spec


def output_types(contract: CausalConv) -> Sequence[TensorSpec | None]:
    """The types of the node's outputs, None for one that it leaves out."""
    specs = output_specs(contract)
    return [specs[i] if i < 2 and used else None for i, used in enumerate(contract.used_outputs)]


def parse(node: Node) -> CausalConv:
    """Check a node of either domain.

    Raises:
        UnsupportedModelError: if the node breaks its operator's contract or asks for something not supported.
    """
    _check_names(node)
    activation = node.attr("activation", "none")
    if activation not in ACTIVATIONS:
        raise node.error("attribute 'activation'", got=repr(activation), expected=" or ".join(ACTIVATIONS))
    channels_last = _flag(node, "channels_last")
    x = _check_types(node, channels_last)
    channels, kernel = _kernel(node)
    dilation = node.attr("dilation", 1)
    if not 1 <= dilation <= _MAX_STATE // kernel:
        raise node.error("attribute 'dilation'", got=dilation, expected="a positive number")
    x = _with_channels(node, x, channels, channels_last)
    bias = node.input(2)
    if bias is not None and bias.shape[0] not in (None, channels):
        raise node.error("input 'bias'", got=bias, expected=f"{channels} elements, one a channel")
    contract = CausalConv(
        input=x,
        channels=channels,
        kernel=kernel,
        dilation=dilation,
        activation="silu" if activation == "swish" else activation,
        channels_last=channels_last,
        has_bias=bias is not None,
        has_past=node.input(3) is not None,
        used_outputs=node.used_outputs or (True,) * node.num_outputs,
        where=node.where,
    )
    _check_past(node, contract)
    return contract


def _check_names(node: Node) -> None:
    """Refuse inputs, outputs and attributes that the pinned schemas lack or that we do not support."""
    if len(node.inputs) > len(INPUTS) and any(spec is not None for spec in node.inputs[len(INPUTS) :]):
        raise node.error("too many inputs", got=len(node.inputs), expected=f"at most {len(INPUTS)}")
    extra = node.num_outputs > 2 and (not node.used_outputs or any(node.used_outputs[2:]))
    if node.num_outputs < 1 or extra:
        raise node.error("wrong number of outputs", got=node.num_outputs, expected="output and present_state")
    known = {"activation"}
    if node.domain == MICROSOFT:
        known |= {"dilation", "channels_last", *_ONLY_DEFAULT}
    for name in sorted(node.attributes):
        if name not in known:
            raise node.error(f"unknown attribute '{name}'", expected="one of " + ", ".join(sorted(known)))
    for name, (default, hint) in _ONLY_DEFAULT.items():
        if node.attr(name, default) != default:
            raise node.error(f"attribute '{name}'", got=node.attributes[name], expected=default, hint=hint)


def _flag(node: Node, name: str) -> bool:
    value = node.attr(name, 0)
    if value not in (0, 1):
        raise node.error(f"attribute '{name}'", got=value, expected="0 or 1")
    return bool(value)


def _check_types(node: Node, channels_last: bool) -> TensorSpec:
    x = node.required(0, "input")
    for index, name in enumerate(INPUTS):
        spec = node.required(index, name) if index < 2 else node.input(index)
        if spec is None:
            continue
        if spec.dtype not in FLOATS:
            raise node.error(f"input '{name}' has an unsupported type", got=spec.dtype, expected=" or ".join(FLOATS))
        if spec.dtype != x.dtype:
            raise node.error(f"input '{name}' has another type than 'input'", got=spec.dtype, expected=x.dtype)
        wanted = 1 if index == 2 else 3
        if channels_last and index in (0, 3):
            wanted = max(x.rank, 3)
        if spec.rank != wanted:
            raise node.error(f"input '{name}'", got=f"{spec.rank} dimensions", expected=wanted)
    return x


def _kernel(node: Node) -> tuple[int, int]:
    weight = node.required(1, "weight")
    channels, one, kernel = weight.shape
    if channels is None or kernel is None:
        raise node.error("input 'weight' has an open shape", got=weight, expected="static channels and kernel size")
    if one not in (None, 1) or channels == 0 or kernel == 0:
        raise node.error("input 'weight'", got=weight, expected="[channels, 1, kernel], none of them 0")
    if kernel > _MAX_KERNEL:
        raise node.error("input 'weight'", got=f"{kernel} taps", expected=f"up to {_MAX_KERNEL}")
    return channels, kernel


def _with_channels(node: Node, x: TensorSpec, channels: int, channels_last: bool) -> TensorSpec:
    """The input's type with its channels, which the weight tells, static."""
    axes: tuple[Dim, ...] = x.shape[2:] if channels_last else x.shape[1:2]
    known = 1
    for axis in axes:
        known *= axis if axis is not None else 1
    unknown = sum(axis is None for axis in axes)
    if unknown > 1:
        raise node.error("input 'input' has more than one open channel dimension", got=x, expected="at most one")
    if known == 0 or channels % known or (not unknown and known != channels):
        raise node.error("input 'input'", got=x, expected=f"{channels} channels, as 'weight' has")
    axes = tuple(channels // known if axis is None else axis for axis in axes)
    if channels_last:
        return TensorSpec((*x.shape[:2], *axes), x.dtype)
    return TensorSpec((x.shape[0], *axes, x.shape[2]), x.dtype)


def _check_past(node: Node, contract: CausalConv) -> None:
    past = node.input(3)
    if past is None:
        return
    expected = contract.state_spec
    if any(a is not None and b is not None and a != b for a, b in zip(past.shape, expected.shape, strict=True)):
        layout = "[B, kernel - 1, channels]" if contract.channels_last else "[B, channels, kernel - 1]"
        raise node.error("input 'past_state'", got=past, expected=f"{expected}, {layout}")
