"""Random damage to ONNX models: bytes of the file, and fields of the graph."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from linattn.dialect_patterns.registry import OPS
from linattn.frontend.graph.schema import IMPORTER_OPS
from onnx import helper, numpy_helper

SIZES = [
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    16,
    17,
    64,
    255,
    1024,
    65537,
    1 << 31,
    1 << 33,
    1 << 40,
    (1 << 63) - 1,
    -1,
    -2,
    -(1 << 63),
]
TYPES = [0, 1, 2, 3, 5, 6, 7, 9, 10, 11, 12, 13, 16, 8, 14, 17, 21, 22, 99]
FLOATS = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 1e38, float("inf"), float("-inf"), float("nan")]
TEXTS = [b"", b"\xff\xfe", b"gated", b"linear", b"silu", b"NOTSET", b"constant", b"edge", b"ij,jk->ik", b"a" * 3000]
NAMES = sorted({op.op_type for op in OPS} | IMPORTER_OPS)


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """A few bytes of a file changed, taken out, put in, or its end cut off."""
    raw = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at = rng.randrange(len(raw) or 1)
        kind = rng.randrange(6)
        if kind == 0:
            raw[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            raw[at : at + rng.choice([1, 1, 2, 8, 100])] = b""
        elif kind == 2:
            raw[at:at] = rng.randbytes(rng.choice([1, 1, 2, 8]))
        elif kind == 3:
            start = rng.randrange(len(raw) or 1)
            raw[at:at] = raw[start : start + rng.choice([4, 16, 64, 256])]
        elif kind == 4 and raw:
            raw[at] ^= 1 << rng.randrange(8)
        elif rng.random() < 0.1:
            del raw[at:]
    return bytes(raw)


def damage_graph(rng: random.Random, proto: onnx.ModelProto) -> None:
    """One to three fields of a model changed."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        rng.choice(_DAMAGES)(rng, proto)


def _values(proto: onnx.ModelProto) -> list[str]:
    graph = proto.graph
    named = [*graph.input, *graph.output, *graph.initializer]
    return [*(v.name for v in named), *(name for node in graph.node for name in node.output), ""]


def _node(rng: random.Random, proto: onnx.ModelProto) -> onnx.NodeProto:
    return rng.choice(proto.graph.node) if proto.graph.node else proto.graph.node.add(op_type="Identity")


def _attribute(rng: random.Random, proto: onnx.ModelProto) -> None:
    node = _node(rng, proto)
    if not node.attribute or rng.random() < 0.2:
        name = rng.choice(
            ["axis", "axes", "perm", "epsilon", "to", "mode", "num_heads", "scale", "group", "bits", "foo"]
        )
        value: Any = rng.choice([rng.choice(SIZES), rng.choice(FLOATS), rng.choice(TEXTS), [1, 0], [0.5]])
        node.attribute.append(helper.make_attribute(name, value))
        return
    chosen = rng.choice(node.attribute)
    if rng.random() < 0.1:
        node.attribute.remove(chosen)
    elif rng.random() < 0.1:
        chosen.type = rng.randrange(15)
    elif chosen.ints and rng.random() < 0.8:
        chosen.ints[rng.randrange(len(chosen.ints))] = rng.choice(SIZES)
        if rng.random() < 0.3:
            chosen.ints.append(rng.choice(SIZES))
    elif chosen.HasField("t"):
        _change_tensor(rng, chosen.t)
    else:
        chosen.i, chosen.f, chosen.s = rng.choice(SIZES), rng.choice(FLOATS), rng.choice(TEXTS)


def _operand(rng: random.Random, proto: onnx.ModelProto) -> None:
    node = _node(rng, proto)
    if node.input and rng.random() < 0.8:
        before = list(proto.graph.node)[: list(proto.graph.node).index(node)]
        known = [
            *(v.name for v in (*proto.graph.input, *proto.graph.initializer)),
            *(n for b in before for n in b.output),
        ]
        names = known if known and rng.random() < 0.8 else _values(proto)
        node.input[rng.randrange(len(node.input))] = rng.choice(names)
    elif rng.random() < 0.5:
        node.input.append(rng.choice(_values(proto)))
    else:
        del node.input[rng.randrange(len(node.input) + 1) :]


def _operator(rng: random.Random, proto: onnx.ModelProto) -> None:
    node = _node(rng, proto)
    node.op_type = rng.choice(NAMES)
    if rng.random() < 0.3:
        node.domain = rng.choice(["", "com.microsoft", "ai.onnx", "linattn"])


