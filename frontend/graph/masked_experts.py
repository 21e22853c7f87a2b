"""Every expert computed and masked, as mobius writes mixtures of experts, becomes one node for the chosen ones.

    sum over e of  expert_e(x) * ReduceSum(w * Cast(s == e), -1)    ->  ChosenExperts(x, s, w, W1, W2, W3)

    expert_e(x) = (act(x W1_e) * (x W3_e)) W2_e   or   act(x W1_e) W2_e        MatMul or MatMulNBits with weights

E products become the k that count, and E times ten nodes one. The experts' weights are stacked; the sums are the same
but for experts that were not chosen, which count nothing even where they are not finite. A mixture that is not quite
this is left alone, and the report says which node was in the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from linattn.dialect_patterns.experts.given import CHOSEN_EXPERTS
from linattn.dialect_patterns.op import INTERNAL, MICROSOFT
from onnx import numpy_helper

from ..model import LoadedModel
from .drop_unused import drop_unused
from .schema import attributes_of, domain_of, is_weight

_LEAST_EXPERTS = 2
_SWISH = "Swish"


class _MissError(Exception):
    """Why a mixture is left alone."""


@dataclass(frozen=True)
class _Linear:
    """A product with weights: the stored arrays' names, and how they are packed.

    ``expert`` is the slice of arrays that hold all experts, ``part`` which half of the columns.
    """

    source: str
    names: tuple[str, ...]
    bits: int = 0
    block_size: int = 0
    expert: int | None = None
    part: int | None = None


@dataclass(frozen=True)
class _Expert:
    activation: str
    gate: _Linear
    down: _Linear
    factor: _Linear | None


def raise_masked_experts(model: LoadedModel) -> list[str]:
    """Change the model's graph, in place.

    Returns:
        What to tell in the report: how many mixtures there were, and what was in the way of others.
    """
    found = _Mixtures(model)
    if found.count:
        if all(opset.domain != INTERNAL for opset in model.proto.opset_import):
            model.proto.opset_import.append(onnx.helper.make_opsetid(INTERNAL, 1))
        drop_unused(model.proto.graph)
    notes = [f"{found.count} mixtures of experts, each expert computed and masked, compute the chosen ones"]
    return (notes if found.count else []) + [f"a mixture of experts is left alone: {why}" for why in found.misses]


class _Mixtures:
    """Finds the mixtures of a graph and replaces them."""

    def __init__(self, model: LoadedModel) -> None:
        self.model, self.graph = model, model.proto.graph
        self.producers = {name: node for node in self.graph.node for name in node.output}
        self.tensors = {tensor.name: tensor for tensor in self.graph.initializer}
        self.count, self.misses = 0, list[str]()
        self.contributions = {
            node.output[0]: found
            for node in self.graph.node
            if _is(node, "Mul") and (found := self._contribution(node)) is not None
        }
        if not self.contributions:
            return
        inner = {name for node in self.graph.node if _is(node, "Add") and self._leaves(node.output[0])
                 for name in node.input}  # fmt: skip
        for node in list(self.graph.node):
            if _is(node, "Add") and node.output[0] not in inner and (leaves := self._leaves(node.output[0])):
                self._replace(node, leaves)

    def _replace(self, node: onnx.NodeProto, leaves: Sequence[str]) -> None:
        """One mixture, whose sum is ``node``."""
        parts = [self.contributions[name] for name in leaves]
        if len(parts) < _LEAST_EXPERTS:
            return
        try:
            routing = {(chosen, weights) for chosen, weights, _, _ in parts}
            if len(routing) > 1 or sorted(number for *_, number, _ in parts) != list(range(len(parts))):
                raise _MissError(f"node '{node.name}' does not add each expert once")
            ordered = sorted(parts, key=lambda part: part[2])
            experts = [self._expert(value) for *_, value in ordered]
            self._build(node, *next(iter(routing)), experts)
        except _MissError as miss:
            self.misses.append(str(miss))

    def _leaves(self, name: str) -> list[str]:
        """The contributions that a value is the sum of; none where it is anything else."""
        stack, found = [name], list[str]()
        while stack:
            value = stack.pop()
            node = self.producers.get(value)
            if value in self.contributions:
                found.append(value)
            elif node is None or not _is(node, "Add"):
                return []
            else:
                stack += node.input
        return found

    def _contribution(self, node: onnx.NodeProto) -> tuple[str, str, int, str] | None:
        """(chosen, weights, number, expert's value) of expert * ReduceSum(weights * Cast(chosen == number), -1)."""
        for value, factor in (tuple(node.input), tuple(node.input)[::-1]):
            total = self.producers.get(factor)
            if total is None or not _is(total, "ReduceSum") or attributes_of(total).get("keepdims", 1) != 1:
                continue
            axes = self._ints(total.input[1]) if len(total.input) > 1 else attributes_of(total).get("axes")
            product = self.producers.get(total.input[0])
            if axes != [-1] or product is None or not _is(product, "Mul"):
                continue
            for weights, mask in (tuple(product.input), tuple(product.input)[::-1]):
                cast = self.producers.get(mask)
                equal = (
                    self.producers.get(cast.input[0]) if cast is not None and _is(cast, "Cast", "CastLike") else None
                )
                if equal is None or not _is(equal, "Equal"):
                    continue
                for chosen, number in (tuple(equal.input), tuple(equal.input)[::-1]):
                    numbers = self._ints(number)
                    if numbers is not None and len(numbers) == 1:
                        return chosen, weights, numbers[0], value
        return None

    def _ints(self, name: str) -> list[int] | None:
        """A constant's values, whether it is an initializer or a node."""
        node = self.producers.get(name)
        if node is not None and _is(node, "Constant"):
            given = attributes_of(node)
            for key in ("value_int", "value_ints", "value"):
                if key in given:
                    value = given[key]
                    array = numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.array(value)
                    return [int(v) for v in array.reshape(-1)]
        tensor = self.tensors.get(name)
        if tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL:
            return None
        return [int(v) for v in numpy_helper.to_array(tensor).reshape(-1)]

    # ---- one expert ------------------------------------------------------------------------------------------------
    def _expert(self, value: str) -> _Expert:
        down = self._linear(value)
        if down is None:
            raise _MissError(f"'{value}' is not a product with a weight")
        activated = self._activated(down.source)
        if activated is not None:
            return _Expert(activated[0], activated[1], down, None)
        node = self.producers.get(down.source)
        if node is not None and _is(node, "Mul"):
            for gate, factor in (tuple(node.input), tuple(node.input)[::-1]):
                activated, product = self._activated(gate), self._linear(factor)
                if activated is not None and product is not None and product.source == activated[1].source:
                    return _Expert(activated[0], activated[1], down, product)
        raise _MissError(f"'{down.source}' is not an activated product of a known kind")

    def _activated(self, name: str) -> tuple[str, _Linear] | None:
        """(activation, its product)."""
        node = self.producers.get(name)
        if node is None:
            return None
        kind, inner = "", ""
        first = self.producers.get(node.input[0])
        if _is(node, "Mul"):
            for value, gate in (tuple(node.input), tuple(node.input)[::-1]):
                sigmoid = self.producers.get(gate)
                if sigmoid is not None and _is(sigmoid, "Sigmoid") and sigmoid.input[0] == value:
                    kind, inner = "silu", value
            if node.input[0] == node.input[1] and first is not None and _is(first, "Relu"):
                kind, inner = "relu2", first.input[0]
        elif _is(node, "Pow") and first is not None and _is(first, "Relu") and self._ints(node.input[1]) == [2]:
            kind, inner = "relu2", first.input[0]
        elif _is(node, "Relu"):
            kind, inner = "relu", node.input[0]
        elif _is(node, _SWISH) and attributes_of(node).get("alpha", 1.0) == 1.0:
            kind, inner = "silu", node.input[0]
        elif _is(node, "Gelu") and attributes_of(node).get("approximate") in ("tanh", b"tanh"):
            kind, inner = "gelu", node.input[0]
        product = self._linear(inner) if kind else None
        return (kind, product) if product is not None else None

    def _linear(self, name: str) -> _Linear | None:
        """A product with weights, without bias."""
        node = self.producers.get(name)
        if node is None:
            return None
        if _is(node, "Split"):
            return self._half(node, list(node.output).index(name))
        if _is(node, "MatMul") and self._is_weight(node.input[1], 2):
            return _Linear(node.input[0], (node.input[1],))
        if _is(node, "MatMul") and (found := self._slice(node.input[1])) is not None:
            return _Linear(node.input[0], found[:1], expert=found[1])
        if node.op_type == "MatMulNBits" and domain_of(node) == MICROSOFT and len(node.input) <= 4:
            depth, bits, block = (
                _whole(node, name, least) for name, least in (("K", 0), ("bits", 4), ("block_size", 16))
            )
            names = tuple(name for name in node.input[1:] if name)
            packed = depth % block == 0 and self._is_weight(names[0], 3)
            if packed and all(name in self.tensors for name in names[1:]):
                return _Linear(node.input[0], names, bits, block)
        return None

    def _half(self, node: onnx.NodeProto, part: int) -> _Linear | None:
        """Half of the columns of a product: gate and factor in one."""
        sizes = self._ints(node.input[1]) if len(node.input) > 1 else [1, 1]
        whole = self._linear(node.input[0])
        last = attributes_of(node).get("axis", 0) == -1
        equal = sizes is not None and len(node.output) == 2 and len(set(sizes)) == 1
        return replace(whole, part=part) if whole is not None and whole.part is None and last and equal else None

    def _slice(self, name: str) -> tuple[str, int] | None:
        """(weights, number) of Transpose(Squeeze(Gather(weights, [number])))."""
        turned = self.producers.get(name)
        if turned is None or not _is(turned, "Transpose") or attributes_of(turned).get("perm", [1, 0]) != [1, 0]:
            return None
        found = self.producers.get(turned.input[0])
        if found is not None and _is(found, "Squeeze"):
            if len(found.input) < 2 or self._ints(found.input[1]) != [0]:
                return None
            found = self.producers.get(found.input[0])
        if found is None or not _is(found, "Gather") or attributes_of(found).get("axis", 0) != 0:
            return None
        numbers = self._ints(found.input[1])
        if numbers is None or len(numbers) != 1 or numbers[0] < 0 or not self._is_weight(found.input[0], 3):
            return None
        return found.input[0], numbers[0]

    def _is_weight(self, name: str, rank: int) -> bool:
        tensor = self.tensors.get(name)
        return tensor is not None and is_weight(tensor) and len(tensor.dims) == rank

    # ---- the new node ----------------------------------------------------------------------------------------------
    def _build(self, node: onnx.NodeProto, chosen: str, weights: str, experts: Sequence[_Expert]) -> None:
        one = experts[0]
        layers = [[e.gate for e in experts], [e.down for e in experts], [e.factor for e in experts]]
        if len({(e.activation, e.gate.source, e.factor is None) for e in experts}) > 1:
            raise _MissError(f"node '{node.name}' adds experts of different kinds")
        inputs = [one.gate.source, chosen, weights]
        arrays: list[tuple[str, np.ndarray[Any, Any] | None]] = []
        linears = [[linear for linear in layer if linear is not None] for layer in layers]
        kinds = {(linear.bits, linear.block_size) for layer in linears for linear in layer}
        if len(kinds) > 1 or any(len({len(linear.names) for linear in layer}) > 1 for layer in linears):
            raise _MissError(f"node '{node.name}' adds experts with weights of different kinds")
        for name, found in zip(("fc1", "fc2", "fc3"), linears, strict=True):
            arrays += [(f"{name}.{i}", self._stacked(node, found, i)) for i in range(3)]
        for name, array in arrays:
            inputs.append(self._add(f"{node.name}.{name}", array) if array is not None else "")
        new = onnx.helper.make_node(
            CHOSEN_EXPERTS, inputs, list(node.output), f"{node.name}.experts", domain=INTERNAL,
            activation_type=one.activation, bits=one.gate.bits, block_size=one.gate.block_size,
        )  # fmt: skip
        node.CopyFrom(new)
        self.count += 1

    def _stacked(self, node: onnx.NodeProto, layer: Sequence[_Linear], index: int) -> np.ndarray[Any, Any] | None:
        """Input ``index`` of a layer of all experts."""
        if not layer or index >= len(layer[0].names):
            return None
        values = [self._columns(linear, index) for linear in layer]
        whole = not layer[0].bits or index == 1 or values[0].dtype == np.uint8
        if len({(value.shape, value.dtype) for value in values}) > 1 or not whole:
            raise _MissError(f"node '{node.name}' adds experts of different shapes")
        return np.stack(values)

    def _columns(self, linear: _Linear, index: int) -> np.ndarray[Any, Any]:
        """Input ``index`` of a product, [N, n]."""
        value = self._array(linear.names[index])
        if linear.bits:  # scales and zero points may be flat
            value = value.reshape(self.tensors[linear.names[0]].dims[0], -1)
        elif linear.expert is None:
            value = value.T
        else:
            value = value[linear.expert]
        if linear.part is None:
            return value
        half = len(value) // 2
        return value[half:] if linear.part else value[:half]

    def _array(self, name: str) -> np.ndarray[Any, Any]:
        outside = self.model.weights.get(name)
        return numpy_helper.to_array(self.tensors[name]) if outside is None else outside

    def _add(self, name: str, array: np.ndarray[Any, Any]) -> str:
        """A new weight that lies outside the graph."""
        while name in self.tensors or name in self.producers:
            name += "_"
        self.model.weights[name] = array
        self.model.derived.add(name)
        self.tensors[name] = self.graph.initializer.add(
            name=name,
            data_type=onnx.helper.np_dtype_to_tensor_dtype(array.dtype),
            dims=array.shape,
            data_location=onnx.TensorProto.EXTERNAL,
        )
        return name


def _whole(node: onnx.NodeProto, name: str, default: int) -> int:
    value = attributes_of(node).get(name, default)
    return value if isinstance(value, int) and value > 0 else default


def _is(node: onnx.NodeProto, *op_types: str) -> bool:
    return node.op_type in op_types and domain_of(node) == ""
