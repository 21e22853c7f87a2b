"""What LinearAttention nodes are taken, and the one line that says why others are not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from linattn.dialect_patterns.linear_attention.contract import output_types, parse
from linattn.dialect_patterns.node import Node, TensorSpec
from linattn.dialect_patterns.op import MICROSOFT
from linattn.runtime.errors import UnsupportedModelError


def spec(*shape: int | None, dtype: str = "f32") -> TensorSpec:
    return TensorSpec(shape, dtype)


NODE = Node(
    name="attn", domain="", op_type="LinearAttention", version=27, num_outputs=2,
    inputs=(spec(None, None, 64), spec(None, None, 32), spec(None, None, 16), spec(None, 2, 16, 8),
            spec(None, None, 2), spec(None, None, 2)),
    attributes={"q_num_heads": 4, "kv_num_heads": 2},
)  # fmt: skip


def node(domain: str = "", attributes: dict[str, Any] | None = None, **inputs: TensorSpec | None) -> Node:
    """NODE with some inputs and attributes changed; an attribute of None is dropped."""
    names = ("query", "key", "value", "past_state", "decay", "beta", "erase_gate")
    specs = [inputs.get(name, old) for name, old in zip(names, (*NODE.inputs, None), strict=True)]
    merged = {k: v for k, v in {**NODE.attributes, **(attributes or {})}.items() if v is not None}
    return replace(NODE, domain=domain, inputs=tuple(specs), attributes=merged)


def test_everything_is_resolved() -> None:
    c = parse(NODE)
    assert (c.q_heads, c.k_heads, c.kv_heads, c.dk, c.dv, c.out_heads, c.rows) == (4, 2, 2, 16, 8, 4, 2)
    assert (c.rule, c.decay, c.beta, c.batch, c.tokens) == ("gated_delta", "head", "head", None, None)
    assert c.scale == 1 / math.sqrt(16)
    assert output_types(c) == [spec(None, None, 32), spec(None, 2, 16, 8)]


def test_sizes_come_from_any_input() -> None:
    c = parse(node(query=spec(None, None, None), value=spec(3, None, None), beta=spec(None, 7, 1)))
    assert (c.batch, c.tokens, c.dk, c.dv, c.beta) == (3, 7, 16, 8, "shared")
    assert output_types(c)[1] == spec(3, 2, 16, 8)


def test_the_state_has_a_type_of_its_own() -> None:
    half = {n: s and replace(s, dtype="f16") for n, s in zip(("query", "key", "value", "decay", "beta"),
            (*NODE.inputs[:3], *NODE.inputs[4:]), strict=True)}  # fmt: skip
    assert [s and s.dtype for s in output_types(parse(node(**half)))] == ["f16", "f32"]
    assert [s and s.dtype for s in output_types(parse(node(**half, past_state=None)))] == ["f16", "f16"]


def test_per_key_decay_and_where_it_is_the_same() -> None:
    assert parse(node(decay=spec(None, None, 32))).decay == "key"
    one = node(attributes={"q_num_heads": 2, "kv_num_heads": 2}, query=spec(1, 1, 2), key=spec(1, 1, 2),
               past_state=None)  # fmt: skip
    assert parse(one).decay == "head"  # dk = 1: both readings are the same


def test_com_microsoft_takes_fewer_query_and_key_heads() -> None:
    few = {"attributes": {"q_num_heads": 1, "kv_num_heads": 4}, "query": spec(1, 5, 16), "value": spec(1, 5, 32),
           "past_state": None, "decay": spec(1, 5, 4), "beta": spec(1, 5, 4)}  # fmt: skip
    c = parse(node(MICROSOFT, **few))  # type: ignore[arg-type]
    assert (c.q_heads, c.k_heads, c.kv_heads, c.out_heads, c.rows) == (1, 2, 4, 4, 1)
    assert output_types(c)[0] == spec(1, 5, 32)
    with pytest.raises(UnsupportedModelError, match=r"q_num_heads to be a multiple of kv_num_heads; repeat query"):
        parse(node("", **few))  # type: ignore[arg-type]


def test_a_left_out_output_has_no_type() -> None:
    assert output_types(parse(replace(NODE, used_outputs=(True, False)))) == [spec(None, None, 32), None]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (node(attributes={"update_rule": "mamba"}), "'update_rule', got 'mamba', expected linear or gated"),
        (node(attributes={"update_rule": "delta"}), "'delta' forbids the input 'decay'"),
        (node(attributes={"update_rule": "gated"}), "'gated' forbids the input 'beta'"),
        (node(decay=None), "'gated_delta' requires the input 'decay'"),
        (node(beta=None), "'gated_delta' requires the input 'beta'"),
        (node(value=None), "input 'value' is missing"),
        (node(attributes={"q_num_heads": None}), "attribute 'q_num_heads' is missing"),
        (node(attributes={"q_num_heads": 3}), "head counts, got q_num_heads=3, kv_num_heads=2"),
        (node(MICROSOFT, {"q_num_heads": 3}), "expected one to be a multiple of the other"),
        (node(attributes={"q_num_heads": 2**32, "kv_num_heads": 2**32}), "'q_num_heads', got 4294967296"),
        (node(attributes={"q_num_heads": 0}), "'q_num_heads', got 0"),
        (node(attributes={"q_num_heads": 2**30}), "the last dimension of 'query', got 64, expected a positive"),
        (node(attributes={"q_num_heads": "4"}), "attribute 'q_num_heads', got '4', expected a int"),
        (node(attributes={"scale": math.inf}), "attribute 'scale', got inf"),
        (node(attributes={"chunk_size": 0}), "attribute 'chunk_size', got 0"),
        (node(attributes={"chunk": 3}), "unknown attribute 'chunk'"),
        (node(attributes={"state_window": 2}), "unknown attribute 'state_window'"),
        (node(MICROSOFT, {"state_window": 2}), "'state_window', got 2, expected 0; export"),
        (node(MICROSOFT, {"state_window": -1}), "'state_window', got -1, expected 0"),
        (node(erase_gate=spec(1, 1, 2)), "too many inputs, got 7, expected at most 6; inputs of newer schemas"),
        (node(query=spec(None, None, 62)), "the last dimension of 'query', got 62"),
        (node(query=spec(None, None, None), past_state=None), "the last dimension of 'query' is open"),
        (node(key=spec(None, None, 16)), "the last dimension of 'key', got 16, expected kv_num_heads * dk = 32"),
        (node(MICROSOFT, key=spec(None, None, 24)), "the last dimension of 'key', got 24, expected dk=16 times a"),
        (node(MICROSOFT, key=spec(None, None, 64)), "the last dimension of 'key', got 64"),
        (node(MICROSOFT, key=spec(None, None, None)), "the last dimension of 'key' is open"),
        (node(decay=spec(None, None, 4)), "the last dimension of 'decay', got 4, expected kv_num_heads = 2 or"),
        (node(beta=spec(None, None, 4)), "the last dimension of 'beta', got 4, expected kv_num_heads = 2 or 1"),
        (node(past_state=spec(None, 2, 8, 16)), "input 'past_state', got ?x2x8x16xf32, expected ?x2x16x8xf32"),
        (node(past_state=spec(2, 16, 8)), "input 'past_state', got 3 dimensions, expected 4"),
        (node(query=spec(1, 4, 5, 16)), "input 'query', got 4 dimensions, expected 3"),
        (node(key=spec(None, None, 32, dtype="f16")), "input 'key' has another type than 'query', got f16"),
        (node(past_state=spec(None, 2, 16, 8, dtype="i32")), "'past_state' has an unsupported type, got i32"),
        (node(query=spec(2, None, 64), key=spec(3, None, 32)), "'key' has another batch than 'query', got 3"),
        (node(query=spec(None, 5, 64), beta=spec(None, 6, 2)), "'beta' has another sequence length than 'query'"),
        (replace(NODE, num_outputs=3), "wrong number of outputs, got 3"),
    ],
)  # fmt: skip
def test_refused(changed: Node, message: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        parse(changed)
    text = str(caught.value)
    assert text.startswith("node 'attn' (")
    assert message in text
    assert "\n" not in text