def _result(rng: random.Random, proto: onnx.ModelProto) -> None:
    node = _node(rng, proto)
    if node.output and rng.random() < 0.7:
        node.output[rng.randrange(len(node.output))] = rng.choice([*_values(proto), "new"])
    else:
        node.output.append(rng.choice(["", "new"]))


def _declared(rng: random.Random, proto: onnx.ModelProto) -> None:
    graph = proto.graph
    values = [*graph.input, *graph.output, *graph.value_info]
    if not values:
        return
    tensor = rng.choice(values).type.tensor_type
    kind = rng.randrange(5)
    if kind == 0:
        tensor.elem_type = rng.choice(TYPES)
    elif kind == 1 and tensor.shape.dim:
        rng.choice(tensor.shape.dim).dim_value = rng.choice(SIZES)
    elif kind == 2 and tensor.shape.dim:
        rng.choice(tensor.shape.dim).dim_param = rng.choice(
            ["batch", "N", "a+b", "2*N", "1+" * 900 + "1", "9" * 600, "("]
        )
    elif kind == 3:
        tensor.shape.dim.add(dim_value=rng.choice([1, 2, 1 << 20]))
    elif tensor.shape.dim:
        del tensor.shape.dim[rng.randrange(len(tensor.shape.dim))]


def _weight(rng: random.Random, proto: onnx.ModelProto) -> None:
    if proto.graph.initializer:
        _change_tensor(rng, rng.choice(proto.graph.initializer))


def _change_tensor(rng: random.Random, tensor: onnx.TensorProto) -> None:
    kind = rng.randrange(6)
    if kind == 0 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(SIZES)
    elif kind == 1:
        tensor.data_type = rng.choice(TYPES)
    elif kind == 2 and tensor.external_data:
        rng.choice(tensor.external_data).value = rng.choice(["", "7", "-1", "../x", "a\0b", "model.onnx", "1" * 50])
    elif tensor.data_location != onnx.TensorProto.EXTERNAL and tensor.data_type in (1, 6, 7, 10, 11):
        try:
            array = np.array(numpy_helper.to_array(tensor))
        except (ValueError, TypeError):
            return
        if array.size and array.size < 1 << 16:
            values = SIZES if array.dtype.kind == "i" else FLOATS
            for _ in range(rng.choice([1, 1, 2])):
                with np.errstate(all="ignore"):
                    array.reshape(-1)[rng.randrange(array.size)] = np.array(rng.choice(values)).astype(array.dtype)
            if rng.random() < 0.2:
                array = rng.choice([array.reshape(-1), array[None], array.reshape(-1)[:1], array.reshape(-1)[:0]])
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _inserted(rng: random.Random, proto: onnx.ModelProto) -> None:
    """Another operator between two nodes."""
    node = _node(rng, proto)
    if node.input:
        index = rng.randrange(len(node.input))
        op = rng.choice(["Identity", "Neg", "Transpose", "Flatten", "Shape", "Cast", "Squeeze", "NonZero", "Size"])
        new = helper.make_node(
            op, [node.input[index]], [f"inserted{rng.randrange(99)}"], **({"to": 7} if op == "Cast" else {})
        )
        node.input[index] = new.output[0]
        proto.graph.node.insert(list(proto.graph.node).index(node), new)


def _moved(rng: random.Random, proto: onnx.ModelProto) -> None:
    node = onnx.NodeProto()
    node.CopyFrom(_node(rng, proto))
    if rng.random() < 0.7:
        proto.graph.node.remove(node)
    if rng.random() < 0.7:
        proto.graph.node.insert(rng.randrange(len(proto.graph.node) + 1), node)


def _opset(rng: random.Random, proto: onnx.ModelProto) -> None:
    if proto.opset_import and rng.random() < 0.9:
        rng.choice(proto.opset_import).version = rng.choice([0, 1, 6, 7, 11, 13, 17, 18, 21, 23, 24, 27, 28, 99, -1])
    else:
        proto.opset_import.add(domain=rng.choice(["", "com.microsoft", "x"]), version=rng.randrange(30))


def _listed(rng: random.Random, proto: onnx.ModelProto) -> None:
    """An input or output more or less."""
    values = rng.choice([proto.graph.input, proto.graph.output])
    if values and rng.random() < 0.5:
        del values[rng.randrange(len(values))]
    else:
        name = rng.choice(_values(proto))
        values.append(helper.make_tensor_value_info(name, rng.choice(TYPES[1:9]), [rng.choice(SIZES[:9])]))


_DAMAGES: Sequence[Callable[[random.Random, onnx.ModelProto], None]] = (
    _attribute, _attribute, _attribute, _operand, _operand, _operator, _result, _declared, _declared, _weight, _weight,
    _inserted, _moved, _opset, _listed,
)  # fmt: skip
