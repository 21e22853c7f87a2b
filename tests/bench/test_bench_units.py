"""The unit that a product ran on: read off the names that kernels really have, and its part of that unit's rate."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import harness
import ml_dtypes
import numpy as np
import pytest
from data import Shape, linear_attention
from linattn.dialect_patterns.machines import for_machines
from linattn.dialect_patterns.mat_mul import fused_amx, fused_simd
from linattn.dialect_patterns.mat_mul.amx_rows import rows_kernel
from linattn.dialect_patterns.mat_mul.contract import MatMul
from linattn.dialect_patterns.mat_mul_n_bits import fused_amx as bits_amx
from linattn.dialect_patterns.mat_mul_n_bits import fused_amx_bf16 as bits_amx_bf16
from linattn.dialect_patterns.mat_mul_n_bits import fused_simd as bits_simd
from linattn.dialect_patterns.mat_mul_n_bits.contract import MatMulNBits
from linattn.dialect_patterns.mat_mul_n_bits.simd_plan import amx_plan, plan
from linattn.dialect_patterns.node import TensorSpec
from linattn.frontend.lower.dispatches import operations
from linattn.frontend.targets import TargetOptions, resolve_target
from linattn.runtime import cpu
from linattn.runtime.bench.table import to_text
from linattn.runtime.bench.units import add_units, unit_of
from linattn.runtime.manifest_target import Target

X86, GPU = (Target("t", "d", architecture=name) for name in ("x86_64", None))
ROWS, DEPTH, COLUMNS = 64, 128, 96


def machine(features: str) -> Any:
    arm = features in ("cortex-a76", "apple-m2")
    return resolve_target("cpu", TargetOptions(cpu_features=features, target_triple="aarch64" if arm else None))


def product(features: str, dtype: str, rows: int = ROWS, fast: bool = False) -> list[str]:
    """The names of the kernels of a MatMul."""
    target = replace(machine(features).capabilities, fast_math=fast)
    c = MatMul("m", TensorSpec((rows, DEPTH), dtype), TensorSpec((DEPTH, COLUMNS), dtype), True)
    if not isinstance(fused_amx.is_legal(c, replace(target, fast_math=True)), fused_simd.Yes):
        p = fused_simd.plan_for(c, target)
        return [fused_simd.rows_kernel(c, p).name, fused_simd.product_kernel(c, p).name]
    t = fused_amx.tiling(c, target)
    plan_of = fused_simd.plan_for(c, target)
    return [rows_kernel(fused_amx.rows_of(c, t)).name, fused_amx.product_kernel(c, plan_of, t).name]


def bits(features: str, rounds: bool = True) -> list[str]:
    """The names of the kernels of a MatMulNBits."""
    target = machine(features).capabilities
    c = MatMulNBits("m", TensorSpec((ROWS, DEPTH), "f32"), COLUMNS, DEPTH, 4, 32, "default", False, rounds)
    if target.features >= fused_amx.FEATURES and not rounds:
        return [rows_kernel(bits_amx_bf16.rows_of(c)).name, bits_amx_bf16.product_kernel(c).name]
    if bits_amx.is_legal(c, target) == bits_simd.Yes():
        p: Any = amx_plan(c, target)
        return [bits_simd.rows_kernel(c, p).name, bits_amx.product_kernel(c, p).name]
    machines = (bits_simd.rows_kernel, bits_simd.product_kernel)

    def name(make: Any) -> str:
        return for_machines(target, lambda machine: make(c, plan(c, machine))).name

    return [name(make) for make in machines]


@pytest.mark.parametrize(
    ("make", "arguments", "unit"),
    [
        (product, ("sapphirerapids", "bf16"), "amx-bf16"),
        (product, ("sapphirerapids", "f16"), "amx-bf16, 3 products for one"),
        (product, ("sapphirerapids", "f16", ROWS, True), "amx-bf16, 2 products for one"),
        (product, ("sapphirerapids", "f32"), "amx-bf16, 3 products for one"),
        (product, ("znver4", "bf16"), "avx512_bf16"),
        (product, ("sapphirerapids", "bf16", 8), "amx-bf16"),
        (product, ("znver4", "f16"), "f32, 512 bits"),
        (product, ("znver4", "f32", 1), "f32, 512 bits"),
        (product, ("x86-64-v3", "bf16"), "f32, 256 bits"),
        (product, ("x86-64-v2", "f32"), "f32, 128 bits"),
        (bits, ("sapphirerapids",), "amx-int8"),
        (bits, ("sapphirerapids", False), "amx-bf16"),
        (bits, ("znver4",), "avx512_vnni"),
        (bits, ("x86-64-v4",), "avx512bw, bytes"),
        (bits, ("alderlake",), "avx_vnni"),
        (bits, ("x86-64-v3",), "avx2, bytes"),
        (bits, ("x86-64-v2",), "ssse3, bytes"),
        (bits, ("znver4", False), "f32, 512 bits"),
        (bits, ("cortex-a76",), "dotprod"),
        (bits, ("apple-m2",), "i8mm"),
        (product, ("apple-m2", "bf16", 1), "bfdot"),
        (product, ("apple-m2", "bf16"), "bfmmla"),
    ],
)
def test_unit(make: Callable[..., list[str]], arguments: tuple[Any, ...], unit: str) -> None:
    """What arranges a product's rows is none; every product's operations are known."""
    *before, last = make(*arguments)
    assert [unit_of(f"main$async_{name}", X86) for name in before] == [None] * len(before)
    found = unit_of(f"main$async_{last}", X86)
    assert found is not None
    assert found.name == unit
    assert [operations(name) for name in before] == [None] * len(before)
    rows = arguments[2] if make is product and len(arguments) > 2 else ROWS
    assert operations(last) == 2 * rows * DEPTH * COLUMNS


@pytest.mark.parametrize(
    ("level", "unit", "f32"),
    [
        ("x86-64-v4+vnni", "avx512_vnni", "f32, 512 bits"),
        ("x86-64-v3", "avx2, bytes", "f32, 256 bits"),
        ("x86-64-v2", "ssse3, bytes", "f32, 128 bits"),
    ],
)
def test_portable_modules_name_what_this_machine_took(
    level: str, unit: str, f32: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = machine("portable").levels
    needed = next(row for row in levels if row.name == level).instruction_sets
    monkeypatch.setattr(cpu, "machine_features", lambda: frozenset(needed))
    portable = replace(X86, levels=levels)
    for rounds, wanted in ((True, unit), (False, f32)):
        found = unit_of(bits("portable", rounds)[-1], portable)
        assert found is not None
        assert found.name == wanted


@pytest.mark.parametrize(
    ("key", "unit"),
    [
        ("mat_mul_fused_mma_f16_64x128x96_p", "matrix units"),
        ("mat_mul_n_bits_fused_simt_f32_1x128x96_p", "f32"),
        ("main$async_dispatch_3_matmul_64x96x128_f16xf16xf32", "IREE's"),
        ("dispatch_9_reduction_1024x128_f32", None),
        ("causal_conv_fused_simt_f16_n_c64", None),
    ],
)
def test_gpus(key: str, unit: str | None) -> None:
    found = unit_of(key, GPU)
    assert (None if found is None else found.name) == unit


@pytest.mark.parametrize(
    ("target", "where", "op", "dtype", "unit"),
    [
        ("cpu", "sapphirerapids", "Attention", np.float16, "amx-bf16"),
        ("cpu", "znver4", "Attention", ml_dtypes.bfloat16, "avx512_bf16"),
        ("cpu", "znver4", "Attention", np.float32, "f32, 512 bits"),
        ("cpu", "apple-m2", "Attention", ml_dtypes.bfloat16, "f32, 128 bits"),
        ("cpu", "x86-64-v3", "LinearAttention", np.float16, "f32, 256 bits"),
        ("cuda", "sm_90", "Attention", np.float16, "matrix units"),
        ("cuda", "sm_90", "Attention", np.float32, "f32"),
        ("cuda", "sm_90", "LinearAttention", np.float16, "matrix units"),
        ("vulkan", "hopper", "LinearAttention", np.float16, "matrix units"),
        ("vulkan", "baseline", "LinearAttention", np.float32, "f32"),
    ],
)
def test_what_attention_multiplies_with(
    target: str, where: str, op: str, dtype: type, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels whose operations no name tells have a unit all the same."""
    resolved = machine(where) if target == "cpu" else resolve_target(target, TargetOptions(gpu_target=where))
    monkeypatch.setitem(harness.TARGETS, "here", resolved.capabilities)
    if op == "Attention":
        attributes: dict[str, Any] = {"is_causal": 1}
        inputs = [np.zeros((1, 2, 64, 64), dtype)] * 3
    else:
        shape = Shape(q_heads=2, dk=64, dv=64)
        attributes, inputs = shape.attributes, linear_attention(shape, 1, 64, dtype=dtype)
    outputs = 1 if op == "Attention" else 2
    specs = [harness.spec(array) for array in inputs]
    text = str(harness.lowered("", op, 27, specs, attributes, outputs, "here"))
    kernels = [name for name in re.findall(r"flow.dispatch @(\w+)", text) if "_step_" not in name]
    assert kernels
    for name in kernels:
        found = unit_of(name, X86 if target == "cpu" else GPU)
        assert found is not None
        assert (found.name, operations(name)) == (unit, None)


