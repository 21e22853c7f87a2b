"""The contract of LinearAttention: one dataclass for both domains, and every check a model can fail.

The two contracts differ (DESIGN section 5): ai.onnx wants the query heads to be a multiple of the key/value heads and
as many key heads as value heads; com.microsoft also takes fewer query heads than value heads ("inverse GQA") and fewer
key heads, which it derives from the width of the key.

Source: ONNX schema LinearAttention-27; ONNX Runtime 1.32, contrib_ops/cpu/bert/linear_attention.cc.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..node import FLOATS, Dim, Node, TensorSpec
from ..op import MICROSOFT

RULES = ("linear", "gated", "delta", "gated_delta")
INPUTS = ("query", "key", "value", "past_state", "decay", "beta")
_ATTRIBUTES = {"q_num_heads", "kv_num_heads", "update_rule", "scale", "chunk_size"}
_MAX_SIZE = 2**31 - 1


@dataclass(frozen=True)
class LinearAttention:
    """What a LinearAttention node computes, all defaults resolved.

    Attributes:
        rule: ``linear``, ``gated``, ``delta`` or ``gated_delta``.
        batch: B, None where open.
        tokens: T of this call, None where open; may be 0.
        q_heads: Hq.
        k_heads: Hk; differs from Hkv in com.microsoft only.
        kv_heads: Hkv, the heads of value, decay and state.
        dk: Elements of a key head.
        dv: Elements of a value head.
        dtype: Element type of everything but the state.
        state_dtype: Element type of past and present state.
        scale: Factor of the output.
        decay: Log decay per ``head`` [B, T, Hkv], per ``key`` dimension [B, T, Hkv * dk], or ``none``.
        beta: Update rate per ``head`` [B, T, Hkv], ``shared`` by the heads [B, T, 1], or ``none``.
        has_past: Whether a past state is given; zeros else.
        used_outputs: For each output of the node whether it is wanted.
        where: The node, as errors name it.
    """

    rule: str
    batch: Dim
    tokens: Dim
    q_heads: int
    k_heads: int
    kv_heads: int
    dk: int
    dv: int
    dtype: str
    state_dtype: str
    scale: float
    decay: Literal["none", "head", "key"]
    beta: Literal["none", "head", "shared"]
    has_past: bool
    used_outputs: tuple[bool, ...]
    where: str

    @property
    def out_heads(self) -> int:
        """Heads of the output: one per query head, or per value head where there are more of those."""
        return max(self.q_heads, self.kv_heads)

    @property
    def rows(self) -> int:
        """How many output heads read one state (1 with inverse GQA)."""
        return self.out_heads // self.kv_heads

    @property
    def has_delta(self) -> bool:
        """Whether the rule corrects the value by what the state holds for the key."""
        return self.rule in ("delta", "gated_delta")

    @property
    def input_specs(self) -> tuple[TensorSpec | None, ...]:
        """The inputs' types with everything known about any of them."""
        lead = (self.batch, self.tokens)
        decay = {"none": 0, "head": self.kv_heads, "key": self.kv_heads * self.dk}[self.decay]
        beta = {"none": 0, "head": self.kv_heads, "shared": 1}[self.beta]
        return (
            TensorSpec((*lead, self.q_heads * self.dk), self.dtype),
            TensorSpec((*lead, self.k_heads * self.dk), self.dtype),
            TensorSpec((*lead, self.kv_heads * self.dv), self.dtype),
            self.state_spec if self.has_past else None,
            TensorSpec((*lead, decay), self.dtype) if decay else None,
            TensorSpec((*lead, beta), self.dtype) if beta else None,
        )

    @property
    def state_spec(self) -> TensorSpec:
        """Type of the past and the present state."""
        return TensorSpec((self.batch, self.kv_heads, self.dk, self.dv), self.state_dtype)

    @property
    def heads_text(self) -> str:
        """Heads and head sizes for reports: ``Hq/Hk/Hkv x dk x dv``."""
        return f"{self.q_heads}/{self.k_heads}/{self.kv_heads} x {self.dk}x{self.dv}"


def output_specs(contract: LinearAttention) -> tuple[TensorSpec, TensorSpec]:
    """Types of output [B, T, max(Hq, Hkv) * dv] and present_state [B, Hkv, dk, dv], wanted or not."""
    width = contract.out_heads * contract.dv
    return TensorSpec((contract.batch, contract.tokens, width), contract.dtype), contract.state_spec


def output_types(contract: LinearAttention) -> Sequence[TensorSpec | None]:
    """The types of the node's outputs, None for one that it leaves out."""
    specs = output_specs(contract)
    return [spec if used else None for spec, used in zip(specs, contract.used_outputs, strict=False)]


