"""What the CausalConvWithState strategy emits, by structure."""

from __future__ import annotations

import pytest
from data import causal_conv
from harness import lowered
from linattn.dialect_patterns.op import LoweringOptions
from state_ops import specs_of

DIRECT = LoweringOptions("direct")


@pytest.mark.parametrize(("taps", "loops"), [(1, 1), (4, 1), (8, 1), (9, 2)])
def test_one_loop_for_a_few_taps(taps: int, loops: int) -> None:
    specs = specs_of("CausalConvWithState", causal_conv(1, 6, 5, taps), True)
    text = str(lowered("", "CausalConvWithState", 27, specs, {"activation": "silu"}, 2, options=DIRECT))
    assert "torch.operator" not in text
    assert text.count("linalg.generic") == loops
    assert text.count("math.exp") == 1
    assert "scf.for" not in text


def test_no_tokens_is_no_work() -> None:
    specs = specs_of("CausalConvWithState", causal_conv(1, 6, 0, 4), False)
    assert "linalg" not in str(lowered("", "CausalConvWithState", 27, specs, {}, 2, options=DIRECT))
