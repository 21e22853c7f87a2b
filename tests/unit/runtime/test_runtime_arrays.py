from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from linattn.runtime import InputError
from linattn.runtime.arrays import as_array, check_bounds, token_ids
from linattn.runtime.manifest import InputSpec

IDS = InputSpec("ids", "int32", ("b", "t"), "tokens", (-5, 4))
FLOATS = InputSpec("x", "float32", ("n",))


@pytest.mark.parametrize(
    ("spec", "value", "words"),
    [
        (IDS, [[1, 2, 3], [4, 5]], "ids: rows of different length, got 2 and 3, expected one length"),
        (IDS, [[[1], [2]], [[3], [4, 5]]], "ids: rows of different length, got 1 and 2, expected one length"),
        (IDS, [[1, 2], 3], "ids: not an array, got numbers beside lists, expected int32"),
        (IDS, [[1, 1 << 31]], "ids[0, 1]: value out of range, got 2147483648, expected int32"),
        (IDS, [[1], [1 << 70]], "ids[1, 0]: value out of range, got 1180591620717411303424, expected int32"),
        (IDS, -(1 << 31) - 1, "ids: value out of range, got -2147483649, expected int32"),
        (IDS, "1,2", "ids: not an array, got str, expected int32; TextGenerator takes text"),
        (IDS, [[None]], "ids: not an array, got list, expected int32"),
        (IDS, {"a": 1}, "ids: not an array, got dict, expected int32"),
        (IDS, [[1.0]], "ids: wrong dtype, got float64, expected int32; convert it"),
        (IDS, np.array([[1, 1 << 31]]), "ids[0, 1]: value out of range, got 2147483648, expected int32"),
        (IDS, np.array([[1.0]], np.float32), "ids: wrong dtype, got float32, expected int32; convert it"),
        (IDS, np.array([[True]]), "ids: wrong dtype, got bool, expected int32; convert it"),
        (FLOATS, [[1.0], [2.0, 3.0]], "x: rows of different length, got 1 and 2"),
        (FLOATS, [1j], "x: not an array, got list, expected float32"),
    ],
)
def test_refused(spec: InputSpec, value: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        as_array(spec, value)
    assert str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value", [[[1, 2]], ((1, 2),), [[True, 2]], *(np.array([[1, 2]], dtype) for dtype in ("int32", "int64", "uint8"))]
)
def test_taken(value: Any) -> None:
    array = as_array(IDS, value)
    assert array.dtype == np.int32
    assert array.tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.array([1, 5_000_000_000]), "ids[1]: value out of range, got 5000000000, expected int32"),
        (np.array([(1 << 32) + 1], np.uint64), "ids[0]: value out of range, got 4294967297, expected int32"),
        ([1.5], "ids: wrong dtype, got float64, expected integers"),
        (np.array([True]), "ids: wrong dtype, got bool, expected integers"),
        ([[1], [2, 3]], "ids: rows of different length"),
    ],
)
def test_token_ids_are_never_changed(value: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        token_ids(IDS, value)
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize("value", [[3, 4], np.array([3, 4], np.uint8), np.array([[3, 4]])])
def test_token_ids_of_any_integer_type(value: Any) -> None:
    ids = token_ids(IDS, value)
    assert ids.dtype == np.int32
    assert ids.tolist() == [[3, 4]]


@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-7, 7), max_size=6))
def test_bounds(values: list[int]) -> None:
    array = np.array(values, np.int64)
    wrong = [(i, value) for i, value in enumerate(values) if not -5 <= value <= 4]
    if not wrong:
        check_bounds(IDS, array)
        return
    with pytest.raises(InputError) as caught:
        check_bounds(IDS, array)
    assert str(caught.value) == f"ids[{wrong[0][0]}]: index out of range, got {wrong[0][1]}, expected -5 to 4"


def test_bounds_of_unsigned_and_of_single_numbers() -> None:
    check_bounds(IDS, np.array([4, 0], np.uint64))
    with pytest.raises(InputError, match=r"ids\[1\]: index out of range, got 5"):
        check_bounds(IDS, np.array([4, 5], np.uint64))
    with pytest.raises(InputError, match="ids: index out of range, got 5"):
        check_bounds(IDS, np.array(5, np.uint8))
