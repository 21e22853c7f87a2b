"""MatMul with few rows on a Vulkan device (lavapipe in CI), without and with subgroup operations, against float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from harness import TARGETS, node_for, run_op, spec
from linattn.dialect_patterns.emit import tiled_product
from linattn.dialect_patterns.mat_mul import fused_mma, fused_simt
from linattn.dialect_patterns.mat_mul.contract import MatMul, parse
from linattn.dialect_patterns.mat_mul.op import choose
from linattn.dialect_patterns.node import TensorSpec
from linattn.dialect_patterns.op import LoweringOptions
from linattn.dialect_patterns.select import No, Yes
from linattn.dialect_patterns.target import Target
from tolerances import BENIGN, error

CUDA = Target("cuda", is_gpu=True, subgroup_size=32, max_threads=1024, workgroup_memory=49_152,
              matrix_stride="elements")  # fmt: skip


def contract(rows: int | None, depth: int, columns: int, dtype: str = "f16") -> MatMul:
    return MatMul("test", TensorSpec((1, rows, depth), dtype), TensorSpec((depth, columns), dtype))


@pytest.mark.vulkan
@pytest.mark.xdist_group("vulkan")
@pytest.mark.parametrize("target", ["vulkan", "lavapipe"])
@pytest.mark.parametrize(
    ("dtype", "rows", "depth", "columns"),
    [
        (np.float32, 1, 64, 36),  # columns that do not fill the last tile
        (np.float32, 8, 260, 132),
        (np.float32, 1, 4, 4),
        (np.float16, 3, 128, 20),
        (np.float16, 1, 96, 2560),  # wide tiles
        (ml_dtypes.bfloat16, 2, 256, 16),
        (np.float32, 30, 64, 16),  # many rows, of few columns: blocks, the last one not full
        (np.float16, 100, 128, 32),
        (ml_dtypes.bfloat16, 9, 32, 4),
    ],
)
def test_few_rows(target: str, dtype: Any, rows: int, depth: int, columns: int) -> None:
    if target == "vulkan" and dtype != np.float32:
        pytest.skip("IREE's own baseline has no 16-bit storage")
    rng = np.random.default_rng(depth)
    a = rng.standard_normal((1, rows, depth)).astype(dtype)
    b = rng.standard_normal((depth, columns)).astype(dtype)
    (got,) = run_op("MatMul", [a, b], version=13, target=target)
    assert got.dtype == dtype
    want = a.astype(np.float64) @ b.astype(np.float64)
    assert error(got, want) <= BENIGN[np.dtype(dtype).name]


@pytest.mark.vulkan
@pytest.mark.xdist_group("vulkan")
@pytest.mark.parametrize(
    ("plan", "shape", "columns", "open_dims"),
    [
        (3, (1, 9, 64), 64, False),  # which IREE makes no legal SPIR-V of
        (3, (2, 3, 5, 32), 20, True),
        (2, (1, 40, 48), 100, False),
        (1, (65, 16), 68, True),
        (0, (1, 70, 128), 260, False),
    ],
)
def test_many_rows_of_bf16(
    plan: int, shape: tuple[int, ...], columns: int, open_dims: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tile, rows and columns that do not fill the last one, open sizes."""
    monkeypatch.setattr(tiled_product, "_PLANS", (tiled_product._PLANS[plan],))
    rng = np.random.default_rng(columns)
    a = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
    b = rng.standard_normal((shape[-1], columns)).astype(ml_dtypes.bfloat16)
    axes = {0: range(len(shape) - 1)} if open_dims else {}
    (got,) = run_op("MatMul", [a, b], version=13, target="lavapipe", open_axes=axes)
    assert got.dtype == ml_dtypes.bfloat16
    assert error(got, a.astype(np.float64) @ b.astype(np.float64)) <= BENIGN["bfloat16"]


@pytest.mark.parametrize(
    ("target", "dtype", "rows", "depth", "chosen"),
    [
        (Target("vulkan", is_gpu=True, subgroup_size=16), "bf16", 9, 64, "fused_tiled"),
        (Target("vulkan", is_gpu=True), "bf16", None, 64, "fused_tiled"),
        (Target("vulkan", is_gpu=True), "bf16", 8, 64, "fused_simt"),
        (Target("vulkan", is_gpu=True), "bf16", 9, 60, "widened"),
        (Target("vulkan", is_gpu=True), "f16", 9, 64, "imported"),
        (Target("cuda", is_gpu=True, subgroup_size=32, matrix_units=True), "bf16", 9, 64, "imported"),
    ],
)
def test_which_rows_are_tiled(target: Target, dtype: str, rows: int | None, depth: int, chosen: str) -> None:
    assert choose(contract(rows, depth, 64, dtype), target, LoweringOptions()).strategy == chosen


