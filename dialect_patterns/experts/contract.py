"""The contract of MoE and QMoE (com.microsoft): each token through the k experts that its router likes best.

    p = softmax(router[t])                      chosen: the k largest p; of equal ones the later expert, as ONNX Runtime
    w = p or router_weights[t], of the chosen   divided by their sum where ``normalize_routing_weights``, and in QMoE
                                                wherever they are p, as ONNX Runtime's CPU kernel does
    y[t] = sum over the chosen e of  w_e (act(x[t] W1_e^T + b1_e, x[t] W3_e^T + b3_e) W2_e^T + b2_e)

``swiglu`` and ``geglu`` take gate and factor from the columns of fc1: alternately (``swiglu_fusion`` 1), one half after
the other (2), or (0, swiglu) the factor is fc3. Other activations are multiplied by fc3 where there is one. Weights are
[E, N, K]; QMoE packs K, low bits first, a weight being (q - zero_point) * scale with a scale a block of K, or a column.

Source: ONNX Runtime 1.32, schemas MoE-1 and QMoE-1, contrib_ops/cpu/moe; ties and defaults found by running it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..checks import float_input, only_attributes, require_dtype, require_shape
from ..node import Dim, Node, TensorSpec

ACTIVATIONS = ("relu", "gelu", "silu", "identity", "relu2", "swiglu", "geglu")
_GATED = ("swiglu", "geglu")

_COMMON = (
    "k", "activation_type", "activation_alpha", "activation_beta", "normalize_routing_weights", "swiglu_fusion",
    "swiglu_limit", "swiglu_limit_after_activation", "use_sparse_mixer",
)  # fmt: skip
_QUANTISED = (
    "expert_weight_bits", "fc1_expert_weight_bits", "fc2_expert_weight_bits", "fc3_expert_weight_bits", "block_size",
    "quant_type", "accuracy_level", "weights_prepacked",
)  # fmt: skip
_MAX_EXPERTS = 2048
_MAX_TILE = 12  # rows


@dataclass(frozen=True)
class Matrix:
    """The weights of one layer of all experts.

    Attributes:
        name: ``fc1``, ``fc2`` or ``fc3``.
        columns: N, of each expert.
        depth: K.
        dtype: Element type of the weights where they are not quantised, and of scales and bias.
        bits: Bits of a weight, 0 where they are not quantised.
        block_size: Weights along K that share a scale.
        weights: The input's number.
        scales: The input's number, None where the weights are not quantised.
        zeros: The input's number, None where zero points are 2 ** (bits - 1).
        bias: The input's number, None where there is none.
    """

    name: str
    columns: int
    depth: int
    dtype: str
    bits: int
    block_size: int
    weights: int
    scales: int | None
    zeros: int | None
    bias: int | None

    @property
    def blocks(self) -> int:
        """Scales of a column."""
        return self.depth // self.block_size

    @property
    def key(self) -> str:
        """What the names of kernels say of the weights."""
        if not self.bits:
            return self.dtype
        return f"{self.dtype}_{self.bits}bit_b{self.block_size}{'_z' if self.zeros is not None else ''}"


@dataclass(frozen=True)
class Activation:
    """What is between the two layers.

    Attributes:
        kind: One of :data:`ACTIVATIONS`.
        alpha: Of swiglu, the factor within the sigmoid.
        beta: Of swiglu, added to the factor.
        limit: Of swiglu, what its gate and factor are clamped to; inf for no limit.
        limit_after: Whether the activated gate is clamped instead of the gate.
    """

    kind: str
    alpha: float
    beta: float
    limit: float
    limit_after: bool

    @property
    def key(self) -> str:
        """What the names of kernels say of it."""
        if self.kind != "swiglu":
            return self.kind
        numbers = f"{self.alpha!r}_{self.beta!r}_{self.limit!r}".replace("-", "m").replace(".", "p").replace("+", "")
        return f"swiglu_{numbers}{'_after' if self.limit_after else ''}"


@dataclass(frozen=True)
class Experts:
    """Contract.

    Attributes:
        where: The node, as errors name it.
        x: [T, H] or [B, T, H].
        count: E, the experts.
        chosen: k, of a token.
        inner: I, elements between the layers.
        normalise: Whether the weights of the chosen are divided by their sum.
        router_weights: The number of the input that has the weights, None where they are the router's softmax.
        activation: What is between the layers.
        layout: Where gate and factor are: ``plain`` (a gate alone), ``interleaved``, ``halves`` or ``separate`` (fc3).
        fc1: The first layer.
        fc2: The second layer.
        fc3: The factor's layer, or None.
        constant: Whether all weights, scales and zero points are weights of the model.
        given: Whether the model has chosen already: see ``given``.
    """

    where: str
    x: TensorSpec
    count: int
    chosen: int
    inner: int
    normalise: bool
    router_weights: int | None
    activation: Activation
    layout: str
    fc1: Matrix
    fc2: Matrix
    fc3: Matrix | None
    constant: bool
    given: bool = False

    @property
    def hidden(self) -> int:
        """H."""
        return self.fc1.depth

    @property
    def rows(self) -> Dim:
        """Tokens in all; None where open."""
        lead = self.x.shape[:-1]
        return None if None in lead else math.prod(size or 0 for size in lead)

    @property
    def gated(self) -> bool:
        """Whether a gate is multiplied by a factor."""
        return self.layout != "plain"

    @property
    def scratch_bytes(self) -> int:
        """Memory between the kernels: rows in f32, of each token's experts in whole tiles, or of all experts."""
        rows = self.rows or 1
        count = rows * self.chosen + self.count * _MAX_TILE if self.constant else rows * self.count
        return 4 * count * (2 * self.hidden + 3 * self.inner)

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """The layers that are there."""
        return tuple(m for m in (self.fc1, self.fc2, self.fc3) if m is not None)


