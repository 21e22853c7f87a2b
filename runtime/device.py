"""Devices and device arrays; with `drivers.py`, `opening.py` and `module.py` alone to touch `iree.runtime`.

`iree.runtime.DeviceArray` can cache its first host copy (iree#18870); `Device.to_host` reads the device every time.
"""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol, cast

import iree.runtime as _untyped_rt  # pyright: ignore[reportMissingTypeStubs]
import iree.runtime.flags as _untyped_flags  # pyright: ignore[reportMissingTypeStubs]
import numpy as np
from numpy.typing import NDArray

from .cuda_context import ThreadContext
from .drivers import (
    CPU_DRIVERS,
    DRIVER_ERRORS,
    has_worker_threads,
    one_line,
)
from .errors import InputError, TargetError
from .owned import Owned, check_process, keep_to_the_end

try:  # iree.runtime brings ml_dtypes along; without it bfloat16 arrays are seen as their uint16 bits
    import ml_dtypes  # pyright: ignore[reportMissingTypeStubs, reportMissingImports, reportUnusedImport]  # noqa: F401

    _bfloat16: np.dtype[Any] = np.dtype("bfloat16")
except ImportError:  # pragma: no cover
    _bfloat16 = np.dtype(np.uint16)

_rt: Any = cast(Any, _untyped_rt)
_flags: Any = cast(Any, _untyped_flags)

HostArray = NDArray[Any]

