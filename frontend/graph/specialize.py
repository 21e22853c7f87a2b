"""Binds dimensions of a graph and folds what becomes constant, so that the importer sees static shapes.

A graph with every dim bound ends with no ``Shape`` arithmetic at all; with open dims what depends on them stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from linattn.runtime.errors import UnsupportedModelError

from ..plan.dims import evaluate
from .branches import choose_branches, refuse_open_branches
from .constants import constants_to_initializers
from .drop_unused import drop_unused
from .explicit_reshapes import explicit_reshapes
from .fold_constants import fold_constants
from .internal import import_internal
from .schema import CAPACITY, check_contracts, infer_types, opset_versions, spec_of_type
from .slices import explicit_slices
from .states import StatePair

MAX_FOLDING_ROUNDS = 64
"""A chain in which each result's size depends on the one before takes a round a link, and inference each time."""


@dataclass
class SpecializedGraph:
    """One entry point's graph.

    Attributes:
        proto: The model with bound dims and folded constants; unused nodes and initializers are gone.
        types: Type of every value.
    """

    proto: onnx.ModelProto
    types: dict[str, onnx.TypeProto]

    def copied(self) -> onnx.ModelProto:
        """The model once more, for a pass to change; it may hold operators of our own."""
        model = onnx.ModelProto()
        model.CopyFrom(self.proto)
        import_internal(model)
        return model


def specialize(
    proto: onnx.ModelProto,
    sizes: Mapping[str, int],
    state_types: Mapping[str, onnx.TypeProto],
    capacity_states: Iterable[StatePair],
    weights: Mapping[str, np.ndarray[Any, Any]] | None = None,
) -> SpecializedGraph:
    """Bind symbols and fold constants.

    Args:
        proto: The model; not changed. External weights need not be loaded.
        sizes: Symbol -> size. Symbols that are left out stay open.
        state_types: Graph input or output name -> its type, for states whose declared shapes are not precise.
        capacity_states: KV caches that are buffers of fixed capacity: their nodes are marked, and the present value
            has the past's shape.
        weights: Initializer name -> values, of those that lie outside the graph; small ones are folded too.

    Raises:
        UnsupportedModelError: if a node's output type cannot be found, or a constant one not computed.
    """
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    graph = model.graph
    for name, tensor_type in state_types.items():
        for value in (*graph.input, *graph.output):
            if value.name == name:
                value.type.CopyFrom(tensor_type)
    for value in (*graph.input, *graph.output, *graph.value_info):
        _bind(value.type, sizes)
    present = _mark_capacity(graph, list(capacity_states))
    constants_to_initializers(graph)
    types = _infer(model, present)
    for _ in range(MAX_FOLDING_ROUNDS):
        folded = fold_constants(graph, types, weights or {})
        if not (choose_branches(graph) or folded):
            break
        types = _infer(model, present)
    drop_unused(graph)
    refuse_open_branches(graph)
    explicit_reshapes(graph, types)
    explicit_slices(graph, types)
    drop_unused(graph)
    check_contracts(graph, types, opset_versions(model))  # its errors say more than a missing type further down
    for node in graph.node:
        for name in node.output:
            spec = spec_of_type(types.get(name)) if name else None
            if spec is not None and any(size is not None and size < 0 for size in spec.shape):
                raise UnsupportedModelError(
                    f"its output '{name}' has a negative size",
                    where=f"node '{node.name}' ({node.op_type})",
                    got=spec,
                    expected="sizes of 0 or more",
                    hint="export the model again, or compile with larger --prefill-blocks",
                )
            if name and spec is None:
                raise UnsupportedModelError(
                    f"the shape of its output '{name}' cannot be inferred",
                    where=f"node '{node.name}' ({node.op_type})",
                    hint="run the exporter's shape inference first",
                )
    return SpecializedGraph(model, types)


def _bind(proto: onnx.TypeProto, sizes: Mapping[str, int]) -> None:
    for dim in proto.tensor_type.shape.dim:
        if dim.HasField("dim_param"):
            size = evaluate(dim.dim_param, sizes)
            if size is not None:
                dim.dim_value = size


def _mark_capacity(graph: onnx.GraphProto, states: list[StatePair]) -> dict[str, str]:
    """Mark attention nodes whose cache has a fixed capacity; returns present value -> past input."""
    names = {state.node for state in states}
    for node in graph.node:
        if node.name in names:
            node.attribute.append(onnx.helper.make_attribute(CAPACITY, 1))
    return {state.present: state.past for state in states}


def _infer(model: onnx.ModelProto, present: Mapping[str, str]) -> dict[str, onnx.TypeProto]:
    """Types of all values.

    Args:
        model: The model.
        present: Present values of fixed-capacity caches -> past input, whose type they have (the operator's own
            inference would say past + T).
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    for node in probe.graph.node:
        for i, name in enumerate(node.output):
            if name in present:
                node.output[i] = ""
    kept = [v for v in probe.graph.output if v.name not in present]
    del probe.graph.output[:]
    probe.graph.output.extend(kept)
    types = infer_types(probe)
    for name, past in present.items():
        types[name] = types[past]
    return types
