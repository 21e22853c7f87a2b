"""Whether states are finite: what `guard="nan"` looks for before a call's states are committed."""

from __future__ import annotations

import numpy as np

from .device import Device, DeviceArray, HostArray
from .errors import StateError
from .held import Held
from .manifest import Manifest, StateSpec

_EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80}


def check_finite(manifest: Manifest, device: Device, new: Held, position: int) -> None:
    """Refuses states with a NaN or an infinity among them.

    Of a KV cache that is written in place only the rows of the call are read. A CPU's states are read where they are,
    those of a GPU come to the host.

    Args:
        manifest: The model.
        device: Where the states are.
        new: The states after a call.
        position: Tokens committed before it.

    Raises:
        StateError: Names the first such state.
    """
    for spec, array in zip(manifest.states, new.arrays(manifest), strict=True):
        if spec.dtype not in (*_EXPONENTS, "float32", "float64"):
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