@pytest.mark.vulkan
@pytest.mark.xdist_group("vulkan")
@pytest.mark.parametrize(
    ("target", "dtype", "rows", "depth", "columns"),
    [
        ("vulkan", np.float32, 1, 64, (36, 4, 132)),
        ("lavapipe", np.float16, 3, 256, (1100, 16, 16, 8)),
        ("lavapipe", ml_dtypes.bfloat16, 8, 128, (20, 20)),
        ("lavapipe", np.float16, 20, 64, (16, 16)),
    ],
)
def test_joined(target: str, dtype: Any, rows: int, depth: int, columns: tuple[int, ...]) -> None:
    rng = np.random.default_rng(depth)
    a = rng.standard_normal((1, rows, depth)).astype(dtype)
    b = [rng.standard_normal((depth, count)).astype(dtype) for count in columns]
    got = run_op("JoinedMatMul", [a, *b], domain="linattn", version=1, num_outputs=len(b), target=target)
    for y, weight in zip(got, b, strict=True):
        assert y.dtype == dtype
        assert error(y, a.astype(np.float64) @ weight.astype(np.float64)) <= BENIGN[np.dtype(dtype).name]


@pytest.mark.vulkan
@pytest.mark.xdist_group("vulkan")
@pytest.mark.parametrize(
    ("target", "dtype", "rows", "depth", "columns"),
    [("vulkan", np.float32, 2, 64, 36), ("lavapipe", np.float16, 1, 256, 2100), ("lavapipe", np.float32, 8, 128, 20)],
)
def test_gated(target: str, dtype: Any, rows: int, depth: int, columns: int) -> None:
    rng = np.random.default_rng(columns)
    a = (rng.standard_normal((1, rows, depth)) * 0.3).astype(dtype)
    gate, up = ((rng.standard_normal((depth, columns)) * 0.3).astype(dtype) for _ in range(2))
    gate[:, 0] = -300 * np.sign(a[0, 0])  # far out, where the exponential overflows
    (got,) = run_op("GatedMatMul", [a, gate, up], domain="linattn", version=1, target=target)
    g, u = (a.astype(np.float64) @ weight.astype(np.float64) for weight in (gate, up))
    assert error(got, g * (1 + np.tanh(g / 2)) / 2 * u) <= BENIGN[np.dtype(dtype).name]


def test_selection() -> None:
    options = LoweringOptions(strategy="recurrent")  # of the state operators, not of this one
    assert choose(contract(1, 64, 64), CUDA, options).strategy == "fused_simt"
    assert choose(contract(512, 64, 64), CUDA, options).strategy == "fused_mma"
    assert choose(contract(512, 64, 16, "f32"), CUDA, options).strategy == "fused_simt"
    left = choose(contract(512, 64, 64), TARGETS["vulkan"], options)
    assert left.strategy == "imported"
    assert {"fused_simt", "fused_mma"} <= set(left.rejected)
    assert choose(contract(1, 64, 64), TARGETS["cpu"], options).strategy == "imported"


@pytest.mark.parametrize(
    ("case", "fits"),
    [
        (contract(9, 64, 64), True),
        (contract(8, 64, 64), False),  # few rows are faster otherwise
        (contract(512, 1024, 32000), True),
        (contract(512, 96, 40), True),
        (contract(512, 96, 32), False),  # few columns too
        (contract(512, 80, 64), False),
        (contract(512, 64, 12), False),
        (contract(None, 64, 64), False),
        (contract(512, 64, 64, "bf16"), False),
    ],
)
def test_what_the_matrix_units_take(case: MatMul, fits: bool) -> None:
    assert isinstance(fused_mma.is_legal(case, CUDA), Yes) == fits


@pytest.mark.parametrize("columns", [4, 16, 1000, 32000, 151_936])
def test_the_sums_fit_in_a_workgroup(columns: int) -> None:
    for target in (CUDA, TARGETS["vulkan"], TARGETS["lavapipe"]):
        for rows in (1, 8):
            plan = fused_simt.plan_for(contract(rows, 1024, columns), target)
            assert plan.memory(rows) <= target.workgroup_memory
            assert plan.threads <= target.max_threads


def test_whatever_onnx_allows_is_left_to_the_importer() -> None:
    for a, b in (((4,), (4,)), ((2, 3, 4), (2, 4, 5)), ((5, 3, 4), (4,)), ((4,), (2, 4, 5))):
        node = node_for("", "MatMul", 13, [spec(np.zeros(a, np.float32)), spec(np.zeros(b, np.float32))], {}, 1)
        assert choose(parse(node), CUDA, LoweringOptions()).strategy == "imported"
    assert isinstance(fused_simt.is_legal(contract(9, 64, 64), CUDA), No)
