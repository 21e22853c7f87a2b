"""Loads an ONNX model as hostile input: sizes are limited, external data stays in the model's folder.

Weights are mapped, not read: an initializer with external data becomes a view of the file.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from linattn.runtime.errors import UnsupportedModelError

MAX_GRAPH_BYTES = 2 * 1024**3 - 1
"""Protobuf's own limit for one message."""

MAX_NODES = 200_000
"""More nodes than any exporter of today writes; keeps hostile graphs from compiling for days."""

MAX_TENSOR_ELEMENTS = 2**40


@dataclass
class LoadedModel:
    """A model and its weights.

    Attributes:
        path: Where it was read from, or None if it was handed over in memory.
        proto: The graph; initializers with external data keep their reference only.
        weights: Initializer name -> its values, for every initializer whose bytes lie outside the graph.
        sha256: Hash of the graph file and of the names and sizes of the weight files.
    """

    path: Path | None
    proto: onnx.ModelProto
    weights: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict[str, "np.ndarray[Any, Any]"])
    sha256: str = ""

    @property
    def name(self) -> str:
        """The model's name for reports: the folder if the file is just called model.onnx."""
        if self.path is None:
            return self.proto.graph.name or "model"
        return self.path.parent.name if self.path.stem == "model" and self.path.parent.name else self.path.stem

    def weight_bytes(self) -> int:
        """Bytes of all initializers."""
        return sum(_tensor_bytes(t) for t in self.proto.graph.initializer)


def _tensor_bytes(tensor: onnx.TensorProto) -> int:
    count = math.prod(tensor.dims)
    if tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return (count + 1) // 2
    return count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def load_model(source: str | Path | onnx.ModelProto) -> LoadedModel:
    """Read a model and map its external weights.

    Args:
        source: Path of an ``.onnx`` file, or a model in memory (all of its weights inside).

    Raises:
        UnsupportedModelError: if the file is missing, damaged, too large, or its external data is missing, too short or
            outside the model's folder.
    """
    if isinstance(source, onnx.ModelProto):
        proto = onnx.ModelProto()
        proto.CopyFrom(source)
        _check_graph(proto, "model")
        _name_nodes(proto.graph)
        return LoadedModel(None, proto, {}, hashlib.sha256(proto.SerializeToString()).hexdigest())
    path = Path(source)
    if not path.is_file():
        raise UnsupportedModelError("no such file", where=str(path), hint="give the path of an .onnx file")
    size = path.stat().st_size
    if size > MAX_GRAPH_BYTES:
        raise UnsupportedModelError(
            "the graph file is too large for protobuf",
            where=str(path),
            got=f"{size} bytes",
            expected="under 2 GiB",
            hint="save the weights as external data",
        )
    data = path.read_bytes()
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise UnsupportedModelError(
            "not an ONNX model, or a truncated one",
            where=str(path),
            got=f"{size} bytes",
            hint="export or copy it again",
        ) from error
    _check_graph(proto, str(path))
    _name_nodes(proto.graph)
    digest = hashlib.sha256(data)
    weights = _map_external_data(proto, path, digest)
    return LoadedModel(path, proto, weights, digest.hexdigest())


def _check_graph(proto: onnx.ModelProto, where: str) -> None:
    if not proto.graph.node or not proto.opset_import:
        raise UnsupportedModelError(
            "not an ONNX model, or a truncated one: it has no nodes or no opsets", where=where, hint="export it again"
        )
    if len(proto.graph.node) > MAX_NODES:
        raise UnsupportedModelError("too many nodes", where=where, got=len(proto.graph.node), expected=MAX_NODES)
    for value in (*proto.graph.input, *proto.graph.output):
        elem_type = value.type.tensor_type.elem_type
        if elem_type not in onnx.TensorProto.DataType.values() or elem_type in (0, onnx.TensorProto.STRING):
            raise UnsupportedModelError(
                "not a tensor of numbers",
                where=f"graph input or output '{value.name}'",
                got=f"element type {elem_type}",
            )
    for tensor in proto.graph.initializer:
        if any(d < 0 for d in tensor.dims) or math.prod(tensor.dims) > MAX_TENSOR_ELEMENTS:
            raise UnsupportedModelError("impossible shape", where=f"initializer '{tensor.name}'", got=list(tensor.dims))
        if tensor.data_type not in onnx.TensorProto.DataType.values() or tensor.data_type == 0:
            raise UnsupportedModelError("unknown data type", where=f"initializer '{tensor.name}'", got=tensor.data_type)
        if tensor.data_location != onnx.TensorProto.EXTERNAL and tensor.HasField("raw_data"):
            want = _tensor_bytes(tensor)
            if len(tensor.raw_data) != want:
                raise UnsupportedModelError(
                    "data does not fit the shape",
                    where=f"initializer '{tensor.name}'",
                    got=f"{len(tensor.raw_data)} bytes",
                    expected=f"{want} bytes",
                )


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node a name of its own, so that errors and reports can point at it."""
    seen: set[str] = set()
    for index, node in enumerate(graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.name or node.op_type}_{index}"
        seen.add(node.name)


def _map_external_data(proto: onnx.ModelProto, path: Path, digest: Any) -> dict[str, np.ndarray[Any, Any]]:
    files: dict[str, np.ndarray[Any, Any]] = {}
    weights: dict[str, np.ndarray[Any, Any]] = {}
    for tensor in proto.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        where = f"initializer '{tensor.name}'"
        info = {entry.key: entry.value for entry in tensor.external_data}
        location = info.get("location", "")
        file = files.get(location)
        if file is None:
            file = files[location] = _map_file(path, location, where)
            digest.update(f"{location}:{file.size}".encode())
        offset, length = _range(info, tensor, where)
        if offset + length > file.size:
            raise UnsupportedModelError(
                f"external data '{location}' is too short",
                where=where,
                got=f"{file.size} bytes",
                expected=f"at least {offset + length}",
                hint="copy the data file again, whole",
            )
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        raw = file[offset : offset + length]
        packed = tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
        weights[tensor.name] = raw if packed else raw.view(dtype).reshape(tuple(tensor.dims))
    return weights


def _range(info: dict[str, str], tensor: onnx.TensorProto, where: str) -> tuple[int, int]:
    want = _tensor_bytes(tensor)
    try:
        offset, length = int(info.get("offset", 0)), int(info.get("length", want))
    except ValueError as error:
        raise UnsupportedModelError("external data offsets are not numbers", where=where, got=info) from error
    if offset < 0 or length != want:
        raise UnsupportedModelError(
            "external data does not fit the shape", where=where, got=f"{length} bytes at {offset}", expected=want
        )
    return offset, length


def _map_file(model: Path, location: str, where: str) -> np.ndarray[Any, Any]:
    folder = model.parent.resolve()
    parts = PurePosixPath(location.replace("\\", "/"))
    target = (folder / parts).resolve()
    if not location or parts.is_absolute() or not target.is_relative_to(folder):
        raise UnsupportedModelError(
            "external data lies outside the model's folder",
            where=where,
            got=repr(location),
            hint="external data must stay beside the model",
        )
    if not target.is_file():
        raise UnsupportedModelError(
            f"external data file '{location}' is missing", where=where, hint=f"put it into {folder}"
        )
    if target.stat().st_size == 0:
        return np.zeros(0, np.uint8)
    return np.memmap(target, dtype=np.uint8, mode="r")
