"""Numbers of experts, rows and tiles that kernels read from memory are made valid before they are used."""

from __future__ import annotations

import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from linattn.dialect_patterns.emit.dispatch import Kernel, executable_text
from linattn.dialect_patterns.experts import simd_bits_direct, simd_bits_tiled, simd_direct, simd_rows, simd_tiled
from linattn.dialect_patterns.experts.contract import Experts
from linattn.dialect_patterns.experts.simd_layers import first_layers, second_layer
from linattn.dialect_patterns.experts.simd_routing import grouping_kernel

from tests.harness import HOST
from tests.numeric.operators.experts_runs import Case

FLOATS = Case("floats", 65)
PACKED = Case("packed", 65, bits=4, block=16, inner=64, zeros=True)


def contract(case: Case) -> Experts:
    return replace(case.contract(case.inputs(np.dtype(ml_dtypes.bfloat16))), constant=True)


def kernels() -> dict[str, Kernel]:
    floats, packed = contract(FLOATS), contract(PACKED)
    layers, last = first_layers(floats), second_layer(floats)
    plan = layers[0].tiled(HOST, 130)
    return {
        "first": simd_direct.first_kernel(floats, HOST),
        "second": simd_direct.second_kernel(floats, HOST),
        "product": simd_tiled.product_kernel(floats, last, last.tiled(HOST, 130)),
        "gather": simd_rows.gathering_kernel(floats, HOST, plan.tile, across=True),
        "between": simd_rows.activating_kernel(floats, HOST, plan.tile, [plan.columns], across=True),
        "combine": simd_rows.combining_kernel(floats, HOST, plan.tile, 64),
        "groups": grouping_kernel(floats, plan.tile),
        "packed first": simd_bits_direct.first_kernel(packed, HOST, ["bf16"]),
        "packed second": simd_bits_direct.second_kernel(packed, HOST, "bf16"),
        "packed product": simd_bits_tiled.product_kernel(packed, second_layer(packed), HOST, "bf16"),
    }


def unchecked(text: str) -> list[str]:
    """The lines that use a number from a buffer as it is."""
    lines = text.splitlines()
    buffers = [m[1] for line in lines if (m := re.match(r"\s*(%\w+) = hal.interface.binding.subspan", line))]
    found: list[str] = []

    def uses(name: str) -> list[str]:
        return [line for line in lines if re.search(rf"{re.escape(name)}\b", line.partition("=")[2] or line)]

    for line in lines:
        load = re.match(r"\s*(%\w+) = memref.load (%\w+)\[.*xi32>$", line)
        if load is None or load[2] not in buffers:
            continue
        for use in uses(load[1]):
            cast = re.match(r"\s*(%\w+) = arith.index_castui", use)
            if cast is None:
                found += [] if "arith.cmpi sge" in use else [use]
            else:
                found += [after for after in uses(cast[1]) if "arith.minui" not in after]
    return found


@pytest.mark.parametrize("name", kernels())
def test_numbers_are_made_valid(name: str) -> None:
    text = executable_text(kernels()[name])
    assert "arith.minui" in text
    assert not unchecked(text)
