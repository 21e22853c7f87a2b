"""Weights that a model dequantises itself become MatMulNBits' and GatherBlockQuantized's, which read them packed.

    MatMul(x, DequantizeLinear(w [K, N], axis 0))             ->  MatMulNBits(x, w', scales', zeros')
    MatMul(x, Transpose(DequantizeLinear(w [N, K], axis 1)))  ->  the same
    Gather(DequantizeLinear(w [N, K], axis 1), ids)           ->  GatherBlockQuantized(Reshape(w'), ids, ...)
    Gather(Transpose(DequantizeLinear(w [K, N], axis 0)))     ->  the same
    GatherBlockQuantized(w of 4 bits, ...)                    ->  the same with bytes, which is what the kernels read

w' is [N, blocks of K, bytes], stored once however many read it. A scale a column, or one for all, is written for each
block. ONNX Runtime makes the same of the first form, and rounds activations to int8 there (its option
``session.qdq_matmulnbits_accuracy_level`` is 4 by default); so do we there, and only there.

Elements of 2 and 4 bits exist in no other place: whatever else reads them is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from linattn.dialect_patterns.op import MICROSOFT
from linattn.runtime.errors import UnsupportedModelError
from onnx import numpy_helper

from ..model import LoadedModel
from .drop_unused import drop_unused
from .names import Names
from .packing import BITS, Array, PackedMatrix, default_zeros, levels, pack, packed_matrix
from .schema import attributes_of, domain_of, opset_versions
from .validate import PACKED_BITS

_INT8_ACCURACY = 4
_HINT = "export the model with MatMulNBits (QOperator instead of QDQ), or with weights of another type"


def pack_quantised_weights(model: LoadedModel) -> None:
    """Change the model's graph, in place.

    Raises:
        UnsupportedModelError: if elements of 2 or 4 bits are read by anything else.
    """
    Repacking(model).run()


class Repacking:
    """The pass over one model."""

    def __init__(self, model: LoadedModel) -> None:
        self._model, self._graph = model, model.proto.graph
        self._tensors = {tensor.name: tensor for tensor in self._graph.initializer}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self._graph.node:
            for name in dict.fromkeys(node.input):
                self._readers.setdefault(name, []).append(node)
        self._matrices: dict[tuple[str, int], tuple[PackedMatrix, list[str]]] = {}
        self._views: dict[str, onnx.NodeProto] = {}
        self._names = Names(self._graph)

    def run(self) -> None:
        """Change the graph."""
        found = [node for node in self._graph.node if self._is_ours(node)]
        for node in found:
            if node.op_type == "DequantizeLinear":
                self._dequantised(node)
            else:
                self._table(node)
        for place in range(len(self._graph.node) - 1, -1, -1):
            view = self._views.get(self._graph.node[place].name)
            if view is not None:
                self._graph.node.insert(place, view)
        if found:
            drop_unused(self._graph)
        if self._matrices and MICROSOFT not in opset_versions(self._model.proto):
            self._model.proto.opset_import.append(onnx.helper.make_opsetid(MICROSOFT, 1))
        left = {tensor.name for tensor in self._graph.initializer if tensor.data_type in PACKED_BITS}
        for node in self._graph.node:
            for name in left & set(node.input):
                raise self._refused(node, f"its input '{name}' has elements of less than 8 bits")

    def _is_ours(self, node: onnx.NodeProto) -> bool:
        """Elements that exist nowhere else, or blocks, which the importer lacks."""
        tensor = self._tensors.get(node.input[0]) if node.input else None
        if tensor is None:
            return False
        if domain_of(node) == MICROSOFT:
            return node.op_type == "GatherBlockQuantized" and tensor.data_type in PACKED_BITS
        is_packed = tensor.data_type in PACKED_BITS
        blocked = tensor.data_type in BITS and bool(attributes_of(node).get("block_size"))
        return node.op_type == "DequantizeLinear" and (is_packed or blocked)

    def _refused(self, node: onnx.NodeProto, message: str) -> UnsupportedModelError:
        return UnsupportedModelError(message, where=f"node '{node.name}' ({node.op_type})", hint=_HINT)

    def _dequantised(self, source: onnx.NodeProto) -> None:
        """Let all that reads what a node dequantises read packed weights."""
        outputs = {value.name for value in self._graph.output}
        readers = self._readers.get(source.output[0], [])
        for reader in readers:
            turned = reader.op_type == "Transpose" and attributes_of(reader).get("perm", [1, 0]) == [1, 0]
            if outputs & {source.output[0], *(reader.output if turned else ())}:
                raise self._refused(source, "the model gives its weights away as an output")
            for inner in self._readers.get(reader.output[0], []) if turned else [reader]:
                name = reader.output[0] if turned else source.output[0]
                is_product = inner.op_type == "MatMul" and inner.input[1] == name != inner.input[0]
                is_lookup = inner.op_type == "Gather" and attributes_of(inner).get("axis", 0) in (0, -2)
                if domain_of(inner) != "" or not (is_product or (is_lookup and inner.input[0] == name)):
                    raise self._refused(
                        inner, f"it reads what '{source.name}' dequantises: MatMul, on its right, and Gather can"
                    )
                matrix, names = self._matrix(source, int(is_product == turned))
                if is_product:
                    self._multiply(inner, matrix, names, rounds=readers == [inner] and not matrix.single)
                else:
                    self._look_up(inner, matrix, names)

    def _matrix(self, source: onnx.NodeProto, depth_axis: int) -> tuple[PackedMatrix, list[str]]:
        """The packed weight of a DequantizeLinear, and the names of its parts; made once."""
        key = source.name, depth_axis
        if key not in self._matrices:
            matrix = packed_matrix(self._model, source, self._tensors, depth_axis)
            if isinstance(matrix, str):
                raise self._refused(source, matrix)
            base = source.output[0]
            parts = {"packed": matrix.packed, "scales": matrix.scales, "zeros": matrix.zeros}
            ending = "" if depth_axis == 0 else ".rows"
            names = [self._add(f"{base}.{what}{ending}", part) for what, part in parts.items() if part is not None]
            self._matrices[key] = matrix, names
        return self._matrices[key]

    def _multiply(self, node: onnx.NodeProto, matrix: PackedMatrix, names: list[str], *, rounds: bool) -> None:
        attributes = {
            "K": matrix.depth,
            "N": matrix.packed.shape[0],
            "bits": matrix.bits,
            "block_size": matrix.block,
            "accuracy_level": _INT8_ACCURACY if rounds else 0,
        }
        self._become(node, "MatMulNBits", [node.input[0], *names], attributes)

    def _look_up(self, node: onnx.NodeProto, matrix: PackedMatrix, names: list[str]) -> None:
        columns, blocks, size = matrix.packed.shape
        if matrix.depth != blocks * matrix.block:
            raise self._refused(node, f"rows of {matrix.depth} in blocks of {matrix.block} are not supported here")
        sizes, table = (self._names.new(f"{node.output[0]}.{what}") for what in ("sizes", "table"))
        self._graph.initializer.append(numpy_helper.from_array(np.array([columns, blocks * size], np.int64), sizes))
        self._views[node.name] = onnx.helper.make_node("Reshape", [names[0], sizes], [table], f"{node.name}.view")
        attributes = {"bits": matrix.bits, "block_size": matrix.block, "gather_axis": 0, "quantize_axis": 1}
        self._become(node, "GatherBlockQuantized", [table, node.input[1], *names[1:]], attributes)

    def _table(self, node: onnx.NodeProto) -> None:
        """A GatherBlockQuantized of elements of less than 8 bits."""
        tensor, bits = self._tensors[node.input[0]], BITS[self._tensors[node.input[0]].data_type]
        scales = self._tensors.get(node.input[2])
        zero = self._tensors.get(node.input[3]) if len(node.input) > 3 and node.input[3] else None
        if not tensor.dims or tensor.dims[-1] * bits % 8 or scales is None:
            raise self._refused(node, "its table must have rows of whole bytes, and scales that are weights too")
        zeros = levels(self._model, zero) if zero is not None else default_zeros(tensor.data_type, tuple(scales.dims))
        inputs = [self._add(f"{tensor.name}.packed", pack(levels(self._model, tensor), bits)), *node.input[1:3]]
        if zeros is not None:
            inputs.append(self._add(f"{node.output[0]}.zeros", pack(zeros, bits)))
        attributes = {name: value for name, value in attributes_of(node).items() if name != "bits"}
        self._become(node, "GatherBlockQuantized", inputs, {**attributes, "bits": bits})

    def _become(self, node: onnx.NodeProto, op_type: str, inputs: list[str], attributes: Mapping[str, object]) -> None:
        node.op_type, node.domain = op_type, MICROSOFT
        del node.input[:], node.attribute[:]
        node.input.extend(inputs)
        node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in attributes.items())

    def _add(self, name: str, array: Array) -> str:
        """The name of a new weight."""
        name = self._names.new(name)
        self._graph.initializer.add(
            name=name,
            data_type=onnx.helper.np_dtype_to_tensor_dtype(array.dtype),
            dims=array.shape,
            data_location=onnx.TensorProto.EXTERNAL,
        )
        self._model.weights[name] = array
        self._model.derived.add(name)
        return name