_HAL_TYPES = {
    "bool": "BOOL_8",
    "int8": "SINT_8",
    "uint8": "UINT_8",
    "int16": "SINT_16",
    "uint16": "UINT_16",
    "int32": "SINT_32",
    "uint32": "UINT_32",
    "int64": "SINT_64",
    "uint64": "UINT_64",
    "float16": "FLOAT_16",
    "bfloat16": "BFLOAT_16",
    "float32": "FLOAT_32",
    "float64": "FLOAT_64",
}
DTYPE_NAMES = tuple(_HAL_TYPES)
_KEPT_STAGING = 1 << 20
_POLLED_SECONDS = 0.02
_ZERO = np.zeros(1, np.uint8)
_DEVICE_MEMORY = int(_rt.MemoryType.DEVICE_LOCAL), int(_rt.BufferUsage.DEFAULT)
_HOST_MEMORY = (
    int(_rt.MemoryType.HOST_LOCAL) | int(_rt.MemoryType.DEVICE_VISIBLE),
    int(_rt.BufferUsage.DEFAULT) | int(_rt.BufferUsage.MAPPING_SCOPED),
)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype that stands for an element type of a manifest.

    Args:
        name: A numpy dtype name, or `bfloat16` (ml_dtypes' type; plain uint16 bits where ml_dtypes is missing).

    Raises:
        InputError: The name is not one of `DTYPE_NAMES`.
    """
    if name not in _HAL_TYPES:
        raise InputError("unknown dtype", got=repr(name), expected=" | ".join(DTYPE_NAMES))
    return _bfloat16 if name == "bfloat16" else np.dtype(name)


@dataclass(frozen=True)
class DeviceArray:
    """An array in device memory; never copied to the host unless `Device.to_host` is asked to.

    Attributes:
        shape: Sizes of the axes, dense and row-major.
        dtype: Name of the element type (`DTYPE_NAMES`).
        view: The IREE buffer view that owns the memory; for `device.py` and `module.py` only.
        ref: The same as a call takes it; made once, since a step has one for each state.
        allocator: Where the memory goes back to; IREE's buffers do not keep it, and crash where it is freed first, so
            it comes last.
    """

    shape: tuple[int, ...]
    dtype: str
    view: Any
    ref: Any
    allocator: Any

    @cached_property
    def nbytes(self) -> int:
        """Size of the elements, in bytes."""
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Move:
    """Ranges of an array that `Device.move` fills.

    Attributes:
        source: Where they come from; None: they become zeros.
        target: The array.
        regions: Offset in the source, offset in the target, length, all in bytes.
    """

    source: DeviceArray | None
    target: DeviceArray
    regions: Sequence[tuple[int, int, int]]


def row_regions(array: DeviceArray, axis: int, first: int, last: int) -> tuple[tuple[int, int, int], ...]:
    """Where rows of one axis lie, from `first` up to `last`, as the regions of a `Move` to the same place."""
    return _row_regions(array.shape, numpy_dtype(array.dtype).itemsize, axis, first, last)


@lru_cache(maxsize=64)
def _row_regions(
    shape: tuple[int, ...], itemsize: int, axis: int, first: int, last: int
) -> tuple[tuple[int, int, int], ...]:
    row = math.prod(shape[axis + 1 :]) * itemsize
    block = row * shape[axis]
    starts = [i * block + first * row for i in range(math.prod(shape[:axis]))]
    return tuple((start, start, (last - first) * row) for start in starts)


def rows_regions(
    source: DeviceArray, target: DeviceArray, axis: int, rows: int, first: int, at: int
) -> list[tuple[int, int, int]]:
    """The regions of a `Move` of rows of one axis, from `first` on in the source to `at` on in the target."""
    if not source.shape:
        return [(0, 0, source.nbytes)]
    outer = int(np.prod(source.shape[:axis], dtype=np.int64))
    row = int(np.prod(source.shape[axis + 1 :], dtype=np.int64)) * numpy_dtype(source.dtype).itemsize
    old, new = source.shape[axis] * row, target.shape[axis] * row
    return [(i * old + first * row, i * new + at * row, rows * row) for i in range(outer)]


class Reserve(Protocol):
    """Memory that is kept for nobody yet."""

    def trim(self) -> bool:
        """Frees it; whether there was any."""
        ...


class Device(Owned):
    """One opened device; get it from `open_device`, which opens each device once per process."""

    _copy_hint = "open_device returns the one there is"

    def __init__(self, uri: str, hal_device: Any, description: str, context: ThreadContext | None = None) -> None:
        self.uri = uri
        self.description = description
        self.pid = os.getpid()
        self.has_workers = has_worker_threads(uri)
        """Whether it runs on CPU worker threads of the process."""
        self.has_queue = uri.partition("://")[0] not in CPU_DRIVERS
        """Whether it goes on by itself while the host does something else."""
        self.clears_new = not self.has_queue
        """Whether memory that it has just given is zeros: IREE's of CPUs comes from calloc."""
        self.reserves: weakref.WeakSet[Reserve] = weakref.WeakSet()
        """Who keeps memory that it has for nobody."""
        self._context = context
        self._semaphores: list[tuple[Any, int]] = []  # that nobody waits for, and what each has reached
        self._hal_device = hal_device  # after what must not outlive it
        self._hal_allocator: Any = hal_device.allocator
        self._staging: Any = None
        self._staging_lock = threading.Lock()
        # Software drivers need the core that polling would take.
        self._polls = self.driver not in CPU_DRIVERS and "llvmpipe" not in description

    @property
    def driver(self) -> str:
        """Name of the IREE driver: `local-task`, `local-sync`, `cuda`, `vulkan` or `hip`."""
        return self.uri.partition("://")[0]

    @property
    def hal_device(self) -> Any:
        """IREE's device, in the process that opened it; whoever takes it may use it in this thread.

        Raises:
            TargetError: This process was forked from that one.
        """
        self.enter()
        return self._hal_device

    @property
    def _allocator(self) -> Any:
        self.enter()
        return self._hal_allocator

    def enter(self) -> None:
        """Makes the device usable in this thread; what comes from `hal_device` is.

        Raises:
            TargetError: This process was forked from the one that opened it, or the driver refuses.
        """
        check_process(self.pid, self.uri)
        if self._context is not None:
            self._context.make_current()

    def __repr__(self) -> str:
        return f"Device({self.uri!r}, {self.description!r})"

    def allocated_bytes(self) -> int:
        """What its allocator has given away and not got back, in this process; 0 where it does not count."""
        found: dict[str, int] = self._allocator.statistics if self._allocator.has_statistics else {}
        kinds = ("host", "device")
        return sum(found.get(f"{kind}_bytes_allocated", 0) - found.get(f"{kind}_bytes_freed", 0) for kind in kinds)

    def upload(self, array: HostArray, dtype: str) -> DeviceArray:
        """Copies a host array to the device; the host array may be changed right after.

        Args:
            array: Any strides; its dtype must be `numpy_dtype(dtype)`.
            dtype: Name of the element type.
        """
        if array.dtype != numpy_dtype(dtype):
            raise InputError("wrong dtype", got=array.dtype, expected=dtype)
        if not array.size:  # IREE's GPU drivers take no empty memory
            return self._empty(array.shape, dtype)
        dense = np.asarray(array, order="C")
        raw = dense if dtype not in ("bool", "bfloat16") else dense.view(np.uint8 if dtype == "bool" else np.uint16)
        view = self._allocator.allocate_buffer_copy(
            memory_type=_rt.MemoryType.DEVICE_LOCAL,
            allowed_usage=_rt.BufferUsage.DEFAULT,
            device=self.hal_device,
            buffer=raw,
            element_type=_hal_type(dtype),
        )
        return self._array(array.shape, dtype, view)

    def borrow(self, array: HostArray, dtype: str) -> DeviceArray:
        """Memory of the host itself as an array, on CPUs; see `dlpack.borrowed`, which knows when that can be."""
        buffer = self._allocator.import_host_allocation(array.reshape(-1).view(np.uint8), *_HOST_MEMORY)
        return self.wrap(_rt.HalBufferView(buffer, list(array.shape), _hal_type(dtype)), dtype)

    def to_dlpack(self, array: DeviceArray, kind: int, number: int) -> Any:
        """A capsule of an array's memory, with the place that it shall name.

        Raises:
            TargetError: IREE cannot share the memory of this kind of device.
        """
        keep_to_the_end(array.allocator)  # the capsule does not keep it, and crashes where it is freed first
        try:
            return self.hal_device.create_dlpack_capsule(array.view, kind, number)
        except DRIVER_ERRORS as error:
            raise TargetError("its memory cannot be shared", where=self.uri, hint=one_line(error)) from error

    def from_dlpack(self, capsule: Any) -> DeviceArray:
        """Memory of somebody else's on this device as an array.

        Raises:
            InputError: IREE cannot take it, or its dtype.
        """
        try:
            view = self.hal_device.from_dlpack_capsule(capsule)
        except DRIVER_ERRORS as error:
            raise InputError("not memory that IREE can take", got=one_line(error), hint="copy it to the CPU") from error
        return self.wrap(view, self._dtype_of(view))

    def _dtype_of(self, view: Any) -> str:
        """The name of a foreign view's element type.

        Raises:
            InputError: It is one that no manifest names.
        """
        found = next((name for name in DTYPE_NAMES if int(_hal_type(name)) == int(view.element_type)), None)
        if found is None:
            raise InputError("unknown dtype", got=hex(view.element_type), expected=" | ".join(DTYPE_NAMES))
        return found

    def host_buffer(self, shape: Sequence[int], dtype: str) -> DeviceArray:
        """Allocates an array in host memory that the device reads where it is; fill it with `write`.

        For small inputs that change with every call: nothing is submitted to the device's queue for them.
        """
        return self._empty(shape, dtype, _HOST_MEMORY)

    def write(self, target: DeviceArray, array: HostArray) -> None:
        """Overwrites an array of `host_buffer`; no call that reads it may be under way.

        Args:
            target: The array.
            array: Values of its shape; any strides; its dtype must be `numpy_dtype(target.dtype)`.
        """
        if array.dtype != numpy_dtype(target.dtype):
            raise InputError("wrong dtype", got=array.dtype, expected=target.dtype)
        if target.nbytes:
            raw = np.asarray(array, order="C").reshape(-1).view(np.uint8)
            mapped = target.view.get_buffer().map()
            mapped.asarray([target.nbytes], np.dtype(np.uint8))[:] = raw

    def host_view(self, array: DeviceArray) -> HostArray | None:
        """The memory of an array itself, None where the host cannot reach it; keep the array as long as the view.

        Neither read nor write it while a call that uses it may be under way.
        """
        check_process(self.pid, self.uri)
        buffer = array.view.get_buffer()
        if not _mappable(buffer):
            return None
        raw = buffer.map().asarray([array.nbytes], np.dtype(np.uint8))
        return raw.view(numpy_dtype(array.dtype)).reshape(array.shape)

    def empty(self, shape: Sequence[int], dtype: str) -> DeviceArray:
        """Allocates an array with undefined contents."""
        return self._empty(shape, dtype)

    def zeros(self, shape: Sequence[int], dtype: str) -> DeviceArray:
        """Allocates an array of zeros, filled by the device (nothing is uploaded)."""
        array = self._empty(shape, dtype)
        self.fill_zero([array])
        return array

    def fill_zero(self, arrays: Sequence[DeviceArray]) -> None:
        """Overwrites arrays with zeros, in place and in one submission."""
        self.move([Move(None, array, ((0, 0, array.nbytes),)) for array in arrays])

    def copy(self, arrays: Sequence[DeviceArray]) -> list[DeviceArray]:
        """Copies arrays on the device, each into memory of its own, in one submission."""
        copies = [self._empty(array.shape, array.dtype) for array in arrays]
        self.move([Move(old, new, ((0, 0, old.nbytes),)) for old, new in zip(arrays, copies, strict=True)])
        return copies

    def move(self, moves: Sequence[Move]) -> None:
        """Copies and clears ranges of arrays, in one submission whose order is open: no range may be written twice.

        On a CPU the caller does it: a submission takes longer than what is small, and calls are not under way.
        """
        if not self.has_queue:
            check_process(self.pid, self.uri)
            mapped, target = None, _ZERO
            for move in moves:
                if move.target is not mapped:  # those of one array come one after the other
                    mapped, target = move.target, _bytes_of(move.target)
                source = None if move.source is None else _bytes_of(move.source)
                for start, place, nbytes in move.regions:
                    target[place : place + nbytes] = 0 if source is None else source[start : start + nbytes]
            return
        regions = [(move, *region) for move in moves for region in move.regions if region[2]]
        if not regions:
            return
        commands = _rt.HalCommandBuffer(self.hal_device, begin=True)
        for move, start, target, nbytes in regions:
            if move.source is None:
                commands.fill(move.target.view.get_buffer(), _ZERO, target, nbytes)
            else:
                commands.copy(move.source.view.get_buffer(), move.target.view.get_buffer(), start, target, nbytes)
        self._execute(commands)

    def to_host(self, array: DeviceArray) -> HostArray:
        """Copies an array to the host: every call reads the device anew and returns memory of its own."""
        return self._read(array, [(0, array.nbytes)], array.shape)

    def to_host_rows(self, array: DeviceArray, axis: int, first: int, last: int) -> HostArray:
        """Copies only some rows of one axis to the host, from `first` up to `last`."""
        shape = array.shape
        regions = [(start, nbytes) for start, _, nbytes in row_regions(array, axis, first, last)]
        return self._read(array, regions, (*shape[:axis], last - first, *shape[axis + 1 :]))

    def read_rows(self, array: DeviceArray, axis: int, first: int, into: HostArray) -> None:
        """Copies rows of one axis, from `first` on as many as `into` has, to memory that the host has."""
        last = first + into.shape[axis]
        source = array.view.get_buffer()
        if _mappable(source):
            mapped = source.map().asarray([array.nbytes], np.dtype(np.uint8)).view(into.dtype).reshape(array.shape)
            np.copyto(into, mapped[(slice(None),) * axis + (slice(first, last),)])
        else:
            np.copyto(into, self.to_host_rows(array, axis, first, last))

    def wrap(self, view: Any, dtype: str) -> DeviceArray:
        """Takes a buffer view that a call returned, with the element type that the manifest names.

        Raises:
            TargetError: The element sizes differ: the module and its manifest disagree.
        """
        shape: tuple[int, ...] = tuple(view.shape)
        needed = math.prod(shape) * numpy_dtype(dtype).itemsize  # np.prod takes 6 us, as long as a whole call
        if view.byte_length != needed:
            got = f"{view.byte_length} bytes for shape {list(shape)}"
            raise TargetError("a result does not fit the manifest", got=got, expected=f"{needed} bytes of {dtype}")
        return self._array(shape, dtype, view)

    def _empty(self, shape: Sequence[int], dtype: str, memory: tuple[int, int] = _DEVICE_MEMORY) -> DeviceArray:
        sizes, nbytes, element = _layout(tuple(shape), dtype)
        self.enter()
        try:
            buffer = self._allocate(memory, nbytes)
        except (RuntimeError, MemoryError) as error:
            raise TargetError("cannot allocate", where=self.uri, got=f"{nbytes} bytes", hint=one_line(error)) from error
        view = _rt.HalBufferView(buffer, sizes, element)
        return DeviceArray(sizes, dtype, view, view.ref, self._hal_allocator)

    def _allocate(self, memory: tuple[int, int], nbytes: int) -> Any:
        try:
            return self._hal_allocator.allocate_buffer(*memory, max(nbytes, 16))
        except (RuntimeError, MemoryError):
            if not any([reserve.trim() for reserve in list(self.reserves)]):
                raise
        return self._hal_allocator.allocate_buffer(*memory, max(nbytes, 16))

    def _array(self, shape: Sequence[int], dtype: str, view: Any) -> DeviceArray:
        return DeviceArray(tuple(shape), dtype, view, view.ref, self._hal_allocator)

    def _execute(self, commands: Any) -> None:
        """Does it and waits, by a semaphore that is kept: making one takes Vulkan on an H100 0.4 ms."""
        commands.end()
        hal_device = self.hal_device
        try:
            semaphore, reached = self._semaphores.pop()
        except IndexError:
            semaphore, reached = hal_device.create_semaphore(0), 0
        done = self.fence(semaphore, reached + 1)
        hal_device.queue_execute(commands, [(semaphore, reached)], done)
        try:
            self.wait(semaphore, reached + 1, done)
        except BaseException:
            with suppress(RuntimeError):  # what it writes is another's behind a Ctrl-C
                done.wait()
            raise
        self._semaphores.append((semaphore, reached + 1))  # one that has failed stays failed

    @staticmethod
    def fence(semaphore: Any, value: int) -> Any:
        """What is reached when a semaphore has a value."""
        return _rt.HalFence.create_at(semaphore, value)

    def wait(self, semaphore: Any, value: int, fence: Any) -> None:
        """Waits until a semaphore has reached a value.

        Being woken takes a GPU's driver up to a millisecond (Vulkan on an H100), so the first milliseconds are polled.

        Args:
            semaphore: The semaphore.
            value: The value.
            fence: The fence of the two.
        """
        if self._polls:
            stop = time.monotonic() + _POLLED_SECONDS
            while time.monotonic() < stop:
                if semaphore.query() >= value:
                    return
        fence.wait()

    def _read(self, array: DeviceArray, regions: list[tuple[int, int]], shape: tuple[int, ...]) -> HostArray:
        dtype = numpy_dtype(array.dtype)
        nbytes = sum(length for _, length in regions)
        if not nbytes:
            return np.empty(shape, dtype)
        source = array.view.get_buffer()
        if _mappable(source):
            mapped = source.map().asarray([array.nbytes], np.dtype(np.uint8))
            raw = np.concatenate([mapped[start : start + length] for start, length in regions])
            return raw.view(dtype).reshape(shape)
        with self._staging_lock:
            staging = self._staging_buffer(nbytes)
            commands = _rt.HalCommandBuffer(self.hal_device, begin=True)
            filled = 0
            for start, length in regions:
                commands.copy(source, staging, start, filled, length)
                filled += length
            self._execute(commands)
            raw = staging.map().asarray([nbytes], np.dtype(np.uint8)).copy()
        return raw.view(dtype).reshape(shape)

    def _staging_buffer(self, nbytes: int) -> Any:
        """Host memory for a read; small ones share a buffer, since CUDA takes over a millisecond to lock its pages."""
        if nbytes <= _KEPT_STAGING and self._staging is not None:
            return self._staging
        staging = self._allocator.allocate_buffer(
            memory_type=int(_rt.MemoryType.HOST_LOCAL | _rt.MemoryType.DEVICE_VISIBLE),
            allowed_usage=int(_rt.BufferUsage.TRANSFER_TARGET | _rt.BufferUsage.MAPPING_SCOPED),
            allocation_size=max(nbytes, _KEPT_STAGING),
        )
        if nbytes <= _KEPT_STAGING:
            self._staging = staging
        return staging


@lru_cache(maxsize=256)
def _layout(shape: tuple[int, ...], dtype: str) -> tuple[tuple[int, ...], int, Any]:
    """Sizes, bytes and element type of an array; a fork makes ten of those that all forks make."""
    sizes = tuple(map(int, shape))
    return sizes, math.prod(sizes) * numpy_dtype(dtype).itemsize, _hal_type(dtype)


def _hal_type(dtype: str) -> Any:
    return getattr(_rt.HalElementType, _HAL_TYPES[dtype])


def _bytes_of(array: DeviceArray) -> HostArray:
    """The memory of an array on a CPU."""
    return array.view.get_buffer().map().asarray([array.nbytes], np.dtype(np.uint8))


def _mappable(buffer: Any) -> bool:
    visible, scoped = int(_rt.MemoryType.HOST_VISIBLE), int(_rt.BufferUsage.MAPPING_SCOPED)
    return bool(int(buffer.memory_type()) & visible == visible and int(buffer.allowed_usage()) & scoped == scoped)