def test_a_share_that_is_none_is_said() -> None:
    row = {"key": "k", "nodes": [], "count": 1, "seconds": 1e-3, "share": 1.0, "bytes": 1, "flop": 2, "unit": "bfmmla"}
    profile = {"subject": "m", "target": "cpu", "entry": "decode", "position": 0, "count": 1, "dispatch_s": 1e-3}
    result: dict[str, Any] = {"kind": "profile", "devices": {}, "versions": {}, "absent": []}
    result["method"] = {"unit_rates": ""}
    result["machine"] = {"cpu": "c", "cores": 2, "load_average": None}
    said = []
    for share in (1.2, 1.3):
        text = to_text(result | {"rows": [profile | {"rows": [row | {"unit_share": share}]}]})
        said.append("all shares say too much" in " ".join(text.split()))
    assert said == [False, True]


def test_share_of_the_rate() -> None:
    rows: list[dict[str, Any]] = [
        {"key": bits("sapphirerapids")[-1], "flop": 16e9, "seconds": 1e-3, "dtype": "i32"},
        {"key": "dispatch_9_reduction_1024x128_f32", "flop": None, "seconds": 1e-3, "dtype": "f32"},
    ]
    add_units(rows, X86, {"fma_flop_per_s": 1e12, "matrix_flop_per_s": None}, cores=0.5)
    assert (rows[0]["unit"], rows[0]["unit_flop_per_s"]) == ("amx-int8", 16e12)
    assert rows[0]["unit_share"] == pytest.approx(1.0)
    assert (rows[1]["unit"], rows[1]["unit_flop_per_s"], rows[1]["unit_share"]) == (None, None, None)
    add_units(rows, X86, None, cores=1.0)
    assert (rows[0]["unit"], rows[0]["unit_flop_per_s"], rows[0]["unit_share"]) == ("amx-int8", None, None)
