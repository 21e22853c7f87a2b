"""The outputs of a call: which are wanted, and where to: the host, memory of the device, or memory of the caller."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from .device import Device, DeviceArray, HostArray, Move, numpy_dtype, rows_regions
from .dlpack import DeviceTensor, array_of, borrowed, from_outside, new_tensor, on_device
from .errors import InputError, require
from .manifest import Manifest, OutputSpec


@dataclass(frozen=True)
class Wanted:
    """What a caller asked for.

    Attributes:
        names: The outputs.
        last: Whether the last position's logits will do.
        stays: Whether outputs stay on the device.
        into: Memory of the caller's for some of them.
        is_plain: Whether that is copies of all of them on the host.
    """

    names: frozenset[str]
    last: bool = False
    stays: bool = False
    into: Mapping[str, Any] = field(default_factory=dict[str, Any])
    is_plain: bool = False


def find_wanted(
    available: Sequence[str],
    outputs: Sequence[str] | None,
    logits: str = "all",
    stays: bool = False,
    into: Mapping[str, Any] | None = None,
) -> Wanted:
    """Checks what was asked for.

    Args:
        available: Names of the outputs that there are.
        outputs: Those that are wanted; None: all.
        logits: `all` or `last`.
        stays: See `Wanted`.
        into: See `Wanted`; only of outputs that are wanted.

    Raises:
        InputError: There is no such output or choice.
    """
    if logits not in ("all", "last"):
        raise InputError("unknown choice", where="logits", got=repr(logits), expected="all | last")
    if isinstance(outputs, str):
        raise InputError("a list of names", where="outputs", got=repr(outputs), expected=f"[{outputs!r}]")
    require(outputs, (type(None), Collection), "outputs", "a list of names")
    require(into, (type(None), Mapping), "into", "a dict of arrays by name")
    names = list(available if outputs is None else outputs)
    for where, given, allowed in (("outputs", names, available), ("into", list(into or {}), names)):
        unknown = [str(name) for name in given if name not in allowed]
        if unknown:
            raise InputError("no such output", where=where, got=", ".join(unknown), expected=", ".join(allowed))
    plain = outputs is None and not stays and not into
    return Wanted(frozenset(names), logits == "last", stays, into or {}, plain)


@dataclass(frozen=True)
class _Rows:
    """Which rows of a block's output are taken, and where they go.

    Attributes:
        axis: Of the rows.
        first: The first that is taken.
        count: How many.
        at: Where they go.
        shape: Of all that there will be.
    """

    axis: int
    first: int
    count: int
    at: int
    shape: tuple[int, ...]


class Collector:
    """Takes the outputs of one block after the other.

    Args:
        manifest: The model.
        device: Where its outputs are.
        wanted: Which of them, and where to.
        tokens: T of the whole call.
    """

    def __init__(self, manifest: Manifest, device: Device, wanted: Wanted, tokens: int) -> None:
        self._specs = [spec for spec in manifest.outputs if spec.name in wanted.names]
        self._places = [i for i, spec in enumerate(manifest.outputs) if spec.name in wanted.names]
        self._device, self._wanted, self._tokens = device, wanted, tokens
        self._done = 0
        self._arrays: dict[str, HostArray] = {}
        self._targets: dict[str, DeviceArray] = {}
        self._tensors: dict[str, DeviceTensor] = {}

    @property
    def needs_all_logits(self) -> bool:
        """Whether those of every position are wanted, and not of the last one only."""
        return not self._wanted.last and any(spec.role == "logits" for spec in self._specs)

    def take(self, outputs: Sequence[DeviceArray], tokens: int) -> None:
        """Copies what is wanted of a block's outputs, which the next call may overwrite.

        Raises:
            InputError: Memory of the caller's that does not fit.
        """
        start, self._done = self._done, self._done + tokens
        final = self._done == self._tokens
        for spec, place in zip(self._specs, self._places, strict=True):
            output, axis = outputs[place], spec.token_axis
            shape = output.shape
            if axis is None:
                if final:
                    self._put(spec, output, _Rows(0, 0, shape[0] if shape else 1, 0, shape))
            elif self._wanted.last and spec.role == "logits":
                if final:
                    self._put(spec, output, _Rows(axis, shape[axis] - 1, 1, 0, _resized(shape, axis, 1)))
            else:
                self._put(spec, output, _Rows(axis, 0, shape[axis], start, _resized(shape, axis, self._tokens)))

    def results(self) -> dict[str, Any]:
        """All of them, by name.

        Raises:
            InputError: Memory of the caller's that does not fit.
        """
        found: dict[str, Any] = {}
        for spec in self._specs:
            given = self._wanted.into.get(spec.name)
            if spec.name in self._targets:
                found[spec.name] = self._tensors[spec.name] if given is None else given
                continue
            array = self._arrays[spec.name]
            found[spec.name] = array if given is None else _write(spec, array, given)
        return found

    def nothing(self, empty: Mapping[str, HostArray]) -> dict[str, Any]:
        """The outputs of no tokens at all."""
        for spec in self._specs:
            array = empty[spec.name]
            if self._wanted.stays and spec.name not in self._wanted.into:
                self._target(spec, array.shape)
            else:
                self._arrays[spec.name] = array
        return self.results()

    def _put(self, spec: OutputSpec, output: DeviceArray, rows: _Rows) -> None:
        target = self._target(spec, rows.shape)
        if target is not None:
            regions = rows_regions(output, target, rows.axis, rows.count, rows.first, rows.at)
            self._device.move([Move(output, target, regions)])
        elif rows.shape == output.shape:
            self._arrays[spec.name] = self._device.to_host(output)
        else:  # all blocks into one array, whose memory is touched once
            if spec.name not in self._arrays:
                self._arrays[spec.name] = np.empty(rows.shape, numpy_dtype(spec.dtype))
            part = (slice(None),) * rows.axis + (slice(rows.at, rows.at + rows.count),)
            self._device.read_rows(output, rows.axis, rows.first, self._arrays[spec.name][part])

    def _target(self, spec: OutputSpec, shape: tuple[int, ...]) -> DeviceArray | None:
        """The array on the device that an output goes to; None: it goes to the host."""
        if spec.name in self._targets:
            return self._targets[spec.name]
        given = self._wanted.into.get(spec.name)
        if given is None:
            if self._wanted.stays:
                self._tensors[spec.name] = new_tensor(self._device, shape, spec.dtype)
            target = array_of(self._tensors[spec.name]) if self._wanted.stays else None
        else:
            placed = on_device(self._device, given)
            memory = _check_memory(spec, shape, from_outside(given) if placed is None else placed)
            target = memory if isinstance(memory, DeviceArray) else borrowed(self._device, memory, spec.dtype)
        if target is not None:
            self._targets[spec.name] = target
        return target


def _resized(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])


def kept(device: Device, array: DeviceArray, axis: int | None, rows: int) -> DeviceTensor:
    """A copy of an array, or of its first rows along an axis, for the caller."""
    tensor = new_tensor(device, array.shape if axis is None else _resized(array.shape, axis, rows), array.dtype)
    regions = [(0, 0, array.nbytes)] if axis is None else rows_regions(array, array_of(tensor), axis, rows, 0, 0)
    device.move([Move(array, array_of(tensor), regions)])
    return tensor


def part(device: Device, array: DeviceArray, axis: int, first: int, rows: int) -> DeviceArray:
    """Some rows of an array, in memory of their own; the array itself where they are all of it."""
    if rows == array.shape[axis]:
        return array
    found = device.empty(_resized(array.shape, axis, rows), array.dtype)
    device.move([Move(array, found, rows_regions(array, found, axis, rows, first, 0))])
    return found


def _write(spec: OutputSpec, array: HostArray, given: Any) -> Any:
    """Copies an output into the caller's array on the host."""
    memory = _check_memory(spec, array.shape, from_outside(given))
    np.copyto(cast(HostArray, memory), array)
    return given


def _check_memory(spec: OutputSpec, shape: tuple[int, ...], target: Any) -> HostArray | DeviceArray:
    """Refuses memory that is not of an output's dtype and shape, or may not be written.

    Raises:
        InputError: It is not.
    """
    where = f"into[{spec.name!r}]"
    if isinstance(target, DeviceArray):
        array, dtype = target, target.dtype
    elif isinstance(target, np.ndarray):
        array = cast(HostArray, target)
        dtype = spec.dtype if array.dtype == numpy_dtype(spec.dtype) else array.dtype.name
        if not array.flags.writeable:
            raise InputError("it may not be written", where=where)
    else:
        got = type(target).__name__
        raise InputError("not memory for an output", where=where, got=got, expected="a numpy array or DLPack")
    if dtype != spec.dtype:
        raise InputError("wrong dtype", where=where, got=dtype, expected=spec.dtype)
    if array.shape != shape:
        raise InputError("wrong shape", where=where, got=list(array.shape), expected=list(shape))
    return array
