"""Every operator of ours compiles in bf16 for GPUs, of families that differ; nothing is run."""

from __future__ import annotations

import shutil

import half_types
import pytest
import spirv
from linattn.frontend import CompileOptions, compile_model

TARGETS = ["cuda", "vulkan:hopper", "vulkan:adreno"]


def test_there_is_a_case_of_every_operator() -> None:
    assert half_types.untried() == set(), "add what is new to half_types.cases"


@pytest.mark.slow
@pytest.mark.parametrize("machine", TARGETS)
def test_every_operator_compiles(machine: str) -> None:
    target, _, gpu = machine.partition(":")
    model = half_types.model("bf16", half_types.all_cases())
    module = compile_model(model, CompileOptions(target=target, gpu_target=gpu or None)).module
    if target == "vulkan" and shutil.which("spirv-val"):
        assert spirv.faults(module) == []
