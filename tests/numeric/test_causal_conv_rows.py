"""CausalConvWithState between two transposes, as models have it: the kernel over rows, against float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from linattn.dialect_patterns.causal_conv.reference import reference
from linattn.dialect_patterns.op import MICROSOFT
from linattn.frontend import CompileOptions, compile_model
from linattn.runtime import Program
from onnx import helper, numpy_helper

from tests.data import causal_conv
from tests.harness import CPUS, DRIVERS, WIDTHS, skip_unless_it_runs
from tests.tolerances import check

# batch, channels, tokens, taps, dilation, activation, bias, past: tokens around the state's; channels that vectors of
# 4, 8 or 16 divide or do not, fewer than a vector has, and around groups of at most 512, the last of which gets what is
# left. The last case has nothing to swap.
CASES = [
    (1, 48, 2, 4, 1, "silu", True, True),
    (2, 24, 3, 4, 1, "silu", False, True),
    (1, 1032, 5, 4, 1, "none", True, False),
    (2, 8, 64, 2, 1, "silu", True, True),
    (1, 16, 13, 3, 4, "silu", True, True),
    (1, 16, 4, 9, 2, "none", False, False),
    (2, 4, 6, 4, 1, "none", True, True),
    (1, 7, 9, 4, 1, "silu", True, True),
    (2, 37, 5, 4, 1, "silu", True, True),
    (1, 1031, 4, 4, 1, "silu", False, True),
    (2, 16, 1, 4, 1, "silu", True, True),
]
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]
ON_CPUS = [*((width, np.float32) for width in WIDTHS), ("cpu128", np.float16), ("cpu512", np.float16)]
ON_CPUS += [("cpu256", ml_dtypes.bfloat16)]
ON_VULKAN = [pytest.param("vulkan", dtype, marks=pytest.mark.vulkan) for dtype in DTYPES]


def feeds_of(case: tuple[Any, ...], dtype: Any) -> list[np.ndarray | None]:
    """Input, weight, bias and past state of a case, the input with its channels first."""
    batch, channels, tokens, taps, dilation, _, bias, past = case
    _, weight, offset, _ = causal_conv(batch, channels, 0, taps, bias=bias, dtype=dtype)  # whatever the tokens are
    x, _, _, state = causal_conv(batch, channels, tokens, (taps - 1) * dilation + 1, past=past, dtype=dtype)
    return [x, weight, offset, state]


def build(cases: list[tuple[Any, ...]], dtype: Any, tokens: str | None = None) -> onnx.ModelProto:
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes, inputs, outputs, weights = [], [], [], []
    for i, case in enumerate(cases):
        batch, channels, count, taps, dilation, activation, *_ = case
        _, weight, bias, past = feeds_of(case, dtype)
        length = (taps - 1) * dilation
        given = [f"t{i}", f"w{i}", f"b{i}" if bias is not None else "", f"past{i}" if past is not None else ""]
        weights += [
            numpy_helper.from_array(a, name) for a, name in ((weight, f"w{i}"), (bias, f"b{i}")) if a is not None
        ]
        inputs.append(helper.make_tensor_value_info(f"x{i}", element, [batch, tokens or count, channels]))
        if past is not None:
            inputs.append(helper.make_tensor_value_info(f"past{i}", element, [batch, channels, length]))
        outputs.append(helper.make_tensor_value_info(f"y{i}", element, [batch, tokens or count, channels]))
        outputs.append(helper.make_tensor_value_info(f"present{i}", element, [batch, channels, length]))
        attributes = {"activation": activation, "dilation": dilation, "ndim": 1}
        nodes += [
            helper.make_node("Transpose", [f"x{i}"], [f"t{i}"], f"before{i}", perm=[0, 2, 1]),
            helper.make_node(
                "CausalConvWithState", given, [f"u{i}", f"present{i}"], f"c{i}", domain=MICROSOFT, **attributes
            ),
            helper.make_node("Transpose", [f"u{i}"], [f"y{i}"], f"behind{i}", perm=[0, 2, 1]),
        ]
    graph = helper.make_graph(nodes, "convolutions", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def check_all(program: Program, cases: list[tuple[Any, ...]], dtype: Any) -> None:
    values = [feeds_of(case, dtype) for case in cases]
    feeds = {f"x{i}": np.ascontiguousarray(v[0].transpose(0, 2, 1)) for i, v in enumerate(values) if v[0] is not None}
    feeds |= {f"past{i}": v[3] for i, v in enumerate(values) if v[3] is not None}
    results = program.run(feeds)
    for i, (case, value) in enumerate(zip(cases, values, strict=True)):
        output, state = reference(*value, dilation=case[4], activation=case[5])  # type: ignore[arg-type]
        check([results[f"y{i}"], results[f"present{i}"]], (output.transpose(0, 2, 1), state))


@pytest.mark.parametrize(("target", "dtype"), [*ON_CPUS, *ON_VULKAN])
def test_between_transposes(target: str, dtype: Any) -> None:
    options = CompileOptions(target=DRIVERS[target], cpu_features=CPUS.get(target))
    module = compile_model(build(CASES, dtype), options).module
    assert b"_rows" in module
    assert b"_transpose_" not in module
    skip_unless_it_runs(target)
    check_all(Program.load(module), CASES, dtype)


@pytest.mark.parametrize("target", WIDTHS)
def test_open_tokens(target: str) -> None:
    """The number of tokens is known at run time only."""
    kinds = [(1, 24, 0, 4, 1, "silu", True, True), (2, 16, 0, 3, 3, "none", False, True)]
    kinds.append((1, 12, 0, 4, 1, "silu", True, True))
    kinds.append((1, 521, 0, 4, 1, "silu", True, True))
    kinds.append((1, 3, 0, 4, 1, "silu", True, True))  # no vector at all: the kernel over channels, transposes and all
    model = build(kinds, np.float32, "tokens")
    module = compile_model(model, CompileOptions(cpu_features=CPUS[target], prefill_blocks=None)).module
    skip_unless_it_runs(target)
    program = Program.load(module)
    for tokens in (2, 3, 4, 7, 40):
        check_all(program, [(*kind[:2], tokens, *kind[3:]) for kind in kinds], np.float32)
