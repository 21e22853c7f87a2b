"""What a module says of the memory for its results is checked before anything is allocated for it."""

from __future__ import annotations

import pytest
from linattn.runtime.errors import TargetError
from linattn.runtime.result_specs import read_result_specs


def test_right() -> None:
    found = read_result_specs('[["float32", [1, 8, 4]], null, ["bfloat16", []]]', "a.vmfb", "decode")
    assert found == [("float32", [1, 8, 4]), None, ("bfloat16", [])]


@pytest.mark.parametrize(
    "text",
    [
        "", "nothing", "7", "{}", "[" * 100_000, '["float32"]', '[["float33", [1]]]', '[["float32", 1]]',
        '[["float32", [-1]]]', '[["float32", [true]]]', '[["float32", ["1"]]]', '[["float32", [1.0]]]',
        '[["float32", [1099511627775, 1099511627775]]]', '[["float32", [1], 2]]', '[[["float32"], [1]]]',
        '[["float32", [1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]]]',
    ],
)  # fmt: skip
def test_refused(text: str) -> None:
    with pytest.raises(TargetError, match=r"^a\.vmfb: (the results|a result) of 'decode'.*, expected "):
        read_result_specs(text, "a.vmfb", "decode")
