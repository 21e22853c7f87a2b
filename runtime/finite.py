"""Whether states are finite: what `guard="nan"` looks for before a call's states are committed."""

from __future__ import annotations

import numpy as np

from .device import Device, DeviceArray, HostArray
from .engine import Engine
from .errors import StateError
from .held import Held
from .manifest import StateSpec

_EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80}


def check_finite(engine: Engine, new: Held, position: int) -> None:
    """Refuses states with a NaN or an infinity among them.

    Of a KV cache that is written in place only the rows of the call count. A module that has a function for it
    (`Manifest.finite`) reads them on the device. Else a CPU's states are read where they are, and those of a GPU come
    to the host.

    Args:
        engine: The model and where the states are.
        new: The states after a call.
        position: Tokens committed before it.

    Raises:
        StateError: Names the first such state.
    """
    manifest, device = engine.manifest, engine.device
    arrays = new.arrays(manifest)
    found = engine.not_finite(arrays)
    counts = None if found is None else iter(found)
    for spec, array in zip(manifest.states, arrays, strict=True):
        if spec.dtype not in (*_EXPONENTS, "float32", "float64"):
            continue
        if counts is not None:
            told = next(counts)
            if not (told[..., position : new.position] if spec.in_place else told).any():
                continue
        values = _values(device, spec, array, position, new.position)
        if not _all_finite(values, spec.dtype):
            wrong = values[~np.isfinite(values.astype(np.float32, copy=False))]
            got = f"{wrong.size} of {values.size} values such as {wrong.ravel()[0]}"
            hint = f"not committed: the session stays at position {position}"
            raise StateError(f"not finite after {new.position} tokens", where=spec.name, got=got, hint=hint)


def _values(device: Device, spec: StateSpec, array: DeviceArray, first: int, last: int) -> HostArray:
    if spec.in_place:
        return device.to_host_rows(array, spec.length_axis or 0, first, last)
    view = device.host_view(array)
    return device.to_host(array) if view is None else view


def _all_finite(values: HostArray, dtype: str) -> bool:
    if not values.size:
        return True
    if dtype in _EXPONENTS:
        exponent = _EXPONENTS[dtype]
        return int((values.view(np.uint16) & exponent).max()) != exponent
    with np.errstate(over="ignore", invalid="ignore"):
        total = values.sum()  # a NaN or an infinity anywhere makes it one; nothing is allocated
    return bool(np.isfinite(total)) or bool(np.isfinite(values).all())
