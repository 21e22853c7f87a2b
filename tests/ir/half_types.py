"""Every operator that our patterns lower, as nodes of one model in a 16-bit type: what must compile everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from linattn.dialect_patterns.node import Node, TensorSpec
from linattn.dialect_patterns.op import INTERNAL, MICROSOFT
from linattn.dialect_patterns.registry import OPS, find_op
from onnx import TensorProto, helper, numpy_helper

ELEMENTS = {
    "f32": TensorProto.FLOAT,
    "f16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "i64": TensorProto.INT64,
    "i32": TensorProto.INT32,
    "i8": TensorProto.UINT8,
    "i1": TensorProto.BOOL,
}
HALF = "half"
PAST = -1
"""A dim of a cache: open, the compiler gives it the capacity."""
Input = tuple[str, tuple[int, ...]] | None
"""Element type (`HALF` for the one under test) and shape; None for an input that is left out."""


@dataclass(frozen=True)
class Case:
    """One node.

    Attributes:
        op_type: The operator.
        inputs: Its inputs.
        attributes: Its attributes.
        domain: Its domain.
        outputs: Which of the outputs that it lists are wanted.
        weights: Inputs that are weights of the model.
    """

    op_type: str
    inputs: Sequence[Input]
    attributes: Mapping[str, object] = field(default_factory=dict[str, object])
    domain: str = ""
    outputs: tuple[bool, ...] = (True,)
    weights: frozenset[int] = frozenset()


_TWO, _THREE = (True, True), (True, True, True)


def _half(*shape: int) -> Input:
    return HALF, shape


def cases(tokens: int) -> Iterable[Case]:
    """Every operator, in the forms that have a lowering of their own, for a number of tokens."""
    t = tokens
    for domain, state, rule, decay in (
        ("", HALF, "gated_delta", 2),
        ("", "f32", "gated_delta", 64),
        ("", HALF, "linear", 0),
        (MICROSOFT, "f32", "gated", 2),
        (MICROSOFT, HALF, "gated", 64),
    ):
        gates = [_half(1, t, decay) if decay else None, _half(1, t, 2) if "delta" in rule else None]
        packed = [_half(1, t, 128), _half(1, t, 64), _half(1, t, 64), (state, (1, 2, 32, 32))]
        yield Case("LinearAttention", [*packed, *gates],
                   {"update_rule": rule, "q_num_heads": 4, "kv_num_heads": 2}, domain, _TWO)  # fmt: skip
    for domain in ("", MICROSOFT):
        conv = [_half(1, 64, t), _half(64, 1, 4), _half(64), _half(1, 64, 3)]
        yield Case("CausalConvWithState", conv, {"activation": "silu"}, domain, _TWO, frozenset({1, 2}))
        ids = ("i64", (1, t))
        tables = [_half(128, 8), _half(128, 8)]
        rotary = [_half(1, 2, t, 16), *tables, ids] if not domain else [_half(1, 2, t, 16), ids, *tables]
        yield Case("RotaryEmbedding", rotary, {}, domain)
    heads = [_half(1, 4, t, 32), _half(1, 2, t, 32), _half(1, 2, t, 32)]
    past = [_half(1, 2, PAST, 32), _half(1, 2, PAST, 32)]
    yield Case("Attention", [*heads, None, *past], {"is_causal": 1}, outputs=_THREE)
    yield Case("Attention", [*heads, (HALF, (t, PAST)), *past], {"softcap": 20.0}, outputs=_THREE)
    lengths = [("i32", (1,)), ("i32", (1,))]
    attention = {"num_heads": 4, "kv_num_heads": 2}
    packed = [_half(1, t, 128), _half(1, t, 64), _half(1, t, 64), *past, *lengths]
    yield Case("GroupQueryAttention", packed, attention, MICROSOFT, _THREE)
    rotated = [_half(1, t, 256), None, None, *past, *lengths, _half(64, 16), _half(64, 16)]
    norms = [*rotated, *(7 - len(rotated[7:])) * [None], _half(32), _half(32)]
    yield Case("GroupQueryAttention", norms, {**attention, "do_rotary": 1}, MICROSOFT, _THREE)
    rows = _half(1, t, 64)
    yield Case("RMSNormalization", [rows, _half(64)], weights=frozenset({1}))
    yield Case("RMSNormalization", [_half(1, t, 4, 16), _half(16)])
    for domain in ("", MICROSOFT):
        yield Case("SimplifiedLayerNormalization", [rows, _half(64)], {}, domain)
    yield Case("SkipSimplifiedLayerNormalization", [rows, rows, _half(64)], {}, MICROSOFT, (True, False, False, True))
    yield Case("SkipSimplifiedLayerNormalization", [rows, rows, _half(64), _half(64)], {}, MICROSOFT)
    yield Case("GatedRMSNorm", [rows, _half(16), rows], {}, MICROSOFT)
    yield Case("GatedRMSNorm", [rows, _half(16), rows], {"activation": "sigmoid"}, MICROSOFT)
    yield Case("LpNormalization", [rows], {"axis": -1, "p": 2})
    gate = [_half(1, t, 4), ("f32", (4,)), ("f32", (4,)), _half(1, t, 4)]
    yield Case("LinearAttentionGate", gate, {}, MICROSOFT, _TWO, frozenset({1, 2}))
    yield Case("MatMul", [rows, _half(64, 96)], weights=frozenset({1}))
    yield Case("MatMul", [rows, _half(64, 100)])
    for bits, block in ((4, 32), (8, 16), (2, 64)):
        packed_weight = ("i8", (96, 64 // block, block * bits // 8))
        zeros = ("i8", (96, -(-(64 // block) * bits // 8)))
        weights = [rows, packed_weight, _half(96, 64 // block), zeros]
        yield Case("MatMulNBits", weights, {"K": 64, "N": 96, "bits": bits, "block_size": block}, MICROSOFT,
                   weights=frozenset({1, 2, 3}))  # fmt: skip
    streams = [_half(1, t, 64), ("i64", (3, 1, t)), *tables]
    rotated_heads = {"num_heads": 4, "mrope_section": [4, 2, 2], "mrope_layout": 1}
    yield Case("MRotaryEmbedding", streams, rotated_heads, MICROSOFT)
    scattered = [_half(1, 2, 64, 32), _half(1, 2, t, 32), ("i64", (1,))]
    yield Case("TensorScatter", scattered, {"mode": "circular"})
    yield Case("Softmax", [_half(1, 4, t, 64)])
    table = [("i8", (500, 32)), ids, _half(500, 2)]
    packing = {"bits": 4, "block_size": 32, "gather_axis": 0, "quantize_axis": 1}
    yield Case("GatherBlockQuantized", table, packing, MICROSOFT, weights=frozenset({0, 2}))
    yield Case("GatedAdd", [rows, rows, _half(1, t, 1)], {}, MICROSOFT)
    experts = [rows, _half(t, 4), _half(4, 128, 64), _half(4, 128), _half(4, 64, 64), _half(4, 64)]
    mixture = {"activation_type": "swiglu", "k": 2, "normalize_routing_weights": 1, "swiglu_fusion": 1}
    yield Case("MoE", experts, mixture, MICROSOFT, weights=frozenset({2, 3, 4, 5}))
    first = [("i8", (4, 128, 32)), _half(4, 128, 2), _half(4, 128)]
    second = [("i8", (4, 64, 32)), _half(4, 64, 2), _half(4, 64)]
    yield Case("QMoE", [rows, _half(t, 4), *first, *second],
               {**mixture, "block_size": 32, "expert_weight_bits": 4}, MICROSOFT,
               weights=frozenset(range(2, 8)))  # fmt: skip


def all_cases() -> list[Case]:
    """Of one token, for which GPUs have kernels of their own, and of a prompt."""
    return [*cases(1), *cases(32)]


def untried() -> set[tuple[str, str]]:
    """Operators of the registry that no case is of."""
    tried = {(case.domain, case.op_type) for case in all_cases()}
    return {(op.domain, op.op_type) for op in OPS if op.domain != INTERNAL} - tried


def model(dtype: str, chosen: Sequence[Case]) -> onnx.ModelProto:
    """The nodes side by side, each with inputs and outputs of its own."""
    graph = onnx.GraphProto(name="half")
    for index, case in enumerate(chosen):
        name = f"{case.op_type}_{index}"
        specs = [None if one is None else _spec(one, dtype) for one in case.inputs]
        names = ["" if spec is None else f"x{i}.{name}" for i, spec in enumerate(specs)]
        for i, spec in enumerate(specs):
            if spec is not None and i in case.weights:
                graph.initializer.append(_weight(names[i], spec))
            elif spec is not None:
                graph.input.append(_value(names[i], spec, "past"))
        version = 1 if case.domain else 27
        used = case.outputs
        node = Node(name, case.domain, case.op_type, version, tuple(specs), len(used), case.attributes, used)
        op = find_op(case.domain, case.op_type, version)
        assert op is not None
        outputs = op.output_types(op.parse(node))
        results = ["" if spec is None else f"y{i}.{name}" for i, spec in enumerate(outputs)]
        for result, spec in zip(results, outputs, strict=True):
            if spec is not None:
                graph.output.append(_value(result, spec, "total"))
        made = helper.make_node(case.op_type, names, results, name, domain=case.domain, **case.attributes)
        graph.node.append(made)
    opsets = [helper.make_opsetid("", 27), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=12)


def _spec(one: tuple[str, tuple[int, ...]], dtype: str) -> TensorSpec:
    kind, shape = one
    return TensorSpec(tuple(None if size == PAST else size for size in shape), dtype if kind == HALF else kind)


def _value(name: str, spec: TensorSpec, open_dim: str) -> onnx.ValueInfoProto:
    shape = [open_dim if size is None else size for size in spec.shape]
    return helper.make_tensor_value_info(name, ELEMENTS[spec.dtype], shape)


def _weight(name: str, spec: TensorSpec) -> onnx.TensorProto:
    values = np.random.default_rng(len(name)).uniform(1, 9, [size or 0 for size in spec.shape])
    element = ELEMENTS[spec.dtype]
    return numpy_helper.from_array(values.astype(helper.tensor_dtype_to_np_dtype(element)), name)
