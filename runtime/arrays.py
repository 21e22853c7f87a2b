"""The caller's values as arrays: dtypes, rows of equal length, and integers that may be used as indices."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from .device import HostArray, numpy_dtype
from .dlpack import from_outside
from .errors import InputError
from .manifest import InputSpec, StateSpec

_FEW = 16
"""So few numbers Python compares faster than numpy, whose reductions take microseconds: a step of a generation."""


def as_array(spec: InputSpec | StateSpec, value: Any) -> HostArray:
    """The caller's value as an array of the right dtype.

    Args:
        spec: What it is for.
        value: An array of the right dtype (for an input of integers, any integers that fit it), also one that speaks
            DLPack; or Python numbers and lists of them.

    Raises:
        InputError: Another dtype, integers that do not fit, rows of different length, or no numbers at all.
        StateError: DLPack of another device's memory.
    """
    wanted, value = numpy_dtype(spec.dtype), from_outside(value)
    if isinstance(value, (np.ndarray, np.generic)):
        array: HostArray = np.asarray(cast(Any, value))
    else:
        array = _from_numbers(spec, value)
        if array.size == 0 or wanted.kind not in "iub":
            array = array.astype(wanted)
        elif array.dtype.kind in "iub":
            return narrowed(spec, array)
    if array.dtype != wanted and wanted.kind in "iu" and array.dtype.kind in "iu" and isinstance(spec, InputSpec):
        return narrowed(spec, array)
    if array.dtype != wanted:
        hint = f"convert it, for example with .astype({spec.dtype!r})"
        raise InputError("wrong dtype", where=spec.name, got=array.dtype, expected=spec.dtype, hint=hint)
    return array


def token_ids(spec: InputSpec, value: Any) -> HostArray:
    """Token ids, [T] or [B, T], of any integer dtype, as the array [B, T] that the input takes.

    Raises:
        InputError: Not integers, or integers that do not fit the input's dtype.
    """
    value = from_outside(value)
    typed = isinstance(value, (np.ndarray, np.generic))
    array: HostArray = np.asarray(cast(Any, value)) if typed else _from_numbers(spec, value)
    if array.size and array.dtype.kind not in "iu":
        raise InputError("wrong dtype", where=spec.name, got=array.dtype, expected="integers")
    return np.atleast_2d(narrowed(spec, array))


def narrowed(spec: InputSpec | StateSpec, array: HostArray) -> HostArray:
    """Integers in the dtype of an input, none of them changed by that.

    Raises:
        InputError: One does not fit.
    """
    wanted = numpy_dtype(spec.dtype)
    result = array.astype(wanted)
    if not np.array_equal(result, array):
        raise _bad_element(spec.name, array, result != array, "value out of range", spec.dtype)
    return result


def check_bounds(spec: InputSpec, array: HostArray) -> None:
    """Refuses indices that point outside the tables of the model; see `InputSpec.bounds`.

    Raises:
        InputError: Names the first element that does.
    """
    if spec.bounds is None or array.size == 0:
        return
    low, high = spec.bounds
    if array.size <= _FEW:
        values: list[int] = array.ravel().tolist()
        least, greatest = min(values), max(values)
    else:
        least, greatest = int(array.min()), int(array.max())
    if not low <= least <= greatest <= high:
        wrong = (array < low) | (array > high)
        raise _bad_element(spec.name, array, wrong, "index out of range", f"{low} to {high}")


def _bad_element(name: str, array: HostArray, wrong: HostArray, message: str, expected: str) -> InputError:
    """The error for the first of the elements that are wrong."""
    place = [int(i) for i in np.argwhere(wrong)[0]]
    return InputError(message, where=f"{name}{place or ''}", got=array[tuple(place)], expected=expected)


def _from_numbers(spec: InputSpec | StateSpec, value: Any) -> HostArray:
    """An array of Python numbers, of the dtype that numpy finds for them."""
    try:
        array: HostArray = np.asarray(value)
    except ValueError as error:
        lengths = _row_lengths(value)
        if lengths is not None:
            got = " and ".join(map(str, lengths))
            raise InputError("rows of different length", where=spec.name, got=got, expected="one length") from error
        raise InputError("not an array", where=spec.name, got="numbers beside lists", expected=spec.dtype) from error
    if array.dtype.kind == "O" and all(type(element) is int for element in array.flat):
        low, high = np.iinfo(np.int64).min, np.iinfo(np.uint64).max
        raise _bad_element(spec.name, array, (array < low) | (array > high), "value out of range", spec.dtype)
    if array.dtype.kind not in "iubf":
        hint = "TextGenerator takes text" if array.dtype.kind in "US" else None
        raise InputError("not an array", where=spec.name, got=type(value).__name__, expected=spec.dtype, hint=hint)
    return array


def _row_lengths(value: Any) -> list[int] | None:
    """The lengths of nested lists at the first depth where they differ."""
    level: list[Any] = [value]
    while level and all(isinstance(rows, (list, tuple)) for rows in level):
        lengths = sorted({len(rows) for rows in level})
        if len(lengths) > 1:
            return lengths
        level = [row for rows in level for row in rows]
    return None
