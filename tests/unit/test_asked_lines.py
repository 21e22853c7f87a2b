"""What LinearAttention's CPU kernel asks for ahead: in all steps of a loop together every line of every token."""

from __future__ import annotations

from typing import Any

import pytest
from linattn.dialect_patterns.emit.kernel_text import KernelText
from linattn.dialect_patterns.linear_attention.simd_fetch import Share, ask


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("columns", [4, 32, 48])
@pytest.mark.parametrize(("tokens", "steps"), [(16, 64), (16, 16), (4, 64), (16, 24), (1, 8)])
def test_every_line(dtype: str, columns: int, tokens: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[tuple[int, ...]] = set()

    def prefetch(_: KernelText, memref: str, place: Any, **given: Any) -> None:
        assert (memref, given) == ("%x", {"level": 2, "write": False})
        asked.add(tuple(place))

    monkeypatch.setattr(KernelText, "prefetch", prefetch)
    k = KernelText()
    k.types["%x"] = f"memref<1x?x512x{dtype}>"
    for step in range(steps):
        ask(k, [Share("%x", 0, 128, columns)], 100, tokens, step, steps)
    elements = 64 // k.element_bytes("%x")
    assert asked == {(0, 100 + i, 128 + c) for i in range(tokens) for c in range(0, columns, elements)}