@dataclass(frozen=True)
class _Ports:
    weights: int
    bias: int
    scales: int | None = None
    zeros: int | None = None


_MOE = {"fc1": _Ports(2, 3), "fc2": _Ports(4, 5), "fc3": _Ports(6, 7)}
_QMOE = {"fc1": _Ports(2, 4, 3, 11), "fc2": _Ports(5, 7, 6, 12), "fc3": _Ports(8, 10, 9, 13)}
_ROUTER_WEIGHTS = 14
_OTHER_FORMATS = ("fc1_global_scale", "fc2_global_scale", "fc1_act_scale", "fc2_act_scale", "fc1_act_block_scale",
                  "fc2_act_block_scale")  # fmt: skip


def parse(node: Node) -> Experts:
    """Check the node; see the contract."""
    quantised = node.op_type == "QMoE"
    only_attributes(node, *_COMMON, *(_QUANTISED if quantised else ()))
    ports = _QMOE if quantised else _MOE
    x, router = float_input(node, 0, "input"), float_input(node, 1, "router_probs")
    if x.rank not in (2, 3):
        raise node.error("input 'input'", got=x, expected="[tokens, hidden] or [batch, tokens, hidden]")
    if node.attr("use_sparse_mixer", 0):
        raise node.error("attribute 'use_sparse_mixer'", got=1, expected=0, hint="export with softmax routing")
    if quantised:
        _check_format(node)
    activation = _activation(node)
    stored = _size(node, ports["fc1"].weights, "fc1_experts_weights", 2)
    hidden = stored * 8 // _bits(node, "fc1") if quantised else stored
    require_shape(node, "input", x, (*x.shape[:-1], hidden))
    x = TensorSpec((*x.shape[:-1], hidden), x.dtype)
    count = _size(node, ports["fc1"].weights, "fc1_experts_weights", 0)
    if count > _MAX_EXPERTS:
        raise node.error("the number of experts", got=count, expected=f"up to {_MAX_EXPERTS}")
    columns = _size(node, ports["fc1"].weights, "fc1_experts_weights", 1)
    fused = activation.kind in _GATED and node.attr("swiglu_fusion", 0) != 0
    if fused and columns % 2:
        raise node.error("input 'fc1_experts_weights'", got=f"{columns} columns", expected="an even number of them")
    inner = columns // 2 if fused else columns
    has_fc3 = node.input(ports["fc3"].weights) is not None
    layout = _layout(node, activation.kind, has_fc3)
    require_dtype(node, "router_probs", router, x.dtype)
    require_shape(node, "router_probs", router, (_product(x.shape[:-1]), count))
    weights = node.input(_ROUTER_WEIGHTS) if quantised else None
    if weights is not None:
        require_dtype(node, "router_weights", weights, x.dtype)
        require_shape(node, "router_weights", weights, (_product(x.shape[:-1]), count))
    chosen = node.attr("k", 1)
    if not 1 <= chosen <= count:
        raise node.error("attribute 'k'", got=chosen, expected=f"1 to the {count} experts")

    def matrix(name: str, columns: int, depth: int) -> Matrix:
        return _matrix(node, name, ports[name], count, columns, depth, x.dtype)

    contract = Experts(
        where=node.where,
        x=x,
        count=count,
        chosen=chosen,
        inner=inner,
        normalise=node.attr("normalize_routing_weights", 0) == 1 or (quantised and weights is None),
        router_weights=_ROUTER_WEIGHTS if weights is not None else None,
        activation=activation,
        layout=layout,
        fc1=matrix("fc1", columns, hidden),
        fc2=matrix("fc2", hidden, inner),
        fc3=matrix("fc3", inner, hidden) if has_fc3 else None,
        constant=False,
    )
    ends = [port for m in contract.matrices for port in (m.weights, m.scales, m.zeros) if port is not None]
    return replace(contract, constant=node.weights.issuperset(ends))


