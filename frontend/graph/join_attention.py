"""What stands around softmax attention becomes part of its kernels, for one token on GPUs.

Exporters write the norms and rotary embeddings of queries and keys, and a gate of the output, as nodes of their own:
with the two rows that are written into the caches nine dispatches of a step beside attention's two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx
from linattn.dialect_patterns.attention import step
from linattn.dialect_patterns.attention.group_query import GroupQueryAttention
from linattn.dialect_patterns.node import Node
from linattn.dialect_patterns.norms.rms_normalization import RMSNormalization
from linattn.dialect_patterns.norms.simplified_layer_normalization import SimplifiedLayerNormalization
from linattn.dialect_patterns.op import INTERNAL
from linattn.dialect_patterns.rotary.m_rotary_embedding import MRotaryEmbedding
from linattn.dialect_patterns.rotary.rotary_embedding import Positions, RotaryEmbedding
from linattn.dialect_patterns.target import Target

from .drop_unused import drop_unused
from .schema import attributes_of, check_contracts, domain_of, spec_of_type
from .specialize import SpecializedGraph

_QUERY, _KEY, _VALUE, _PAST_KEY, _PAST_VALUE, _OTHERS = 0, 1, 2, 3, 4, 7
_WIDTH = 4
"""Elements that a gate is read by."""


def join_attention(graph: SpecializedGraph, versions: Mapping[str, int], target: Target) -> SpecializedGraph:
    """The graph with such nodes.

    Args:
        graph: An entry point's graph; not changed.
        versions: Domain -> opset version.
        target: The machine; on one without such kernels nothing is joined.
    """
    if not target.is_gpu or all(node.op_type != "GroupQueryAttention" for node in graph.proto.graph.node):
        return graph
    model = graph.copied()
    finder = _Finder(graph, model.graph, check_contracts(model.graph, graph.types, versions))
    places: dict[str, onnx.NodeProto | None] = {node.name: node for node in model.graph.node}
    for node in model.graph.node:
        contract = finder.contracts.get(node.name)
        made = finder.joined(node, contract) if isinstance(contract, GroupQueryAttention) else None
        if made is not None and step.can_join(step.parse(finder.view(made)), target):
            places[node.name] = None
            places[finder.maker(made.output[0]).name] = made  # where all that it reads is there
    kept = [node for node in places.values() if node is not None]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    drop_unused(model.graph)
    return SpecializedGraph(model, graph.types)


@dataclass(frozen=True)
class _Head:
    """What queries or keys are made of.

    Attributes:
        source: What is normalised, or rotated without a norm.
        ids: Positions, cosines and sines.
        turning: Attributes of the rotary embedding.
        gamma: Weights of the norm; "": there is none.
        epsilon: Of the norm.
    """

    source: str
    ids: tuple[str, str, str]
    turning: Mapping[str, Any]
    gamma: str
    epsilon: float


class _Finder:
    """Looks what values of a graph are made of."""

    def __init__(self, graph: SpecializedGraph, proto: onnx.GraphProto, contracts: Mapping[str, Any]) -> None:
        self.contracts, self._types = contracts, graph.types
        self._made_by = {name: node for node in proto.node for name in node.output}
        self._kept = {value.name for value in proto.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in proto.node:
            for name in dict.fromkeys(node.input):
                self._readers.setdefault(name, []).append(node)

    def maker(self, name: str) -> onnx.NodeProto:
        """The node that makes a value."""
        return self._made_by[name]

    def view(self, node: onnx.NodeProto) -> Node:
        """The node as its operator sees it."""
        inputs = tuple(spec_of_type(self._types.get(name)) if name else None for name in node.input)
        return Node(node.name, INTERNAL, node.op_type, 1, inputs, len(node.output), attributes_of(node))

    def joined(self, node: onnx.NodeProto, contract: GroupQueryAttention) -> onnx.NodeProto | None:
        """The node for an attention node of one token and what stands around it; None where it is of another kind."""
        heads, given = contract.heads, contract
        plain = (
            contract.capacity and contract.length == 1 and not (contract.packed or contract.sinks or contract.masked)
        )
        own = contract.rotation is not None or contract.norm_epsilons is not None or any(node.input[_OTHERS:])
        if not plain or own or None in (heads.batch, contract.past) or not all(node.output[:3]):
            return None
        if any(name in self._readers for name in node.output[1:3]):
            return None
        query, key = self._head(node.input[_QUERY], heads.q), self._head(node.input[_KEY], heads.kv)
        if query is None or key is None or (query.ids, query.turning) != (key.ids, key.turning):
            return None
        if bool(query.gamma) != bool(key.gamma):
            return None
        source, start, stride = self._columns(query.source, heads.q, heads.dk)
        attributes: dict[str, Any] = {
            **query.turning, "num_heads": heads.q, "scale": given.scale, "softcap": given.softcap,
            "left": -1 if given.window is None else given.window, "query_start": start, "query_stride": stride,
            "q_epsilon": query.epsilon, "k_epsilon": key.epsilon,
        }  # fmt: skip
        inputs = [source, key.source, *node.input[_VALUE : _PAST_VALUE + 1], *query.ids, query.gamma, key.gamma]
        output, gate = self._gate(node.output[0])
        if gate:
            found, start, stride = self._columns(gate, heads.q, heads.dk)
            if start % _WIDTH or stride % _WIDTH:
                return None
            inputs, attributes = [*inputs, found], {**attributes, "gate_start": start, "gate_stride": stride}
        outputs = [output, *node.output[1:3]]
        return onnx.helper.make_node(step.ATTENTION_STEP, inputs, outputs, node.name, domain=INTERNAL, **attributes)

    def _head(self, name: str, heads: int) -> _Head | None:
        """How queries or keys were rotated, maybe in f32 for it, and normalised before."""
        node = self._made_by.get(self._cast_of(name))
        contract = None if node is None else self.contracts.get(node.name)
        turning: dict[str, Any] = {}
        if isinstance(contract, MRotaryEmbedding):
            streams, ids = contract.streams, (1, 2, 3)
            turning = {"sections": list(streams.sections), "interleaved_sections": int(streams.interleaved)}
            turning["rotary_scale"] = contract.scale
        elif isinstance(contract, RotaryEmbedding) and contract.positions is not Positions.IN_CACHE:
            ids = contract.inputs
        else:
            return None
        assert node is not None
        rotation, cache = contract.rotation, spec_of_type(self._types.get(node.input[ids[1]]))
        if rotation.x.rank != 3 or rotation.heads != heads or cache is None or cache.rank != 2 or None in cache.shape:
            return None
        turning |= {"rotated": rotation.rotated, "interleaved": int(rotation.interleaved)}
        want, inner = spec_of_type(self._types.get(name)), node.input[0]
        if rotation.x != want:
            inner = self._cast_of(inner)
            if rotation.x.dtype != "f32" or spec_of_type(self._types.get(inner)) != want:
                return None
        source, gamma, epsilon = self._normed(inner, heads, rotation.head_size)
        position, cos, sin = (node.input[i] for i in ids)
        return _Head(source, (position, cos, sin), turning, gamma, epsilon)

    def _normed(self, name: str, heads: int, size: int | None) -> tuple[str, str, float]:
        """What a value [B, 1, heads * size] is the norm of by heads, weights and epsilon; itself where it is none."""
        node = self._made_by.get(self._reshaped(name))
        contract = None if node is None else self.contracts.get(node.name)
        if isinstance(contract, SimplifiedLayerNormalization) and not contract.with_inverse:
            contract = contract.norm
        if node is None or not isinstance(contract, RMSNormalization):
            return name, "", 0.0
        x, scale = contract.x, contract.scale
        if contract.axis != x.rank - 1 or x.shape[-1] != size or scale.shape != (size,) or scale.dtype != x.dtype:
            return name, "", 0.0
        inner = self._reshaped(node.input[0])
        want, found = spec_of_type(self._types.get(name)), spec_of_type(self._types.get(inner))
        return (inner if found == want else node.input[0]), node.input[1], contract.epsilon

    def _columns(self, name: str, heads: int, size: int) -> tuple[str, int, int]:
        """Where a value [.., heads * size] of one token lies: in what, from where on, and how far heads are apart."""
        part = self._reshaped(name)
        node = self._made_by.get(part)
        spec = spec_of_type(self._types.get(part))
        if node is None or node.op_type != "Split" or domain_of(node) != "" or spec is None:
            return name, 0, size
        whole = spec_of_type(self._types.get(node.input[0]))
        axis = attributes_of(node).get("axis", 0)
        if whole is None or axis not in (-1, whole.rank - 1) or spec.shape[-2:] != (heads, size):
            return name, 0, size
        widths = [spec_of_type(self._types.get(other)) for other in node.output]
        starts = [0]
        for width in widths:
            starts.append(starts[-1] + ((width.shape[-1] or 0) if width is not None else 0))
        start, source = starts[list(node.output).index(part)], self._reshaped(node.input[0])
        flat = spec_of_type(self._types.get(source))
        if flat is None or flat.rank != 3 or flat.shape[1:] != (1, heads * (whole.shape[-1] or 0)):
            return name, 0, size
        return source, start, whole.shape[-1] or 0

    def _gate(self, name: str) -> tuple[str, str]:
        """The output times the logistic function of a gate, and the gate; the output and "" where that is not read."""
        readers = self._readers.get(name, [])
        times = readers[0] if len(readers) == 1 and name not in self._kept else None
        if times is None or times.op_type != "Mul" or domain_of(times) != "":
            return name, ""
        others = [other for other in times.input if other != name]
        sigmoid = self._made_by.get(others[0]) if len(others) == 1 else None
        if sigmoid is None or sigmoid.op_type != "Sigmoid" or domain_of(sigmoid) != "":
            return name, ""
        same = spec_of_type(self._types.get(name)) == spec_of_type(self._types.get(sigmoid.input[0]))
        return (times.output[0], sigmoid.input[0]) if same else (name, "")

    def _cast_of(self, name: str) -> str:
        """What a value is in another type; itself where it is none."""
        node = self._made_by.get(name)
        return node.input[0] if node is not None and node.op_type == "Cast" and domain_of(node) == "" else name

    def _reshaped(self, name: str) -> str:
        """What a value is another shape of."""
        node = self._made_by.get(name)
        return node.input[0] if node is not None and node.op_type == "Reshape" and domain_of(node) == "" else name
