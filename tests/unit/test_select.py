"""How strategies are chosen, and what the report is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from data import Shape, linear_attention
from harness import node_for
from linattn import dialect_patterns
from linattn.dialect_patterns.linear_attention.op import choose, chunk_size, parse
from linattn.dialect_patterns.op import Choice, LoweringOptions
from linattn.dialect_patterns.select import No, OtherMachine, Strategy, Yes, select
from linattn.dialect_patterns.target import Target
from linattn.runtime.errors import LoweringError
from state_ops import specs_of

CPU = Target("cpu", vector_bits=256)
PORTABLE = Target("other")
NEITHER = {"fused_simd": "the target is not a CPU with vectors"}
UNITS = Target("gpu", is_gpu=True, matrix_units=True)


def contract(tokens: int | None, size: int = 16):
    inputs = linear_attention(Shape(dk=size, dv=size), 1, tokens or 9)
    specs = specs_of("LinearAttention", inputs, tokens is None)
    return parse(node_for("", "LinearAttention", 27, specs, Shape().attributes, 2))


def test_one_token_is_recurrent_and_the_report_says_why() -> None:
    choice = choose(contract(1), PORTABLE, LoweringOptions())
    assert choice.strategy == "recurrent"
    assert choice.rejected == {**NEITHER, "chunked": "T=1 is less than 2 tokens, where chunks do not pay off"}
    assert (choice.rule, choice.heads) == ("gated_delta", "4/2/2 x 16x16")


@pytest.mark.parametrize("tokens", [2, 512, None])
def test_more_tokens_are_chunked(tokens: int | None) -> None:
    choice = choose(contract(tokens), PORTABLE, LoweringOptions())
    assert (choice.strategy, choice.rejected) == ("chunked", NEITHER)
    assert "chunks of" in choice.reason


@pytest.mark.parametrize("tokens", [1, 512, None])
def test_cpus_with_vectors_have_one_kernel(tokens: int | None) -> None:
    choice = choose(contract(tokens), CPU, LoweringOptions())
    assert (choice.strategy, choice.rejected) == ("fused_simd", {})
    assert "one kernel" in choice.reason
    asked = choose(contract(tokens), CPU, LoweringOptions(chunk_size=16))
    assert asked.rejected["fused_simd"] == "chunks of 16 tokens are asked for"


def test_forced() -> None:
    assert choose(contract(512), CPU, LoweringOptions(strategy="recurrent")).strategy == "recurrent"
    expected = (
        "fused_simd or fused_warp_chunks or fused_mma_chunks or fused_term_chunks or fused_simt_chunks or "
        "fused_simt or chunked or recurrent"
    )
    with pytest.raises(LoweringError, match=rf"unknown strategy, got 'fast', expected {expected}"):
        choose(contract(512), CPU, LoweringOptions(strategy="fast"))


def test_forced_but_not_legal() -> None:
    never = Strategy("never", lambda *_: No("the moon is full"), lambda *_: Yes())
    with pytest.raises(LoweringError, match="'never' is not possible here: the moon is full; leave"):
        select([never], None, CPU, LoweringOptions(strategy="never"), "node 'x'")


@pytest.mark.parametrize("target", [CPU, UNITS])
def test_strategies_of_other_machines_are_no_news(target: Target) -> None:
    """They are tried all the same, and say why not where they are asked for."""
    never = Strategy("never", lambda *_: OtherMachine("the moon is no machine"), lambda *_: Yes())
    always = Strategy("always", lambda *_: Yes(), lambda *_: Yes())
    assert select([never, always], None, target, LoweringOptions(), "node 'x'") == Choice("always", "", {})
    with pytest.raises(LoweringError, match="not possible here: the moon is no machine"):
        select([never, always], None, target, LoweringOptions(strategy="never"), "node 'x'")


def test_the_first_that_is_legal_and_preferred() -> None:
    strategies = [
        Strategy("illegal", lambda *_: No("a"), lambda *_: Yes()),
        Strategy("worse", lambda *_: Yes(), lambda *_: No("b")),
        Strategy("good", lambda *_: Yes(), lambda *_: Yes("c")),
        Strategy("also", lambda *_: Yes(), lambda *_: Yes()),
    ]
    want = Choice("good", "c", {"illegal": "a", "worse": "b"})
    assert select(strategies, None, CPU, LoweringOptions(), "x") == want


@pytest.mark.parametrize(
    ("tokens", "size", "target", "asked", "chunk"),
    [
        (512, 64, CPU, None, 16), (512, 128, CPU, None, 32), (512, 64, UNITS, None, 32), (512, 128, UNITS, None, 64),
        (None, 128, CPU, None, 32), (512, 64, CPU, 128, 128), (17, 128, CPU, 64, 32), (2, 128, CPU, None, 8),
    ],
)  # fmt: skip
def test_chunk_size(tokens: int | None, size: int, target: Target, asked: int | None, chunk: int) -> None:
    assert chunk_size(contract(tokens, size), target, LoweringOptions(chunk_size=asked)) == chunk


@pytest.mark.parametrize("asked", [0, 4, 12, 256, -16])
def test_chunk_size_refused(asked: int) -> None:
    with pytest.raises(LoweringError, match="option 'chunk size', got"):
        choose(contract(512), CPU, LoweringOptions(chunk_size=asked))


def test_no_strategy_forgets_that_it_is_of_another_machine() -> None:
    """All that say so say it in a way that the report can tell."""
    folder = Path(dialect_patterns.__file__).parent
    texts = {path.name: path.read_text() for path in folder.rglob("*.py")}
    plain = [name for name, text in texts.items() if re.search(r"\bNo\(f?\"[^\"]*\bnot a (GPU|CPU)\b", text)]
    assert plain == []