def parse(node: Node) -> LinearAttention:
    """Check a node of either domain.

    Raises:
        UnsupportedModelError: if the node breaks its operator's contract or asks for something not supported.
    """
    contrib = node.domain == MICROSOFT
    _check_names(node, contrib)
    rule = node.attr("update_rule", "gated_delta")
    if rule not in RULES:
        raise node.error("attribute 'update_rule'", got=repr(rule), expected=" or ".join(RULES))
    q_heads, kv_heads = _heads(node, "q_num_heads"), _heads(node, "kv_num_heads")
    _check_ratio(node, q_heads, kv_heads, contrib)
    _check_gates(node, rule)
    dtype, state_dtype = _check_types(node)
    batch, tokens = _check_lead(node)
    dk, dv = _head_sizes(node, q_heads, kv_heads)
    past = node.input(3)
    if past is not None:
        _check_shape(node, 3, (batch, kv_heads, dk, dv))
        batch = batch if batch is not None else past.shape[0]
    scale = node.attr("scale", 0.0)
    if not math.isfinite(scale):
        raise node.error("attribute 'scale'", got=scale, expected="a finite number")
    return LinearAttention(
        rule=rule,
        batch=batch,
        tokens=tokens,
        q_heads=q_heads,
        k_heads=_key_heads(node, kv_heads, dk, contrib),
        kv_heads=kv_heads,
        dk=dk,
        dv=dv,
        dtype=dtype,
        state_dtype=state_dtype,
        scale=scale or 1.0 / math.sqrt(dk),
        decay=_decay(node, kv_heads, dk),
        beta=_beta(node, kv_heads),
        has_past=past is not None,
        used_outputs=node.used_outputs or (True,) * node.num_outputs,
        where=node.where,
    )


def _check_names(node: Node, contrib: bool) -> None:
    """Refuse inputs, outputs and attributes that the pinned schemas lack."""
    if len(node.inputs) > len(INPUTS) and any(spec is not None for spec in node.inputs[len(INPUTS) :]):
        raise node.error(
            "too many inputs", got=len(node.inputs), expected=f"at most {len(INPUTS)}",
            hint="inputs of newer schemas such as 'erase_gate' are not supported",
        )  # fmt: skip
    if not 1 <= node.num_outputs <= 2:
        raise node.error("wrong number of outputs", got=node.num_outputs, expected="output and present_state")
    known = {*_ATTRIBUTES, "state_window"} if contrib else _ATTRIBUTES
    for name in sorted(node.attributes):
        if name not in known:
            raise node.error(f"unknown attribute '{name}'", expected="one of " + ", ".join(sorted(known)))
    if node.attr("state_window", 0) != 0:
        raise node.error(
            "attribute 'state_window'", got=node.attributes["state_window"], expected="0",
            hint="export the model without a state window (state_window=0)",
        )  # fmt: skip
    if node.attr("chunk_size", 64) <= 0:
        raise node.error("attribute 'chunk_size'", got=node.attributes["chunk_size"], expected="a positive number")


def _heads(node: Node, name: str) -> int:
    if name not in node.attributes:
        raise node.error(f"attribute '{name}' is missing", hint=f"give the node its '{name}'")
    heads = node.attr(name, 1)
    if not 0 < heads <= _MAX_SIZE:
        raise node.error(f"attribute '{name}'", got=heads, expected=f"1 to {_MAX_SIZE}")
    return heads


def _check_ratio(node: Node, q_heads: int, kv_heads: int, contrib: bool) -> None:
    if q_heads % kv_heads == 0 or (contrib and kv_heads % q_heads == 0):
        return
    if contrib:
        expected, hint = "one to be a multiple of the other", None
    else:
        expected = "q_num_heads to be a multiple of kv_num_heads"
        hint = "repeat query and key per value head, or export com.microsoft.LinearAttention, which takes fewer"
    raise node.error("head counts", got=f"q_num_heads={q_heads}, kv_num_heads={kv_heads}", expected=expected, hint=hint)


def _check_gates(node: Node, rule: str) -> None:
    """Each rule requires or forbids decay and beta."""
    for index, wanted in ((4, rule in ("gated", "gated_delta")), (5, rule in ("delta", "gated_delta"))):
        name = INPUTS[index]
        if wanted and node.input(index) is None:
            raise node.error(f"update_rule '{rule}' requires the input '{name}'", hint=f"connect '{name}'")
        if not wanted and node.input(index) is not None:
            raise node.error(
                f"update_rule '{rule}' forbids the input '{name}'", hint="leave it out or choose another update_rule"
            )


