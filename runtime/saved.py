"""States in a file: one safetensors file that says of which model it is and where in the sequence, checked when read.

Each state is a tensor by the name of its past input, in ONNX form (a KV cache has as many rows as there are tokens), so
that a module of the same model for another target, capacity or version goes on from it; so is a mask with zeros, by the
name of its input. README.md has the metadata. Nothing in such a file is code.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from linattn.install import install_hint

from .binding import Sizes
from .device import Device, HostArray
from .errors import LinattnError, StateError
from .feeds import check_room
from .held import Held, from_host
from .manifest import InputSpec, Manifest, StateSpec
from .outputs import check_outputs, new_file
from .pool import Pool
from .state import read_state, state_shape

_FORMAT = "1"
_MOST_TOKENS = 1 << 40
_DTYPES = {
    "bool": "BOOL",
    "int8": "I8",
    "uint8": "U8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
}
"""Manifest's word -> safetensors' word."""


@dataclass(frozen=True)
class _Tensor:
    """What a tensor of the file must be."""

    dtype: str
    shape: tuple[int, ...]


def save_states(path: Path, manifest: Manifest, device: Device, now: Held) -> None:
    """Writes what is held; the file is there whole or not at all.

    Raises:
        InputError: There is no such folder, or something that may not be replaced.
        LinattnError: The package safetensors is missing, or the file cannot be written.
    """
    numpy_side = _package("safetensors.numpy")
    check_outputs({"save": path})
    pairs = zip(manifest.states, now.arrays(manifest), strict=True)
    tensors = {spec.name: read_state(manifest, device, spec, array, now.position) for spec, array in pairs}
    mask = _mask_input(manifest)
    if mask is not None and now.mask is not None:
        tensors[mask.name] = now.mask
    tensors = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()}
    producer = manifest.producer or {}
    metadata = {
        "linattn_state": _FORMAT,
        "model": manifest.model_name,
        "model_sha256": manifest.model_sha256,
        "position": str(now.position),
        "batch": str(now.batch),
        "sha256": _hash(tensors, now.batch, now.position),
        "target": manifest.target.name,
        "linattn": producer.get("linattn", ""),
        "iree": producer.get("iree", ""),
    }
    with new_file(path) as partial:
        numpy_side.save_file(tensors, str(partial), metadata)


def load_states(path: Path, manifest: Manifest, pool: Pool) -> Held:
    """Reads and checks such a file, and puts the states on a device, the pool's.

    Raises:
        StateError: No such file, another model's, one that does not fit the module, or a damaged one.
        LinattnError: The package safetensors is missing.
        TargetError: The device failed.
    """
    library, where = _package("safetensors"), str(path)
    if not path.is_file():
        raise StateError("no such file", where=where)
    try:
        with library.safe_open(where, framework="np") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            batch, position = _check_model(manifest, metadata, where)
            wanted = _wanted(manifest, batch, position, list(file.keys()), where)
            for name, tensor in wanted.items():
                part = file.get_slice(name)
                _check_tensor(f"{where}: {name}", tensor, str(part.get_dtype()), tuple(part.get_shape()))
            tensors: dict[str, HostArray] = {name: file.get_tensor(name) for name in wanted}
    except (LinattnError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library's Rust code is no Exception
        hint = "it is cut off, damaged or was not written by Session.save"
        got = str(error).partition("\n")[0][:200] or type(error).__name__
        raise StateError("not a file of saved states", where=where, got=got, hint=hint) from error
    if _hash(tensors, batch, position) != metadata.get("sha256"):
        raise StateError("damaged: its bytes are not those that were saved", where=where, hint="copy it again, whole")
    mask = _mask_input(manifest)
    return from_host(manifest, pool, tensors, batch, position, tensors.get(mask.name) if mask else None)


def _check_model(manifest: Manifest, metadata: Mapping[str, str], where: str) -> tuple[int, int]:
    """B and P of a file that is of this model and fits this module."""
    version = metadata.get("linattn_state")
    if version != _FORMAT:
        hint = "Session.save writes files of states" if version is None else "use the linattn version that wrote it"
        raise StateError("unknown format of saved states", where=where, got=version, expected=_FORMAT, hint=hint)
    if metadata.get("model_sha256") != manifest.model_sha256:
        name = metadata.get("model", "")[:80]
        if name == manifest.model_name:
            name += " with other weights or another graph"
        raise StateError("states of another model", where=where, got=name, expected=manifest.model_name)
    batch, position = (_number(metadata, key, where) for key in ("batch", "position"))
    if batch < 1 or manifest.batch not in (None, batch):
        expected = manifest.batch or "at least 1"
        raise StateError("states of another batch", where=where, got=batch, expected=expected)
    check_room(manifest, position, 0)
    return batch, position


def _wanted(manifest: Manifest, batch: int, position: int, names: Sequence[str], where: str) -> dict[str, _Tensor]:
    """The tensors that there must be."""
    specs: list[StateSpec | InputSpec] = list(manifest.states)
    shapes = [state_shape(manifest, spec, batch, position) for spec in manifest.states]
    mask = _mask_input(manifest)
    if mask is not None and mask.name in names:
        sizes = Sizes(manifest, batch=batch, past=0, total=position, tokens=position)
        specs.append(mask)
        shapes.append(sizes.concrete(mask.name, mask.shape))
    wanted = {spec.name: _Tensor(spec.dtype, shape) for spec, shape in zip(specs, shapes, strict=True)}
    missing, unknown = wanted.keys() - set(names), set(names) - wanted.keys()
    if missing or unknown:
        got = ", ".join([f"no {name}" for name in sorted(missing)] + [name[:80] for name in sorted(unknown)])
        raise StateError("not the states of this model", where=where, got=got[:400], expected=", ".join(wanted))
    return wanted


def _check_tensor(where: str, wanted: _Tensor, dtype: str, shape: tuple[int, ...]) -> None:
    if dtype != _DTYPES[wanted.dtype]:
        raise StateError("wrong dtype", where=where, got=dtype, expected=_DTYPES[wanted.dtype])
    if shape != wanted.shape:
        raise StateError("wrong shape", where=where, got=list(shape), expected=list(wanted.shape))


def _number(metadata: Mapping[str, str], key: str, where: str) -> int:
    text = metadata.get(key, "")
    if not (text.isascii() and text.isdecimal() and len(text) < 16 and int(text) < _MOST_TOKENS):
        raise StateError(f"the {key} is not a number", where=where, got=repr(text[:40]))
    return int(text)


def _mask_input(manifest: Manifest) -> InputSpec | None:
    return next((spec for spec in manifest.inputs if spec.role == "attention_mask"), None)


def _hash(tensors: Mapping[str, HostArray], batch: int | None, position: int) -> str:
    """SHA-256 of B, P and what all tensors hold, by the order of their names."""
    digest = hashlib.sha256(f"{batch} {position}\n".encode())
    for name, array in sorted(tensors.items()):
        digest.update(f"{name}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise LinattnError("saved states need the package safetensors", hint=install_hint("state")) from error
