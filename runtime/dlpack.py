"""Memory shared with others: DLPack in and out, and the caller's memory where a device can use it as it is.

What IREE 3.13 can do: on the CPU everything (memory of others only where it begins at a multiple of 64 bytes: kernels
count on that), on CUDA by capsules that it makes and takes itself; Vulkan's memory cannot be shared. Each has a test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from .device import Device, DeviceArray, HostArray, numpy_dtype
from .drivers import CPU_DRIVERS, list_devices
from .errors import InputError, StateError
from .owned import Owned

_CPU, _CUDA = 1, 2
_SHARED_ON_CUDA = (_CUDA, 13)  # and managed memory
_ALIGNMENT = 64


class DeviceTensor(Owned):
    """An array on a program's device that is the caller's: no call overwrites it.

    What `run(..., device_outputs=True)` returns, and what `run` takes as an input or as memory for an output. On the
    CPU and on CUDA `numpy.from_dlpack` and `torch.from_dlpack` share its memory; `numpy()` copies, everywhere.

    Attributes:
        shape: Sizes of the axes.
        dtype: numpy name, or `bfloat16`.
    """

    _copy_hint = "numpy() copies it to the host"

    def __init__(self, device: Device, array: DeviceArray, host: HostArray | None = None) -> None:
        self._device = device
        self._array = array
        self._host = host
        self.shape, self.dtype = array.shape, array.dtype

    def __repr__(self) -> str:
        return f"DeviceTensor({self.dtype}, {list(self.shape)}, on {self.device})"

    @property
    def nbytes(self) -> int:
        """Size of its elements, in bytes."""
        return self._array.nbytes

    @property
    def device(self) -> str:
        """URI of the device that it is on."""
        return self._device.uri

    def numpy(self) -> HostArray:
        """A copy on the host."""
        return self._device.to_host(self._array)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> HostArray:
        """What `numpy.asarray` asks for: a copy."""
        if copy is False:
            raise ValueError("numpy.from_dlpack shares its memory where that can be, numpy.asarray copies")
        array = self.numpy()
        return array if dtype is None else array.astype(dtype)

    def __dlpack__(self, **options: Any) -> Any:
        """What `from_dlpack` asks for: a capsule of this very memory. Whoever writes to it changes the tensor.

        Raises:
            StateError: The device's memory cannot be shared.
        """
        kind, number = self.__dlpack_device__()
        if self._host is not None and self.dtype != "bfloat16":  # which numpy's DLPack does not have
            return self._host.__dlpack__(**options)
        return self._device.to_dlpack(self._array, kind, number)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Where its memory is, in DLPack's numbers.

        Raises:
            StateError: The device's memory cannot be shared.
        """
        if self._device.driver in CPU_DRIVERS:
            return _CPU, 0
        if self._device.driver == "cuda":
            uris = [uri for uri, _ in list_devices("cuda")]
            return _CUDA, uris.index(self.device) if self.device in uris else 0
        hint = "only the CPU's and CUDA's is; numpy() copies it to the host"
        raise StateError("its memory cannot be shared", where=self.device, hint=hint)


def new_tensor(device: Device, shape: Sequence[int], dtype: str) -> DeviceTensor:
    """A tensor with undefined contents; on the CPU its memory is numpy's, which may outlive everything of IREE."""
    wanted = numpy_dtype(dtype)
    nbytes = math.prod(shape) * wanted.itemsize
    if device.driver not in CPU_DRIVERS or not nbytes:
        return DeviceTensor(device, device.empty(shape, dtype), np.empty(shape, wanted) if not nbytes else None)
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    host = raw[start : start + nbytes].view(wanted).reshape(shape)
    return DeviceTensor(device, device.borrow(host, dtype), host)


def array_of(tensor: DeviceTensor) -> DeviceArray:
    """What a tensor is for the runtime."""
    return tensor._array  # pyright: ignore[reportPrivateUsage]


def on_device(device: Device, value: Any) -> DeviceArray | None:
    """A caller's array that lies on a GPU already; None for all others, which come by the host.

    Work on a CUDA array that somebody else has queued must be done by now: IREE waits for nobody else's.

    Raises:
        InputError: It is on another device, or it is not dense.
    """
    if isinstance(value, DeviceTensor):
        if value.device != device.uri:
            raise InputError("on another device", got=value.device, expected=device.uri, hint="use its numpy()")
        return array_of(value)
    if isinstance(value, (np.ndarray, np.generic)) or not hasattr(value, "__dlpack_device__"):
        return None
    if device.driver != "cuda" or int(value.__dlpack_device__()[0]) not in _SHARED_ON_CUDA:
        return None
    return device.from_dlpack(value.__dlpack__())


def borrowed(device: Device, array: HostArray, dtype: str) -> DeviceArray | None:
    """The caller's own memory as an array of the device, None where the device must have a copy.

    Keep the result no longer than the call: later the memory is the caller's again.
    """
    if device.driver not in CPU_DRIVERS or not array.size or array.dtype != numpy_dtype(dtype):
        return None
    if not (array.flags.c_contiguous and array.flags.writeable) or array.ctypes.data % _ALIGNMENT:
        return None
    return device.borrow(array, dtype)


def from_outside(value: Any) -> Any:
    """A caller's array: what speaks DLPack and is no numpy array becomes one, without a copy where it can.

    Raises:
        StateError: It is on another device than the CPU, or of a dtype that numpy does not have.
    """
    if isinstance(value, DeviceTensor):
        return value.numpy()
    if isinstance(value, (np.ndarray, np.generic)) or not hasattr(value, "__dlpack__"):
        return cast(Any, value)
    try:
        return np.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        got = (str(error).partition("\n")[0] or type(error).__name__)[:200]
        raise StateError("not an array that numpy can have", got=got, hint="copy it to the CPU first") from error
