"""Quantised initializers of ONNX (2, 4 and 8 bits, signed or not) in MatMulNBits' layout: unsigned, low bits first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from ..model import LoadedModel
from .schema import attributes_of
from .validate import PACKED_BITS

Array = np.ndarray[Any, Any]

BITS = PACKED_BITS | {onnx.TensorProto.UINT8: 8, onnx.TensorProto.INT8: 8}
"""Bits of an element, by element type of a quantised initializer."""

_SIGNED = frozenset({onnx.TensorProto.INT2, onnx.TensorProto.INT4, onnx.TensorProto.INT8})
_BLOCK = 32  # where the model has none; ONNX Runtime, too, rounds activations in blocks of 32 there
_LEAST_BLOCK = 16


@dataclass(frozen=True)
class PackedMatrix:
    """A weight of N columns and depth K.

    Attributes:
        packed: [N, blocks, bytes].
        scales: [N, blocks].
        zeros: [N, bytes], None where they are the default ones, 2 ** (bits - 1).
        bits: Of an element.
        block: Elements along K that share a scale.
        depth: K.
        single: Whether one scale is for all, which ONNX Runtime 1.32 leaves alone.
    """

    packed: Array
    scales: Array
    zeros: Array | None
    bits: int
    block: int
    depth: int
    single: bool


def packed_matrix(
    model: LoadedModel, node: onnx.NodeProto, tensors: dict[str, onnx.TensorProto], depth_axis: int
) -> PackedMatrix | str:
    """What a DequantizeLinear of weights makes, or why it cannot be had.

    Args:
        model: The model.
        node: The node.
        tensors: The model's initializers.
        depth_axis: Which axis is K.
    """
    given = [tensors.get(name) for name in node.input if name]
    if len(given) < 2 or any(tensor is None for tensor in given) or len(tensors[node.input[0]].dims) != 2:
        return "it is no matrix with scales and zero points that are weights too"
    quantised, scale, *rest = (tensor for tensor in given if tensor is not None)
    attributes, bits = attributes_of(node), BITS[quantised.data_type]
    block, axis = attributes.get("block_size", 0), attributes.get("axis", 1)
    assert isinstance(block, int)
    assert isinstance(axis, int)
    if attributes.get("output_dtype", 0) not in (0, scale.data_type):
        return "it dequantises to another type than that of its scales"
    q = levels(model, quantised)
    q = q if depth_axis == 1 else q.T
    columns, depth = q.shape
    zeros = levels(model, rest[0]) if rest else default_zeros(quantised.data_type, tuple(scale.dims))
    params = [_values(model, scale), zeros]
    if block:
        if axis % 2 != depth_axis or block < _LEAST_BLOCK or block & (block - 1):
            return f"its blocks, {block} along axis {axis}, are not a power of two from {_LEAST_BLOCK} on along K"
        params = [v if v is None or depth_axis == 1 else v.T for v in params]
    elif scale.dims and list(scale.dims) != [1]:
        if axis % 2 == depth_axis:
            return "it has a scale for each element of K"
        params = [None if v is None else v.reshape(-1, 1) for v in params]
    block = block or max(_LEAST_BLOCK, min(_BLOCK, 1 << (depth - 1).bit_length()))
    shape = (columns, -(-depth // block))
    try:
        scales, zeros = (None if v is None else np.broadcast_to(v, shape) for v in params)
    except ValueError:
        return f"its scales or zero points do not fit {shape[0]} x {shape[1]} blocks"
    assert scales is not None
    if zeros is not None and bool((zeros == 1 << (bits - 1)).all()):
        zeros = None
    filled = np.zeros((columns, shape[1] * block), np.uint8)
    filled[:, :depth] = q
    return PackedMatrix(
        packed=pack(filled.reshape(*shape, block), bits),
        scales=np.ascontiguousarray(scales),
        zeros=None if zeros is None else pack(zeros, bits),
        bits=bits,
        block=block,
        depth=depth,
        single=not scale.dims,
    )


def default_zeros(data_type: int, shape: tuple[int, ...]) -> Array | None:
    """The zero points that ONNX means where there are none: of signed types, the kernels' default."""
    return None if data_type in _SIGNED else np.zeros(shape, np.uint8)


def levels(model: LoadedModel, tensor: onnx.TensorProto) -> Array:
    """An initializer's elements counted from the least one of its type, as bytes of the tensor's shape."""
    bits = BITS[tensor.data_type]
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        stored = model.weights[tensor.name].reshape(-1).view(np.uint8)
    elif tensor.HasField("raw_data"):
        stored = np.frombuffer(tensor.raw_data, np.uint8)
    else:
        stored = np.array(tensor.int32_data, np.int32).astype(np.uint8)
    count = int(np.prod(tensor.dims, dtype=np.int64))
    fields = unpack(stored, bits)[:count].reshape(tuple(tensor.dims))
    return fields ^ np.uint8(1 << (bits - 1)) if tensor.data_type in _SIGNED else fields


def unpack(stored: Array, bits: int) -> Array:
    """Bytes [n] as the fields in them [n * 8 / bits], low bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (stored[:, None] >> shifts & np.uint8((1 << bits) - 1)).reshape(-1)


def pack(fields: Array, bits: int) -> Array:
    """The other way round along the last axis, which is filled up with zeros to whole bytes."""
    per_byte = 8 // bits
    result = np.zeros((*fields.shape[:-1], -(-fields.shape[-1] // per_byte)), np.uint8)
    for i in range(per_byte):
        part = fields[..., i::per_byte]
        result[..., : part.shape[-1]] |= part << np.uint8(i * bits)
    return result


def _values(model: LoadedModel, tensor: onnx.TensorProto) -> Array:
    outside = tensor.data_location == onnx.TensorProto.EXTERNAL
    return model.weights[tensor.name] if outside else numpy_helper.to_array(tensor)
