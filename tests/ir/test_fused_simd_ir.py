"""What strategy fused_simd emits for both state operators: one dispatch each, one executable for equal nodes."""

from __future__ import annotations

import re
from typing import Any

import pytest
from data import Shape, causal_conv, linear_attention
from harness import lowered, module_text, node_for
from iree.compiler import ir
from linattn.dialect_patterns.causal_conv import contract as conv_contract
from linattn.dialect_patterns.causal_conv import fused_simd as conv_fused
from linattn.dialect_patterns.emit.builder import Builder
from linattn.dialect_patterns.linear_attention import contract as attention_contract
from linattn.dialect_patterns.linear_attention import fused_simd
from linattn.dialect_patterns.op import MICROSOFT, LoweringContext, LoweringOptions
from linattn.dialect_patterns.rewrite import lower_operators
from linattn.dialect_patterns.select import No
from linattn.dialect_patterns.target import Target
from linattn.runtime.errors import LoweringError
from state_ops import specs_of

CPU = Target("cpu", vector_bits=512)
FUSED = LoweringOptions("fused_simd")


def emit(
    op_type: str, inputs: list[Any], attributes: dict[str, Any], open_dims: bool, options: LoweringOptions = FUSED
) -> ir.Module:
    specs = specs_of(op_type, inputs, open_dims)
    return lowered("", op_type, 27, specs, attributes, 2, "cpu", options)


def names(module: ir.Module) -> list[str]:
    """Operations of the function, without the kernel's."""
    found: list[str] = []
    for op in module.body.operations:
        if op.operation.name == "func.func":
            op.operation.walk(lambda inner: (found.append(inner.name), ir.WalkResult.ADVANCE)[1])
    return found


@pytest.mark.parametrize("open_dims", [True, False])
@pytest.mark.parametrize("options", [FUSED, LoweringOptions()], ids=["forced", "chosen"])
@pytest.mark.parametrize("shape", [Shape("linear"), Shape("gated", "key"), Shape("gated_delta")], ids=lambda s: s.rule)
def test_linear_attention_is_one_dispatch(shape: Shape, options: LoweringOptions, open_dims: bool) -> None:
    ops = names(emit("LinearAttention", linear_attention(shape, 2, 9), shape.attributes, open_dims, options))
    assert ops.count("flow.dispatch") == 1
    assert not [op for op in ops if op.startswith(("linalg.", "scf."))]


@pytest.mark.parametrize("open_dims", [True, False])
@pytest.mark.parametrize("tokens", [1, 9])
def test_causal_conv_is_one_dispatch(tokens: int, open_dims: bool) -> None:
    ops = names(emit("CausalConvWithState", causal_conv(2, 32, tokens, 4), {"activation": "silu"}, open_dims))
    assert ops.count("flow.dispatch") == 1
    assert not [op for op in ops if op.startswith(("linalg.", "scf."))]


def test_equal_nodes_share_an_executable() -> None:
    shape = Shape()
    specs = specs_of("LinearAttention", linear_attention(shape, 1, 4), False)
    context = ir.Context()
    context.load_all_available_dialects()
    with context, ir.Location.unknown():
        node = node_for("", "LinearAttention", 27, specs, shape.attributes, 2)
        outputs = attention_contract.output_types(attention_contract.parse(node))
        text = module_text("", "LinearAttention", 27, specs, outputs, shape.attributes)
        module = ir.Module.parse(text + text.replace("@main", "@other"))
        assert lower_operators(module, LoweringContext(Builder(), CPU, FUSED)) == 2
        symbols = [ir.StringAttr(op.attributes["sym_name"]).value for op in module.body.operations]
    assert len(symbols) == 3
    assert re.fullmatch(r"linear_attention_gated_delta_fused_simd_f32_.*_16x8_b1t4_.*", symbols[0])


def test_prompts_of_all_sizes_share_an_executable() -> None:
    shape, found = Shape(), []
    for tokens in (8, 64):
        module = emit("LinearAttention", linear_attention(shape, 1, tokens), shape.attributes, False)
        symbols = [op.attributes["sym_name"] for op in module.body.operations if "sym_name" in op.attributes]
        found.append(ir.StringAttr(symbols[0]).value)
        assert f"tensor<1x{tokens}x16xf32>" in str(module)  # the results' sizes stay known
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("sizes", "target", "reason"),
    [
        ({"dk": 16, "dv": 6}, CPU, "dv=6 is not a multiple of 4"),
        ({"dk": 2, "dv": 8}, CPU, "dk=2 is not a multiple of 4"),
        ({"dk": 4096, "dv": 8}, CPU, "do not fit on the stack"),
        ({}, Target("cuda", is_gpu=True, subgroup_size=32), "not a CPU"),
        ({}, Target("cpu"), "not a CPU with vectors"),
    ],
)
def test_reasons(sizes: dict[str, int], target: Target, reason: str) -> None:
    shape = Shape(**sizes)
    specs = specs_of("LinearAttention", linear_attention(shape, 1, 9), True)
    contract = attention_contract.parse(node_for("", "LinearAttention", 27, specs, shape.attributes, 2))
    legality = fused_simd.is_legal(contract, target)
    assert isinstance(legality, No)
    assert reason in legality.reason


def test_forcing_it_where_it_is_not_legal_fails() -> None:
    shape = Shape(dv=6)
    with pytest.raises(LoweringError, match="dv=6 is not a multiple of 4"):
        emit("LinearAttention", linear_attention(shape, 1, 9), shape.attributes, True)


@pytest.mark.parametrize(
    ("channels", "taps", "tokens", "attributes", "reason"),
    [
        (32, 4, 9, {"channels_last": 1}, "channels_last"),
        (32, 1, 9, {}, "one tap"),
        (32, 4, 9, {"dilation": 100}, "more than 256"),
        (6, 4, 1, {}, "do not fill vectors"),
    ],
)
def test_causal_conv_reasons(channels: int, taps: int, tokens: int, attributes: dict[str, Any], reason: str) -> None:
    inputs = causal_conv(1, channels, tokens, taps, past=False)
    if attributes.get("channels_last"):
        inputs[0] = inputs[0].transpose(0, 2, 1)  # type: ignore[union-attr]
    specs = specs_of("CausalConvWithState", inputs, False)
    contract = conv_contract.parse(node_for(MICROSOFT, "CausalConvWithState", 1, specs, attributes, 2))
    legality = conv_fused.is_legal(contract, CPU)
    assert isinstance(legality, No)
    assert reason in legality.reason
