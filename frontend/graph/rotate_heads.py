"""A rotary embedding becomes one node with the norm and the casts around it, for prompts on CPUs.

It reads its heads where a product left them: of what Splits cut out only parts that something else reads are copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
from linattn.dialect_patterns.node import TensorSpec
from linattn.dialect_patterns.norms.rms_normalization import RMSNormalization
from linattn.dialect_patterns.norms.simplified_layer_normalization import SimplifiedLayerNormalization
from linattn.dialect_patterns.op import INTERNAL
from linattn.dialect_patterns.rotary.m_rotary_embedding import MRotaryEmbedding
from linattn.dialect_patterns.rotary.rotary_embedding import RotaryEmbedding
from linattn.dialect_patterns.rotary.rotated_heads import ROTATED_HEADS, can_rotate
from linattn.dialect_patterns.target import Target

from .drop_unused import drop_unused
from .places import Places
from .schema import attributes_of, check_contracts, domain_of
from .specialize import SpecializedGraph


def rotate_heads(graph: SpecializedGraph, versions: Mapping[str, int], target: Target) -> SpecializedGraph:
    """The graph with such nodes.

    Args:
        graph: An entry point's graph; not changed.
        versions: Domain -> opset version.
        target: The machine; on one without such a kernel nothing changes.
    """
    if target.is_gpu:
        return graph
    model = graph.copied()
    finder = _Finder(graph, model.graph, check_contracts(model.graph, graph.types, versions))
    gone: set[str] = set()
    for node in model.graph.node:
        contract = finder.contracts.get(node.name)
        if isinstance(contract, MRotaryEmbedding | RotaryEmbedding) and can_rotate(contract.rotation, target):
            made = finder.made(node, contract)
            gone.update(other.name for other in model.graph.node if other is not node and other.output == made.output)
            node.CopyFrom(made)
    kept = [node for node in model.graph.node if node.name not in gone]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    drop_unused(model.graph)
    return SpecializedGraph(model, graph.types)


class _Finder:
    """Looks what values of a graph are made of."""

    def __init__(self, graph: SpecializedGraph, proto: onnx.GraphProto, contracts: Mapping[str, Any]) -> None:
        self.contracts, self._places = contracts, Places(proto, graph.types)
        self._kept = {value.name for value in proto.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in proto.node:
            for name in dict.fromkeys(node.input):
                self._readers.setdefault(name, []).append(node)

    def made(self, node: onnx.NodeProto, contract: MRotaryEmbedding | RotaryEmbedding) -> onnx.NodeProto:
        """The node for a rotary embedding."""
        rotation = contract.rotation
        heads, size = rotation.heads or 0, rotation.head_size or 0
        inner, result = self._without_casts(node)
        spec = self._places.spec(result)
        source, gamma, epsilon = self._normed(inner, size, "" if spec is None else spec.dtype)
        found = self._places.columns(source, inner, heads, size)
        if found is None:
            found, gamma = (inner, 0, size), ""
        source, start, stride = found
        attributes: dict[str, Any] = attributes_of(node) | {
            "operator": node.op_type, "operator_domain": domain_of(node), "num_heads": heads, "size": size,
            "start": start, "stride": stride, **({"epsilon": epsilon} if gamma else {}),
        }  # fmt: skip
        inputs = [source, *node.input[1:], *([gamma] if gamma else [])]
        return onnx.helper.make_node(ROTATED_HEADS, inputs, [result], node.name, domain=INTERNAL, **attributes)

    def _without_casts(self, node: onnx.NodeProto) -> tuple[str, str]:
        """What is rotated and the result: of another type, where casts from and to that stand around the node."""
        x, y = node.input[0], node.output[0]
        before, readers = self._places.maker(x), self._readers.get(y, [])
        if before is None or before.op_type != "Cast" or domain_of(before) != "" or y in self._kept:
            return x, y
        after = readers[0] if len(readers) == 1 else None
        if (
            after is None
            or after.op_type != "Cast"
            or self._places.spec(after.output[0]) != self._places.spec(before.input[0])
        ):
            return x, y
        return before.input[0], after.output[0]

    def _normed(self, name: str, size: int, dtype: str) -> tuple[str, str, float]:
        """What heads are the norm of, weights and epsilon; themselves where they are none."""
        node = self._places.maker(self._places.reshaped(name))
        contract = None if node is None else self.contracts.get(node.name)
        if isinstance(contract, SimplifiedLayerNormalization) and not contract.with_inverse:
            contract = contract.norm
        if node is None or not isinstance(contract, RMSNormalization):
            return name, "", 0.0
        x, scale = contract.x, contract.scale
        if contract.axis != x.rank - 1 or x.shape[-1] != size or scale != TensorSpec((size,), x.dtype):
            return name, "", 0.0
        return (node.input[0], node.input[1], contract.epsilon) if x.dtype == dtype else (name, "", 0.0)
