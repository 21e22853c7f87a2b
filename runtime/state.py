"""States on a device: shapes, zeros, padding to the capacity, and reading them back in ONNX form."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .device import Device, DeviceArray, HostArray, numpy_dtype
from .errors import StateError
from .manifest import Manifest, StateSpec


def state_shape(manifest: Manifest, spec: StateSpec, batch: int, past: int) -> tuple[int, ...]:
    """The shape of a state in numbers.

    Args:
        manifest: Roles of the dims.
        spec: The state.
        batch: B.
        past: Tokens along the length axis of a KV cache.

    Raises:
        StateError: The state has a dim that is neither batch nor past.
    """
    sizes = {"batch": batch, "past": past}
    shape: list[int] = []
    for dim in spec.shape:
        size = dim if isinstance(dim, int) else sizes.get(manifest.dims[dim])
        if size is None:
            hint = "pass the state to program.run, or compile with --dim"
            raise StateError("its size is open", where=spec.name, got=f"dim {dim}", hint=hint)
        shape.append(size)
    return tuple(shape)


def upload_state(manifest: Manifest, device: Device, spec: StateSpec, array: HostArray) -> DeviceArray:
    """Copies a state in ONNX form to the device; a KV cache is padded with zeros up to the capacity."""
    axis = spec.length_axis
    if axis is None or manifest.max_context is None:
        return device.upload(array, spec.dtype)
    shape = list(array.shape)
    length, shape[axis] = shape[axis], manifest.max_context
    padded = np.zeros(shape, numpy_dtype(spec.dtype))
    padded[(slice(None),) * axis + (slice(0, length),)] = array
    return device.upload(padded, spec.dtype)


def read_state(manifest: Manifest, device: Device, spec: StateSpec, array: DeviceArray, tokens: int) -> HostArray:
    """Copies a state to the host in ONNX form: a KV cache with `tokens` rows, whatever its capacity."""
    if spec.length_axis is None or manifest.max_context is None:
        return device.to_host(array)
    return device.to_host_rows(array, spec.length_axis, 0, tokens)


def next_states(
    manifest: Manifest, states: Sequence[DeviceArray], returned: Sequence[DeviceArray]
) -> list[DeviceArray]:
    """The states after a call: the returned arrays, but the caller's own buffers where the call wrote in place."""
    pairs = zip(manifest.states, states, returned, strict=True)
    return [old if spec.in_place else new for spec, old, new in pairs]
