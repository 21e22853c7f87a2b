"""MoE and QMoE: the reference against ONNX Runtime, every strategy against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from experts_runs import Case, check_program, model_of
from linattn.dialect_patterns.experts.contract import parse
from linattn.dialect_patterns.experts.reference import dequantised, reference
from linattn.dialect_patterns.op import LoweringOptions
from linattn.frontend import CompileOptions, compile_model
from linattn.runtime import Program
from linattn.runtime.errors import UnsupportedModelError

from tests.harness import node_for, run_op, spec
from tests.onnx_runtime import run_onnx_runtime
from tests.tolerances import BENIGN, error

DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
OPENAI = {"activation_alpha": 1.702, "activation_beta": 1.0, "swiglu_limit": 1.5, "normalize_routing_weights": 1}
NORMALISED = {"normalize_routing_weights": 1}

# What ONNX Runtime's CPU kernels compute too.
COMMON = [
    Case("swiglu-1", 1, attributes=NORMALISED),
    Case("swiglu-3", 3, bias=False, lead=(1, 3)),
    Case("swiglu-65", 65, attributes=OPENAI, lead=(5, 13)),
    Case("silu-3", 3, k=3, activation="silu"),
    Case("gelu-1", 1, k=1, activation="gelu", inner=100),
    Case("relu-65", 65, activation="relu", hidden=36, inner=20, attributes=NORMALISED),
    Case("identity-3", 3, activation="identity"),
    Case("ties-3", 3, k=3, router="ties", attributes=NORMALISED),
    Case("pairs-65", 65, k=3, router="pairs", attributes=NORMALISED),
    Case("one-65", 65, experts=16, router="one"),
    Case("few-65", 65, router="few", attributes=NORMALISED),
    Case("all-3", 3, experts=4, k=4),
    Case("many-1", 1, experts=70, k=8, attributes=NORMALISED),
]
OTHERS = [
    Case("halves-3", 3, fusion=2, attributes=OPENAI),
    Case("halves-65", 65, fusion=2),
    Case("separate-1", 1, fusion=0, fc3=True, attributes=OPENAI),
    Case("separate-65", 65, fusion=0, fc3=True, bias=False),
    Case("silu-fc3-3", 3, activation="silu", fc3=True),
    Case("relu2-65", 65, activation="relu2"),
    Case("geglu-3", 3, activation="geglu", fusion=2),
    Case("limit-after-1", 1, attributes={**OPENAI, "swiglu_limit_after_activation": 1}),
]
QUANTISED = [
    Case("int4-b32-1", 1, bits=4, block=32, inner=64, attributes=NORMALISED),
    Case("int4-b16-3", 3, bits=4, block=16, zeros=True, inner=64),
    Case("int4-b64-65", 65, bits=4, block=64, inner=64, zeros=True, router_weights=True),
    Case("int4-column-3", 3, bits=4, zeros=True),
    Case("int4-column-65", 65, bits=4),
    Case("int8-b32-1", 1, bits=8, block=32, inner=64, router="one"),
    Case("int8-b16-65", 65, bits=8, block=16, zeros=True, attributes=OPENAI, wide_scales=True),
    Case("int8-column-3", 3, bits=8, activation="silu"),
    Case("int4-b128-1", 1, bits=4, block=128, hidden=256, inner=128, router_weights=True, attributes=NORMALISED),
    Case("int4-b256-65", 65, bits=4, block=256, hidden=256, inner=256, zeros=True),
    Case("int4-halves-3", 3, bits=4, block=16, fusion=2),
    Case("int4-fc3-65", 65, bits=4, block=16, fusion=0, fc3=True),
]


@pytest.mark.parametrize("case", COMMON, ids=lambda case: case.name)
def test_reference(case: Case) -> None:
    inputs = case.inputs(np.float32)
    constants = [i for i in range(2, len(inputs)) if inputs[i] is not None]
    attributes = case.all_attributes
    (want,) = run_onnx_runtime("MoE", inputs, attributes, domain="com.microsoft", version=1, constants=constants)
    assert error(want, reference(case.contract(inputs), inputs)) < BENIGN["float32"]


@pytest.mark.parametrize("case", [c for c in QUANTISED if c.fusion == 1], ids=lambda case: case.name)
def test_quantised_reference(case: Case) -> None:
    """Against QMoE where that multiplies in f32, against MoE with the weights as they are dequantised elsewhere."""
    inputs = case.inputs(np.float32)
    contract = case.contract(inputs)
    common: dict[str, Any] = {"domain": "com.microsoft", "version": 1}
    if case.bits == 4:
        constants = [i for i in range(2, len(inputs)) if inputs[i] is not None and i != 14]
        (want,) = run_onnx_runtime("QMoE", inputs, case.all_attributes, constants=constants, **common)
    else:
        weights = [dequantised(m, inputs).astype(np.float32) for m in (contract.fc1, contract.fc2)]
        plain = [*inputs[:2], weights[0], inputs[4], weights[1], inputs[7]]
        attributes = {**replace(case, bits=0, block=0).all_attributes, **NORMALISED}  # as QMoE always does
        (want,) = run_onnx_runtime("MoE", plain, attributes, **common)
    assert error(want, reference(contract, inputs)) < BENIGN["float32"]


ALL = {case.name: case for case in (*COMMON, *OTHERS, *QUANTISED)}
# One case or two for each way through the kernels; what these share with others is not compiled again.
SAME = ("swiglu-3", "silu-3", "identity-3", "ties-3", "one-65", "all-3", "halves-65", "separate-1", "geglu-3",
        "int4-b16-3", "int4-column-65", "int8-b16-65", "int4-b256-65", "int4-halves-3")  # fmt: skip
MOST = [case for name, case in ALL.items() if name not in SAME]
SOME = [ALL[name] for name in ("ties-3", "one-65", "separate-1", "geglu-3", "int4-b16-3", "int8-b16-65")]
FEW = [ALL[name] for name in ("one-65", "separate-1", "int4-b16-3")]


def check(cases: list[Case], dtype: Any, options: CompileOptions, open_tokens: bool = False) -> None:
    model, feeds = model_of(cases, dtype, open_tokens)
    compiled = compile_model(model, options)
    assert all("fused_simd" in line for line in compiled.report.others), compiled.report.others
    check_program(Program.load(compiled.module), cases, feeds, dtype)


def test_f32() -> None:
    check(MOST, np.float32, CompileOptions())


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_16_bits(dtype: str) -> None:
    check(SOME, DTYPES[dtype], CompileOptions())


@pytest.mark.parametrize("features", ["x86-64-v2", "portable"])
def test_vectors_of_any_cpu(features: str) -> None:
    check(FEW, np.float32, CompileOptions(cpu_features=features))


def test_open_tokens() -> None:
    cases = [replace(ALL[name], tokens=7, lead=()) for name in ("swiglu-3", "int4-b16-3")]
    check(cases, np.float32, CompileOptions(batch=None), open_tokens=True)


@pytest.mark.parametrize("tokens", [3, 65])
def test_a_router_without_numbers(tokens: int) -> None:
    """NaN and inf choose some experts or others; what they choose is no matter of the other tokens."""
    case = replace(ALL["int4-b16-3"], name="nan", tokens=tokens)
    model, feeds = model_of([case], np.float32)
    program = Program.load(compile_model(model, CompileOptions()).module)
    want = program.run(feeds)["y0"]
    logits = feeds["in0_1"].copy()
    logits[1], logits[2, :2] = np.nan, (np.inf, -np.inf)
    got = program.run({**feeds, "in0_1": logits})["y0"]
    others = [t for t in range(tokens) if t not in (1, 2)]
    assert np.array_equal(got[others], want[others])


def test_memory_between_the_kernels_is_counted() -> None:
    model, _ = model_of([Case("wide", 65, experts=64, k=64, hidden=16, inner=16, bias=False)], np.float32)
    with pytest.raises(UnsupportedModelError, match="all that a call holds there takes too much memory"):
        compile_model(model, CompileOptions(max_memory=1 << 20))


@pytest.mark.parametrize("case", [COMMON[2], OTHERS[4], QUANTISED[1], QUANTISED[3]], ids=lambda case: case.name)
def test_dense(case: Case) -> None:
    """The portable form, which takes weights that the model computes."""
    inputs = case.inputs(np.float32)
    common: dict[str, Any] = {"domain": "com.microsoft", "version": 1, "options": LoweringOptions("dense")}
    (got,) = run_op(case.op_type, inputs, case.all_attributes, **common)
    assert error(got, reference(case.contract(inputs), inputs)) < BENIGN["float32"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": 9}, "attribute 'k', got 9, expected 1 to the 8 experts"),
        ({"use_sparse_mixer": 1}, "attribute 'use_sparse_mixer', got 1, expected 0"),
        ({"activation_type": "tanh"}, "attribute 'activation_type', got 'tanh', expected relu or gelu"),
        ({"activation_alpha": float("nan")}, "the activation's alpha, got nan, expected a finite number"),
        ({"swiglu_fusion": 0}, "attribute 'swiglu_fusion', got 0, expected 1 or 2, or swiglu with fc3"),
        ({"router": 1}, "unknown attribute 'router'"),
    ],
)
def test_refused(changed: dict[str, Any], message: str) -> None:
    case = Case("swiglu", 3)
    specs = [spec(a) for a in case.inputs(np.float32)]
    node = node_for("com.microsoft", "MoE", 1, specs, {**case.all_attributes, **changed}, 1)
    with pytest.raises(UnsupportedModelError, match=message):
        parse(node)


def test_sizes_that_are_not_known_yet() -> None:
    """A first check of a model sees shapes that inference has left open; the weights know them."""
    case = Case("swiglu", 3)
    x, router, *rest = (spec(a) for a in case.inputs(np.float32))
    assert x is not None
    assert router is not None
    x, router = (replace(value, shape=(None, None)) for value in (x, router))
    node = node_for("com.microsoft", "MoE", 1, [x, router, *rest], case.all_attributes, 1)
    assert parse(node).x.shape == (None, case.hidden)
