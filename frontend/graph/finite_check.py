"""A function that tells whether states are finite, so that a device's need not come to the host to be looked at."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx
from linattn.dialect_patterns.node import FLOATS
from linattn.dialect_patterns.not_finite import NOT_FINITE
from linattn.dialect_patterns.op import INTERNAL
from linattn.runtime.manifest import StateSpec
from onnx import TensorProto, helper

from .internal import import_internal
from .schema import spec_of_type
from .specialize import SpecializedGraph

FINITE = "finite"
"""What it is called."""

FINITE_OUTPUT = "linattn.finite"
"""What its results are called, with the number of the state behind."""

STATE_FLOATS = ("float32", "float16", "bfloat16", "float64")
_PART = 1 << 11
"""Elements that one count may go over, where a state has axes enough."""

_LEAST_AXES = 2


def check_finite(graph: SpecializedGraph, states: Sequence[StateSpec]) -> SpecializedGraph | None:
    """The function's graph: what is not finite, counted, i32, for each state of floats.

    Of a cache that is written in place over its last axis, so that rows of a call can be told from others: [B, H, M].
    Of the other states as few leading axes are left as leave a count of 2048 elements at most.

    Args:
        graph: An entry point's graph, whose states have known sizes.
        states: Them.

    Returns:
        The graph; None where there are no such states, or one that it cannot tell of.
    """
    nodes: list[onnx.NodeProto] = []
    outputs: list[onnx.ValueInfoProto] = []
    types: dict[str, onnx.TypeProto] = {}
    for number, state in enumerate(states):
        spec = spec_of_type(graph.types[state.name])
        types[state.name] = graph.types[state.name]
        if spec is None or spec.dtype not in FLOATS or None in spec.shape or spec.rank < _LEAST_AXES:
            continue
        shape = [size or 0 for size in spec.shape]
        kept = len(shape) - 1 if state.in_place else 1
        while kept < len(shape) - 1 and math.prod(shape[kept:]) > _PART:
            kept += 1
        name = f"{FINITE_OUTPUT}.{number}"
        nodes.append(helper.make_node(NOT_FINITE, [state.name], [name], f"{name}.count", domain=INTERNAL, kept=kept))
        types[name] = helper.make_tensor_type_proto(TensorProto.INT32, shape[:kept])
        outputs.append(onnx.ValueInfoProto(name=name, type=types[name]))
    if len(outputs) != sum(state.dtype in STATE_FLOATS for state in states) or not outputs:
        return None
    inputs = [onnx.ValueInfoProto(name=state.name, type=types[state.name]) for state in states]
    made = helper.make_model(helper.make_graph(nodes, FINITE, inputs, outputs))
    import_internal(made)
    return SpecializedGraph(made, types)