def _check_types(node: Node) -> tuple[str, str]:
    dtype = node.required(0, "query").dtype
    for index, name in enumerate(INPUTS):
        spec = node.required(index, name) if index < 3 else node.input(index)
        if spec is None:
            continue
        if spec.dtype not in FLOATS:
            raise node.error(f"input '{name}' has an unsupported type", got=spec.dtype, expected=" or ".join(FLOATS))
        if index != 3 and spec.dtype != dtype:
            raise node.error(f"input '{name}' has another type than 'query'", got=spec.dtype, expected=dtype)
        rank = 4 if index == 3 else 3
        if spec.rank != rank:
            layout = "[B, H, dk, dv]" if index == 3 else "[B, T, heads * size]"
            raise node.error(f"input '{name}'", got=f"{spec.rank} dimensions", expected=f"{rank}: {layout}")
    past = node.input(3)
    return dtype, past.dtype if past is not None else dtype


def _check_lead(node: Node) -> tuple[Dim, Dim]:
    """B and T, from whichever inputs tell them."""
    found: list[Dim] = [None, None]
    source = ["", ""]
    for index, name in enumerate(INPUTS):
        spec = node.input(index)
        if spec is None or index == 3:
            continue
        for axis, what in enumerate(("batch", "sequence length")):
            size = spec.shape[axis]
            if size is None:
                continue
            if found[axis] is None:
                found[axis], source[axis] = size, name
            elif found[axis] != size:
                raise node.error(
                    f"input '{name}' has another {what} than '{source[axis]}'", got=size, expected=found[axis]
                )
    return found[0], found[1]


def _head_sizes(node: Node, q_heads: int, kv_heads: int) -> tuple[int, int]:
    """Sizes dk and dv, from the widths of query and value or else from the past state."""
    past = node.input(3)
    sizes: list[int] = []
    for index, heads, attribute, axis in ((0, q_heads, "q_num_heads", 2), (2, kv_heads, "kv_num_heads", 3)):
        name = INPUTS[index]
        width = node.required(index, name).shape[2]
        if width is None:
            size = past.shape[axis] if past is not None else None
            if size is None:
                raise node.error(
                    f"the last dimension of '{name}' is open", expected="a static width",
                    hint="give it in the model's shapes, or run shape inference when exporting",
                )  # fmt: skip
        elif width == 0 or width % heads:
            raise node.error(
                f"the last dimension of '{name}'", got=width, expected=f"a positive multiple of {attribute}={heads}"
            )
        else:
            size = width // heads
        if size <= 0 or size * heads > _MAX_SIZE:
            raise node.error(f"the head size of '{name}'", got=size, expected=f"a width of 1 to {_MAX_SIZE} in all")
        sizes.append(size)
    return sizes[0], sizes[1]


def _check_shape(node: Node, index: int, expected: tuple[Dim, ...]) -> None:
    spec = node.input(index)
    assert spec is not None
    if any(a is not None and b is not None and a != b for a, b in zip(spec.shape, expected, strict=True)):
        want = TensorSpec(expected, spec.dtype)
        raise node.error(f"input '{INPUTS[index]}'", got=spec, expected=f"{want} (B, kv_num_heads, dk, dv)")


def _key_heads(node: Node, kv_heads: int, dk: int, contrib: bool) -> int:
    width = node.required(1, "key").shape[2]
    if width is None:
        if contrib:
            raise node.error(
                "the last dimension of 'key' is open", expected="a static width, which tells the key heads",
                hint="give it in the model's shapes, or run shape inference when exporting",
            )  # fmt: skip
        return kv_heads
    heads = width // dk
    if contrib and (width == 0 or width % dk or heads > kv_heads or kv_heads % heads):
        raise node.error(
            "the last dimension of 'key'", got=width, expected=f"dk={dk} times a divisor of kv_num_heads={kv_heads}"
        )
    if not contrib and width != kv_heads * dk:
        raise node.error("the last dimension of 'key'", got=width, expected=f"kv_num_heads * dk = {kv_heads * dk}")
    return heads


def _decay(node: Node, kv_heads: int, dk: int) -> Literal["none", "head", "key"]:
    spec = node.input(4)
    if spec is None:
        return "none"
    width = spec.shape[2]
    if width == kv_heads:  # with dk=1 both readings are the same computation
        return "head"
    if width == kv_heads * dk:
        return "key"
    raise node.error(
        "the last dimension of 'decay'", got="?" if width is None else width,
        expected=f"kv_num_heads = {kv_heads} or kv_num_heads * dk = {kv_heads * dk}",
    )  # fmt: skip


def _beta(node: Node, kv_heads: int) -> Literal["none", "head", "shared"]:
    spec = node.input(5)
    if spec is None:
        return "none"
    width = spec.shape[2]
    if width == kv_heads:  # with one head both readings are the same computation
        return "head"
    if width == 1:
        return "shared"
    raise node.error(
        "the last dimension of 'beta'", got="?" if width is None else width, expected=f"kv_num_heads = {kv_heads} or 1"
    )
