"""What CausalConvWithState nodes are taken, and the one line that says why others are not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from linattn.dialect_patterns.causal_conv.contract import output_types, parse
from linattn.dialect_patterns.node import Node, TensorSpec
from linattn.dialect_patterns.op import MICROSOFT
from linattn.runtime.errors import UnsupportedModelError


def spec(*shape: int | None, dtype: str = "f32") -> TensorSpec:
    return TensorSpec(shape, dtype)


NODE = Node(
    name="conv", domain="", op_type="CausalConvWithState", version=27, num_outputs=2,
    inputs=(spec(None, 6, None), spec(6, 1, 4), spec(6), spec(None, 6, 3)),
)  # fmt: skip


def node(domain: str = "", attributes: dict[str, Any] | None = None, **inputs: TensorSpec | None) -> Node:
    names = ("input", "weight", "bias", "past_state", "extra")
    specs = [inputs.get(name, old) for name, old in zip(names, (*NODE.inputs, None), strict=True)]
    return replace(NODE, domain=domain, inputs=tuple(specs), attributes=attributes or {})


def test_everything_is_resolved() -> None:
    c = parse(node(attributes={"activation": "swish"}, input=spec(2, None, None)))
    assert (c.channels, c.kernel, c.activation, c.state_length) == (6, 4, "silu", 3)
    assert output_types(c) == [spec(2, 6, None), spec(2, 6, 3)]


def test_a_kernel_of_one_has_an_empty_state() -> None:
    assert output_types(parse(node(weight=spec(6, 1, 1), past_state=None)))[1] == spec(None, 6, 0)


def test_com_microsoft_layouts() -> None:
    last = {"channels_last": 1, "dilation": 2}
    c = parse(node(MICROSOFT, last, input=spec(1, None, 3, None), past_state=None))
    assert output_types(c) == [spec(1, None, 3, 2), spec(1, 6, 3, 2)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (node(attributes={"activation": "relu"}), "'activation', got 'relu', expected none or silu or swish"),
        (node(attributes={"ndim": 1}), "unknown attribute 'ndim'"),
        (node(MICROSOFT, {"ndim": 2}), "'ndim', got 2, expected 1; pack the other axes"),
        (node(MICROSOFT, {"state_window": 4}), "'state_window', got 4, expected 0; export"),
        (node(MICROSOFT, {"dilation": 0}), "'dilation', got 0, expected a positive number"),
        (node(MICROSOFT, {"dilation": 2**40}), "'dilation', got 1099511627776"),
        (node(MICROSOFT, {"channels_last": 2}), "'channels_last', got 2, expected 0 or 1"),
        (node(MICROSOFT, {"channels_last": 1}, input=spec(1, 5, None, None), past_state=None), "more than one open"),
        (node(input=spec(1, 7, None)), "input 'input', got 1x7x?xf32, expected 6 channels, as 'weight' has"),
        (node(input=spec(1, 6)), "input 'input', got 2 dimensions, expected 3"),
        (node(weight=spec(6, 2, 4)), "input 'weight', got 6x2x4xf32"),
        (node(weight=spec(6, 1, 0)), "input 'weight', got 6x1x0xf32"),
        (node(weight=spec(6, 1, None)), "input 'weight' has an open shape"),
        (node(weight=None), "input 'weight' is missing"),
        (node(bias=spec(5)), "input 'bias', got 5xf32, expected 6 elements"),
        (node(past_state=spec(1, 6, 4)), "input 'past_state', got 1x6x4xf32, expected ?x6x3xf32"),
        (node(past_state=spec(1, 6, 3, dtype="f16")), "'past_state' has another type than 'input', got f16"),
        (node(input=spec(1, 6, 2, dtype="i32")), "'input' has an unsupported type, got i32"),
        (node(extra=spec(1)), "too many inputs, got 5, expected at most 4"),
        (replace(NODE, num_outputs=3), "wrong number of outputs, got 3"),
    ],
)
def test_refused(changed: Node, message: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        parse(changed)
    text = str(caught.value)
    assert text.startswith("node 'conv' (")
    assert message in text
    assert "\n" not in text