def _check_format(node: Node) -> None:
    """Only integers, in the order in which ONNX describes them."""
    if node.attr("quant_type", "int") != "int":
        raise node.error("attribute 'quant_type'", got=repr(node.attributes["quant_type"]), expected="'int'")
    if node.attr("weights_prepacked", -1) > 0:
        raise node.error(
            "attribute 'weights_prepacked'", got=node.attributes["weights_prepacked"], expected="0 or -1",
            hint="weights packed for one CUDA device are not portable; export without it",
        )  # fmt: skip
    for index, name in enumerate(_OTHER_FORMATS, _ROUTER_WEIGHTS + 1):
        if node.input(index) is not None:
            raise node.error(f"input '{name}' is not supported", hint="quantise the experts to integers")


def _activation(node: Node) -> Activation:
    kind = node.attr("activation_type", "relu")
    if kind not in ACTIVATIONS:
        raise node.error("attribute 'activation_type'", got=repr(kind), expected=" or ".join(ACTIVATIONS))
    limit = node.attr("swiglu_limit", math.inf)
    numbers = {name: node.attr(f"activation_{name}", default) for name, default in (("alpha", 1.0), ("beta", 0.0))}
    for name, value in (*numbers.items(), ("limit", 0.0 if limit == math.inf else limit)):
        if not math.isfinite(value):
            raise node.error(f"the activation's {name}", got=value, expected="a finite number")
    return Activation(
        kind,
        numbers["alpha"],
        numbers["beta"],
        limit,
        node.attr("swiglu_limit_after_activation", 0) == 1,
    )


def _layout(node: Node, kind: str, has_fc3: bool) -> str:
    fusion = node.attr("swiglu_fusion", 0)
    if kind not in _GATED:
        return "separate" if has_fc3 else "plain"
    if fusion not in (0, 1, 2):
        raise node.error("attribute 'swiglu_fusion'", got=fusion, expected="0, 1 or 2")
    if fusion and has_fc3:
        raise node.error("input 'fc3_experts_weights'", got="given", expected=f"none where swiglu_fusion is {fusion}")
    if not fusion and (not has_fc3 or kind == "geglu"):
        raise node.error("attribute 'swiglu_fusion'", got=0, expected="1 or 2, or swiglu with fc3_experts_weights")
    return {0: "separate", 1: "interleaved", 2: "halves"}[fusion]


def _matrix(node: Node, name: str, ports: _Ports, count: int, columns: int, depth: int, dtype: str) -> Matrix:
    weights = node.required(ports.weights, f"{name}_experts_weights")
    bias = node.input(ports.bias)
    if bias is not None:
        require_dtype(node, f"{name}_experts_bias", bias, dtype)
        require_shape(node, f"{name}_experts_bias", bias, (count, columns))
    given = ports.bias if bias is not None else None
    if ports.scales is None:
        require_dtype(node, f"{name}_experts_weights", weights, dtype)
        require_shape(node, f"{name}_experts_weights", weights, (count, columns, depth))
        return Matrix(name, columns, depth, dtype, 0, depth, ports.weights, None, None, given)
    bits = _bits(node, name)
    block = max(node.attr("block_size", 0), 0)
    if block and (block < 16 or block & (block - 1) or depth % block):
        raise node.error(
            "attribute 'block_size'", got=block, expected=f"a power of two from 16 on that divides {depth}"
        )
    if depth * bits % 8:
        raise node.error(f"the depth of {name}", got=f"{depth} weights of {bits} bits", expected="whole bytes")
    scales = node.required(ports.scales, f"{name}_scales")
    require_dtype(node, f"{name}_experts_weights", weights, "i8")
    require_shape(node, f"{name}_experts_weights", weights, (count, columns, depth * bits // 8))
    require_dtype(node, f"{name}_scales", scales, dtype, "f32")
    require_shape(node, f"{name}_scales", scales, (count, columns, depth // block) if block else (count, columns))
    zeros = node.input(ports.zeros) if ports.zeros is not None else None
    if zeros is not None:
        require_dtype(node, f"{name}_zero_points", zeros, "i8")
        shape = (count, columns, -(-depth // block * bits // 8)) if block else (count, -(-columns * bits // 8))
        require_shape(node, f"{name}_zero_points", zeros, shape)
    point = ports.zeros if zeros is not None else None
    return Matrix(name, columns, depth, dtype, bits, block or depth, ports.weights, ports.scales, point, given)


def _bits(node: Node, name: str) -> int:
    """Of a layer's weights."""
    bits = node.attr(f"{name}_expert_weight_bits", node.attr("expert_weight_bits", 4))
    if bits not in (2, 4, 8):
        raise node.error(f"bits of a weight of {name}", got=bits, expected="2, 4 or 8")
    return bits


def _size(node: Node, index: int, name: str, axis: int) -> int:
    spec = node.required(index, name)
    if spec.rank != 3 or not spec.shape[axis]:
        raise node.error(f"input '{name}'", got=spec, expected="three known dimensions")
    return spec.shape[axis] or 0


def _product(shape: Sequence[Dim]) -> Dim:
    return None if None in shape else math.prod(size or 0 for size in shape)


def output_types(contract: Experts) -> Sequence[TensorSpec]:
    """The outputs' types."""
    return [contract.x]
