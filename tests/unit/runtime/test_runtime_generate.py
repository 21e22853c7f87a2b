from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from linattn.runtime.generation.sampling import index_of_largest

SPECIAL = [0x0000, 0x8000, 0x7C00, 0xFC00, 0x7E00, 0xFE00, 0x0001, 0x8001, 0x3C00]


@given(st.lists(st.one_of(st.sampled_from(SPECIAL), st.integers(0, 0xFFFF)), min_size=1, max_size=8))
def test_index_of_largest_is_numpys(bits: list[int]) -> None:
    """Signed zeros, infinities and NaN of either sign included."""
    row = np.array(bits, np.uint16).view(np.float16)
    assert index_of_largest(row) == row.argmax()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_index_of_largest_of_many(dtype: type[np.generic]) -> None:
    rows = np.random.default_rng(0).standard_normal((3, 2, 5000)).astype(dtype)
    for row in rows[:, 1]:
        assert index_of_largest(row) == row.argmax()
    assert index_of_largest(rows[0, 0, ::3]) == rows[0, 0, ::3].argmax()
