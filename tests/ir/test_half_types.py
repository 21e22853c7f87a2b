"""Every operator of ours compiles in 16 bits for GPUs, of families that differ; nothing is run."""

from __future__ import annotations

import shutil

import half_types
import pytest
import spirv
from half_types import HALF, MICROSOFT, PAST, Case
from linattn.frontend import CompileOptions, compile_model

TARGETS = ["cuda", "vulkan:hopper", "vulkan:adreno"]


def test_there_is_a_case_of_every_operator() -> None:
    assert half_types.untried() == set(), "add what is new to half_types.cases"


@pytest.mark.slow
@pytest.mark.parametrize(("machine", "dtype"), [*((machine, "bf16") for machine in TARGETS), ("vulkan:valhall", "f16")])
def test_every_operator_compiles(machine: str, dtype: str) -> None:
    target, _, gpu = machine.partition(":")
    model = half_types.model(dtype, half_types.all_cases())
    module = compile_model(model, CompileOptions(target=target, gpu_target=gpu or None)).module
    if target == "vulkan" and shutil.which("spirv-val"):
        assert spirv.faults(module) == []


def test_sums_with_a_bias_fit_a_small_memory() -> None:
    """IREE's own form of it keeps all 8 rows in a workgroup's memory, 65,600 bytes; there are 32,768."""
    rows, row = (HALF, (1, 8, 2048)), (HALF, (2048,))
    norm = Case("SkipSimplifiedLayerNormalization", [rows, rows, row, row], {}, MICROSOFT, (True, False, False, True))
    assert compile_model(half_types.model("f16", [norm]), CompileOptions(target="vulkan", gpu_target="valhall")).module


def test_attention_over_open_keys_fits_the_workgroups() -> None:
    """IREE's sum over the keys takes a workgroup for each of 16 x 64 x 64 results; there are 65,535 at most."""
    caches = [(HALF, (1, 8, PAST, 64))] * 2
    heads = [(HALF, (1, 16, 64, 64)), *[(HALF, (1, 8, 64, 64))] * 2]
    case = Case("Attention", [*heads, None, *caches], {"is_causal": 1}, outputs=(True, True, True))
    options = CompileOptions(target="vulkan", gpu_target="adreno", max_context=None)
    assert compile_model(half_types.model("f16", [case]), options).module
