"""What each node takes is what ONNX says it takes: element types, axes, ranks; IREE's conversions rely on it.

ONNX's inference of a whole model passes over nodes that break their rules, and what declares types afterwards hides
them; IREE 3.13 then ends its process (a list of axes that is a float), or never ends (Softmax of integers). Operators
of ours have contracts, which say more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import onnx
from linattn.dialect_patterns.node import TensorSpec
from linattn.dialect_patterns.registry import find_op
from linattn.runtime.errors import UnsupportedModelError
from onnx import numpy_helper

from .schema import MAX_PROPAGATED, domain_of, spec_of_type
from .specialize import SpecializedGraph

_REDUCTIONS = """
    ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare
"""
_LISTS = {
    **dict.fromkeys(_REDUCTIONS.split(), (1,)),
    "Expand": (1,), "Reshape": (1,), "Slice": (1, 2, 3, 4), "Split": (1,),
}  # fmt: skip
"""Operator -> inputs that must have one axis, which ONNX's own inference does not look at."""

_SINGLE = {"CumSum": 1, "Trilu": 1}
"""Operator -> input that must have one element."""

_AXIS = {"GatherElements": 0, "LayerNormalization": -1, "ScatterElements": 0}
"""Operator -> default of its attribute 'axis', which ONNX's own inference does not look at."""

_GROUPS = {"Conv": "group", "ConvInteger": "group", "GroupNormalization": "num_groups"}
"""Operator -> attribute that divides the channels of its first input."""


def check_operands(graph: SpecializedGraph, versions: Mapping[str, int]) -> None:
    """Refuse the first node of ONNX's own that breaks the rules of its operator.

    Args:
        graph: The graph of an entry point, with all types.
        versions: Domain -> opset version.

    Raises:
        UnsupportedModelError: naming the node and the rule.
    """
    version = versions.get("", 1)
    imports = [onnx.helper.make_opsetid(domain, number) for domain, number in versions.items()]
    values = {
        t.name: t
        for t in graph.proto.graph.initializer
        if math.prod(t.dims) <= MAX_PROPAGATED and t.data_location != onnx.TensorProto.EXTERNAL
    }
    for node in graph.proto.graph.node:
        is_foreign = domain_of(node) != "" or not onnx.defs.has(node.op_type, version)
        if is_foreign or find_op("", node.op_type, version) is not None:
            continue
        inputs = [name for name in node.input if name]
        types = {name: graph.types[name] if name in graph.types else _type_of(values[name]) for name in inputs}
        specs = [spec_of_type(types[name]) if name else None for name in node.input]
        _check_rules(node, specs, values)
        schema = onnx.defs.get_schema(node.op_type, version)
        try:
            onnx.shape_inference.infer_node_outputs(schema, node, types, values, opset_imports=imports)
        except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
            raise _error(node, f"not valid ONNX: {' '.join(str(error).split())[:400]}", _shown(specs)) from error


def _check_rules(
    node: onnx.NodeProto, specs: Sequence[TensorSpec | None], values: Mapping[str, onnx.TensorProto]
) -> None:
    """What ONNX's own inference does not look at."""
    op, attributes = node.op_type, {a.name: a.i for a in node.attribute}
    first = specs[0] if specs else None
    for port, spec in enumerate(specs):
        if spec is None:
            continue
        name = node.input[port]
        if port in _LISTS.get(op, ()) and spec.rank != 1:
            raise _error(node, f"its input '{name}' must be a list", spec, "one axis")
        if _SINGLE.get(op) == port and math.prod(size or 1 for size in spec.shape) != 1:
            raise _error(node, f"its input '{name}' must be a number", spec, "one element")
    if op in _AXIS and first is not None and not -first.rank <= attributes.get("axis", _AXIS[op]) < first.rank:
        raise _error(node, "attribute 'axis'", attributes.get("axis"), f"an axis of {first}")
    if op in _GROUPS and first is not None and first.rank > 1:
        groups, channels = attributes.get(_GROUPS[op], 1), first.shape[1]
        if groups < 1 or (channels or 0) % groups:
            raise _error(node, f"attribute '{_GROUPS[op]}'", groups, f"a divisor of the channels of {first}")
    if op == "Slice" and len(node.input) > 4 and node.input[4] in values:
        steps = numpy_helper.to_array(values[node.input[4]])
        if not steps.all():
            raise _error(node, "a step of 0", steps.tolist())


def _error(node: onnx.NodeProto, what: str, got: object, expected: str | None = None) -> UnsupportedModelError:
    return UnsupportedModelError(
        what, where=f"node '{node.name}' ({node.op_type})", got=got, expected=expected, hint="export the model again"
    )


def _shown(specs: Sequence[TensorSpec | None]) -> str | None:
    return ", ".join(str(spec) for spec in specs if spec is not None) or None


def _type_of(tensor: onnx.TensorProto) -> onnx.TypeProto:
    return onnx.helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
