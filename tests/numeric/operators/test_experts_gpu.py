"""MoE and QMoE on GPUs: run on lavapipe against the reference, compiled for CUDA and for real Vulkan devices."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from experts_runs import Case, check_program, model_of
from linattn.frontend import CompileOptions, compile_model
from linattn.runtime import Program

OPENAI = {"activation_alpha": 1.702, "activation_beta": 1.0, "swiglu_limit": 1.5, "normalize_routing_weights": 1}
CASES = [
    Case("swiglu-1", 1, attributes=OPENAI),
    Case("pairs-65", 65, k=3, router="pairs", lead=(5, 13)),
    Case("one-33", 33, experts=16, router="one", hidden=36, inner=20, activation="relu2"),
    Case("many-1", 1, experts=70, k=8, router="ties", attributes=OPENAI),
    Case("separate-5", 5, fusion=0, fc3=True, bias=False),
    Case("int4-b16-3", 3, bits=4, block=16, zeros=True, inner=64, router_weights=True, wide_scales=True),
    Case("int4-halves-17", 17, bits=4, block=32, fusion=2, inner=64),
    Case("int8-column-17", 17, bits=8, activation="silu", fc3=True),
]


def compiled(dtype: Any, target: str, **options: Any) -> tuple[bytes, dict[str, np.ndarray]]:
    model, feeds = model_of(CASES, dtype)
    result = compile_model(model, CompileOptions(target=target, **options))
    assert all("fused_simt" in line for line in result.report.others), result.report.others
    return result.module, feeds


@pytest.mark.vulkan
def test_vulkan() -> None:
    module, feeds = compiled(np.float32, "vulkan")
    check_program(Program.load(module, device="vulkan"), CASES, feeds, np.float32)


@pytest.mark.vulkan
def test_subgroups_and_16_bits() -> None:
    """With the operations among threads that lavapipe has."""
    module, feeds = compiled(ml_dtypes.bfloat16, "vulkan", gpu_target="host")
    check_program(Program.load(module, device="vulkan"), CASES, feeds, ml_dtypes.bfloat16)


@pytest.mark.parametrize(("target", "gpu"), [("cuda", "sm_89"), ("vulkan", "ada")])
def test_compiles(target: str, gpu: str) -> None:
    assert compiled(np.float16, target, gpu_target=gpu)[0]


def test_open_tokens_compile_for_cuda() -> None:
    model, _ = model_of([Case("open", 7), Case("open4", 7, bits=4, block=16)], np.float32, open_tokens=True)
    report = compile_model(model, CompileOptions(target="cuda", batch=None)).report
    assert all("fused_simt" in line for line in report.others), report.others
