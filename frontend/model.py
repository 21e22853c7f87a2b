"""Loads an ONNX model as hostile input: sizes are limited, external data stays in the model's folder.

Weights are mapped, not read: an initializer with external data becomes a view of the file.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from linattn.runtime.errors import UnsupportedModelError

from .graph.schema import MIN_WEIGHT_ELEMENTS
from .graph.validate import PACKED_BITS, check_fields, tensor_bytes
from .lower.weights import content_key

MAX_GRAPH_BYTES = 2 * 1024**3 - 1
"""Protobuf's own limit for one message."""


@dataclass
class LoadedModel:
    """A model and its weights.

    Attributes:
        path: Where it was read from, or None if it was handed over in memory.
        proto: The graph; initializers with external data keep their reference only.
        weights: Initializer name -> its values, for every initializer whose bytes lie outside the graph.
        graph_sha256: Hash of the graph file and of the small values that lie outside it, hex.
        files: The graph file and those of the weights.
        derived: Names of those ``weights`` that passes have made of others, or taken out of the graph.
    """

    path: Path | None
    proto: onnx.ModelProto
    weights: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict[str, "np.ndarray[Any, Any]"])
    graph_sha256: str = ""
    files: tuple[Path, ...] = ()
    derived: set[str] = field(default_factory=set[str])

    @functools.cached_property
    def keys(self) -> dict[str, str]:
        """Initializer name -> :func:`~linattn.frontend.lower.weights.content_key` of all ``weights``; reads them."""
        return {name: content_key(array) for name, array in self.weights.items()}

    @property
    def sha256(self) -> str:
        """Hash of the graph and of what all weights hold, hex."""
        given = [name for name in self.weights if name not in self.derived]
        if not given:
            return self.graph_sha256
        lines = [self.graph_sha256, *(f"{self.keys[name]} {name}" for name in given)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def name(self) -> str:
        """The model's name for reports: the folder if the file is just called model.onnx."""
        if self.path is None:
            return self.proto.graph.name or "model"
        return self.path.parent.name if self.path.stem == "model" and self.path.parent.name else self.path.stem

    def weight_bytes(self) -> int:
        """Bytes of all initializers."""
        return sum(tensor_bytes(t) for t in self.proto.graph.initializer)


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
        digest = hashlib.sha256(proto.SerializeToString()).hexdigest()
        check_fields(proto, "model")
        outside = [t.name for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        if outside:
            raise UnsupportedModelError(
                "its values lie in a file, but the model was given without a path",
                where=f"initializer '{outside[0]}'",
                hint="give the path of the model, or load it with its external data",
            )
        return LoadedModel(None, proto, {}, digest)
    path = Path(source)
    if path.is_dir():
        inside = ", ".join(sorted(file.name for file in path.glob("*.onnx"))) or "there is none"
        raise UnsupportedModelError("a folder", where=str(path), hint=f"give the .onnx file in it: {inside}")
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
    check_fields(proto, str(path))
    digest = hashlib.sha256(data)
    weights, files = _map_external_data(proto, path, digest)
    return LoadedModel(path, proto, weights, digest.hexdigest(), (path, *files))


def _map_external_data(
    proto: onnx.ModelProto, path: Path, digest: Any
) -> tuple[dict[str, np.ndarray[Any, Any]], list[Path]]:
    """Values by name of initializer, and the files that hold them."""
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
        offset, length = _range(info, tensor, where)
        if offset + length > file.size:
            raise UnsupportedModelError(
                f"external data '{location}' is too short",
                where=where,
                got=f"{file.size} bytes",
                expected=f"at least {offset + length}",
                hint="copy the data file again, whole",
            )
        array = file[offset : offset + length]
        if tensor.data_type not in PACKED_BITS:  # those stay packed
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            array = array.view(dtype).reshape(tuple(tensor.dims))
        if array.size < MIN_WEIGHT_ELEMENTS:  # shapes and axes: what folds and infers must see their values
            tensor.raw_data = array.tobytes()
            digest.update(tensor.raw_data)
            tensor.ClearField("data_location")
            tensor.ClearField("external_data")
        else:
            weights[tensor.name] = array
    return weights, [path.parent / location.replace("\\", "/") for location in files]


def _range(info: dict[str, str], tensor: onnx.TensorProto, where: str) -> tuple[int, int]:
    want = tensor_bytes(tensor)
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
    try:
        target = (folder / parts).resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise UnsupportedModelError("not a file", where=where, got=repr(location), hint=str(error)) from error
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
