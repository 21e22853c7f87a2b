"""The convolution that makes queries, keys and values becomes part of LinearAttention's kernel, for one token.

Of what exporters write between the two, transposes and the split move nothing where there is one token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
from linattn.dialect_patterns.causal_conv.contract import CausalConv
from linattn.dialect_patterns.linear_attention.convolved import (
    ACTIVATION,
    CONVOLVED_LINEAR_ATTENTION,
    KEY_HEADS,
    can_join,
)
from linattn.dialect_patterns.linear_attention.gated import GatedLinearAttention
from linattn.dialect_patterns.op import INTERNAL, LoweringOptions
from linattn.dialect_patterns.target import Target

from .drop_unused import drop_unused
from .schema import attributes_of, check_contracts, domain_of, spec_of_type
from .specialize import SpecializedGraph

_PARTS = 3
_MOVES = ("Transpose", "Reshape")


def join_convolutions(
    graph: SpecializedGraph, versions: Mapping[str, int], target: Target, options: LoweringOptions
) -> SpecializedGraph:
    """The graph with such nodes.

    Args:
        graph: An entry point's graph, whose gates are joined; not changed.
        versions: Domain -> opset version.
        target: The machine; on one without such a kernel nothing is joined.
        options: What the user asked of the lowering.
    """
    if not target.is_gpu:
        return graph
    model = graph.copied()
    finder = _Finder(graph, model.graph, check_contracts(model.graph, graph.types, versions))
    gone: set[str] = set()
    for node in model.graph.node:
        attention = finder.contracts.get(node.name)
        if not isinstance(attention, GatedLinearAttention):
            continue
        found = finder.convolution(node)
        if found is not None and can_join(attention, finder.contracts[found.name], target, options):
            gone.add(found.name)
            _join(node, attention, found, finder.contracts[found.name])
    nodes = [node for node in model.graph.node if node.name not in gone]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    drop_unused(model.graph)
    return SpecializedGraph(model, graph.types)


def _join(
    node: onnx.NodeProto, attention: GatedLinearAttention, before: onnx.NodeProto, convolution: CausalConv
) -> None:
    """Changes a node in place; what is between it and the convolution is left behind."""
    attributes = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
    attributes |= {KEY_HEADS: attention.attention.k_heads, ACTIVATION: convolution.activation}
    inputs = [*before.input, *node.input[_PARTS:]]
    outputs = [*node.output, before.output[1]]
    joined = onnx.helper.make_node(
        CONVOLVED_LINEAR_ATTENTION, inputs, outputs, node.name, domain=INTERNAL, **attributes
    )
    node.CopyFrom(joined)


class _Finder:
    """Looks what values of a graph are made of."""

    def __init__(self, graph: SpecializedGraph, proto: onnx.GraphProto, contracts: Mapping[str, Any]) -> None:
        self.contracts, self._types = contracts, graph.types
        self._made_by = {name: node for node in proto.node for name in node.output if name}
        self._kept = {value.name for value in proto.output}
        self._readers: dict[str, int] = {}
        for name in (name for node in proto.node for name in node.input):
            self._readers[name] = self._readers.get(name, 0) + 1

    def convolution(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """The convolution whose columns are a node's queries, keys and values, and nothing else's."""
        parts = [self._source(name) for name in node.input[:_PARTS]]
        split = self._made_by.get(parts[0])
        if split is None or list(split.output) != parts or not self._is_of_columns(split) or not all(node.output):
            return None
        found = self._made_by.get(self._source(split.input[0]))
        is_whole = found is not None and isinstance(self.contracts.get(found.name), CausalConv)
        if found is None or not is_whole or len(found.input) <= _PARTS or len(found.output) != len(node.output):
            return None
        return found if all(found.output) and found.output[1] not in self._readers else None

    def _is_of_columns(self, node: onnx.NodeProto) -> bool:
        """Whether a node cuts the channels of one token."""
        axis, x = attributes_of(node).get("axis", 0), spec_of_type(self._types.get(node.input[0]))
        if node.op_type != "Split" or domain_of(node) != "" or x is None or x.rank != _PARTS or 1 not in x.shape[1:]:
            return False
        return isinstance(axis, int) and axis % _PARTS > 0 and x.shape[axis] != 1

    def _source(self, name: str) -> str:
        """What a value of one token is moved from, each step read once; "" where others read it."""
        while self._readers.get(name) == 1 and name not in self._kept:
            node = self._made_by.get(name)
            if node is None or node.op_type not in _MOVES or domain_of(node) != "":
                return name
            shapes = [spec_of_type(self._types.get(one)) for one in (node.input[0], name)]
            if any(shape is None or shape.rank != _PARTS or 1 not in shape.shape[1:] for shape in shapes):
                return name
            name = node.input[0]
        return ""
