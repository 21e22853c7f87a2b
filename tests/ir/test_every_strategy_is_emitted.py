"""What an operator chooses is what it emits: a strategy that nobody wrote the call of is no other one's."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import half_types
import pytest
from half_types import Case
from harness import lowered, node_for
from linattn.dialect_patterns import rewrite
from linattn.dialect_patterns.attention import strategies as attention
from linattn.dialect_patterns.gather_columns.op import GATHER_COLUMNS
from linattn.dialect_patterns.op import INTERNAL, Choice, Op
from linattn.dialect_patterns.registry import find_op

COLUMNS = Case(GATHER_COLUMNS, [("f32", (64, 96)), ("i64", (2,))], {}, INTERNAL)


def _op(domain: str, op_type: str, version: int) -> Op:
    op = find_op(domain, op_type, version)
    assert op is not None
    return op


def chooser(case: Case) -> ModuleType:
    """Where the operator's strategy is chosen; softmax attention has one place for two operators."""
    op = _op(case.domain, case.op_type, 1 if case.domain else 27)
    return attention if case.op_type in ("Attention", "GroupQueryAttention") else sys.modules[op.lower.__module__]


CASES = {
    (case.domain, case.op_type): case
    for case in (*half_types.cases(4), COLUMNS)
    if len(getattr(chooser(case), "STRATEGIES", ())) > 1
}


def test_there_are_cases() -> None:
    assert len(CASES) >= 10


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: f"{case.domain}.{case.op_type}")
def test_an_unheard_of_strategy_is_not_taken_for_another(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    version = 1 if case.domain else 27
    specs = [None if one is None else half_types._spec(one, "f32") for one in case.inputs]
    node = node_for(case.domain, case.op_type, version, specs, case.attributes, len(case.outputs))
    monkeypatch.setattr(chooser(case), "choose", lambda *_: Choice("unheard_of"))
    monkeypatch.setattr(rewrite, "find_op", lambda *key: replace(_op(*key), choose=None))  # leaves none to IREE
    with pytest.raises((KeyError, AssertionError), match="unheard_of"):
        lowered(case.domain, case.op_type, version, node.inputs, node.attributes, node.num_outputs)
