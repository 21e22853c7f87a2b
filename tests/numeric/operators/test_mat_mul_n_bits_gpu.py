"""The GPU kernels of MatMulNBits against ONNX Runtime on a Vulkan device (lavapipe in CI), and when they are chosen.

``vulkan`` is without subgroup operations and 16-bit storage, ``lavapipe`` with both; the matrix units are emulated.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import matrices
import ml_dtypes
import numpy as np
import pytest
from comparing import MICROSOFT
from harness import DTYPES, TARGETS, compile_module, lowered, node_for, run_op, spec
from iree.compiler import ir
from iree.compiler.api import Session
from linattn.dialect_patterns.emit import tiled_product
from linattn.dialect_patterns.mat_mul import fused_mma as plain_mma
from linattn.dialect_patterns.mat_mul import mma_plan
from linattn.dialect_patterns.mat_mul_n_bits import fused_mma, fused_simt, fused_tiled
from linattn.dialect_patterns.mat_mul_n_bits.contract import MatMulNBits
from linattn.dialect_patterns.mat_mul_n_bits.op import choose, parse
from linattn.dialect_patterns.node import TensorSpec
from linattn.dialect_patterns.op import LoweringOptions
from linattn.dialect_patterns.select import No, Yes
from linattn.dialect_patterns.target import Target
from onnx_runtime import run_onnx_runtime
from test_mat_mul_n_bits import OP, check, operands, shape_attributes
from tolerances import BENIGN, error

CUDA = Target("cuda", is_gpu=True, subgroup_size=32, max_threads=1024, workgroup_memory=49_152, matrix_units=True,
              matrix_stride="elements")  # fmt: skip
OPTIONS = LoweringOptions()

vulkan = [pytest.mark.vulkan, pytest.mark.xdist_group("vulkan")]


def contract(
    rows: int | None, depth: int = 128, columns: int = 96, dtype: Any = np.float32,
    block: int = 32, accuracy: int = 0, zeros: str = "",
) -> MatMulNBits:  # fmt: skip
    attributes = shape_attributes(depth, block, 4, accuracy, columns)
    inputs = operands(attributes, (1, 1), zeros=zeros, dtype=dtype)
    specs = [TensorSpec((1, rows, depth), DTYPES[np.dtype(dtype).name]), *(spec(array) for array in inputs[1:])]
    return parse(node_for(MICROSOFT, OP, 1, specs, attributes, 1))


class TestFewRows:
    pytestmark = vulkan

    @pytest.mark.parametrize("target", ["vulkan", "lavapipe"])
    @pytest.mark.parametrize(
        ("bits", "block", "zeros", "depth", "columns", "tokens", "accuracy"),
        [
            (4, 32, "", 1184, 300, 1, 0),  # 148 words by 64 threads; a tile of columns that is not full
            (4, 32, "packed", 328, 44, 3, 4),  # the last block not full
            (4, 16, "float", 88, 41, 8, 4),
            (8, 256, "packed", 900, 12, 2, 4),  # a block of more words than there are threads in a subgroup
            (2, 16, "packed", 88, 44, 1, 0),  # a word is a block
        ],
    )
    def test_f32(
        self, target: str, bits: int, block: int, zeros: str, depth: int, columns: int, tokens: int, accuracy: int
    ):
        attributes = shape_attributes(depth, block, bits, accuracy, columns)
        inputs = operands(attributes, (1, tokens), zeros=zeros, bias=tokens > 1)
        if accuracy:
            inputs[0][0, 0, :block] = 0.0  # a block without a largest value
        check(attributes, inputs, target=target)

    @pytest.mark.parametrize("accuracy", [0, 4])
    @pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
    def test_16_bits(self, dtype: Any, accuracy: int):
        attributes = shape_attributes(192, 32, 4, accuracy, 40)
        zeros = "packed" if accuracy else "float"
        check(attributes, operands(attributes, (2, 1), zeros=zeros, bias=True, dtype=dtype), target="lavapipe")


class TestTiles:
    pytestmark = vulkan

    # Tiles of 64 x 128, 64 x 64, 32 x 64 and 16 x 64, whatever would be chosen.
    @pytest.mark.parametrize(
        ("plan", "target", "bits", "block", "zeros", "depth", "columns", "tokens", "accuracy"),
        [
            (0, "vulkan", 4, 32, "", 128, 132, 70, 0),
            (1, "lavapipe", 4, 16, "float", 88, 40, 20, 4),
            (2, "vulkan", 2, 16, "packed", 88, 44, 12, 0),  # fewer words of a tile than threads
            (3, "lavapipe", 8, 256, "packed", 400, 68, 40, 4),
        ],
    )
    def test_f32(
        self, plan: int, target: str, bits: int, block: int, zeros: str, depth: int, columns: int, tokens: int,
        accuracy: int, monkeypatch: pytest.MonkeyPatch,
    ):  # fmt: skip
        monkeypatch.setattr(tiled_product, "_PLANS", (tiled_product._PLANS[plan],))
        attributes = shape_attributes(depth, block, bits, accuracy, columns)
        check(attributes, operands(attributes, (1, tokens), zeros=zeros, bias=tokens < 40), target=target)

    @pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
    def test_16_bits_with_open_rows(self, dtype: Any):
        attributes = shape_attributes(96, 32, 4, 4, 20)
        inputs = operands(attributes, (1, 65), zeros="packed", bias=True, dtype=dtype)
        check(attributes, inputs, target="lavapipe", open_axes={0: (0, 1)})


class TestMatrixUnits:
    """K is a multiple of 32 and not of 64: less code."""

    pytestmark = vulkan

    @pytest.fixture(autouse=True)
    def _emulate(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(TARGETS, "lavapipe", matrices.TARGET)
        matrices.emulate(monkeypatch, plain_mma)
        matrices.emulate(monkeypatch, fused_mma)

    # Two tiles each way of 64 x 64 and of 64 x 32, the last ones not full; then of 32 x 32.
    @pytest.mark.parametrize(
        ("enough", "bits", "block", "zeros", "depth", "columns", "tokens", "accuracy"),
        [
            (4, 4, 32, "packed", 320, 72, 70, 4),
            (5, 4, 32, "", 96, 72, 70, 4),
            (100, 4, 16, "float", 90, 44, 20, 0),
            (100, 2, 32, "", 96, 40, 12, 0),  # fewer words of a tile than threads
            (100, 8, 32, "packed", 90, 36, 24, 0),
        ],
    )
    def test_packed_weights(
        self, enough: int, bits: int, block: int, zeros: str, depth: int, columns: int, tokens: int, accuracy: int,
        monkeypatch: pytest.MonkeyPatch,
    ):  # fmt: skip
        monkeypatch.setattr(mma_plan, "_ENOUGH_TILES", enough)
        attributes = shape_attributes(depth, block, bits, accuracy, columns)
        inputs = operands(attributes, (1, tokens), zeros=zeros, bias=tokens != 70, dtype=np.float16)
        check(attributes, inputs, target="lavapipe")

    @pytest.mark.parametrize(
        ("enough", "bits", "block", "zeros", "depth", "columns", "tokens", "accuracy"),
        [
            (4, 4, 32, "packed", 96, 72, 70, 0),
            (100, 4, 16, "float", 90, 44, 20, 4),
            (100, 8, 32, "packed", 96, 40, 12, 0),
        ],
    )
    def test_f32_as_two_terms(
        self, enough: int, bits: int, block: int, zeros: str, depth: int, columns: int, tokens: int, accuracy: int,
        monkeypatch: pytest.MonkeyPatch,
    ):  # fmt: skip
        """As exact as f32, each row for itself: large, tiny, with an outlier, of zeros; a NaN stays in its own."""
        monkeypatch.setitem(TARGETS, "lavapipe", replace(matrices.TARGET, fast_math=True))
        monkeypatch.setattr(mma_plan, "_ENOUGH_TILES", enough)
        attributes = shape_attributes(depth, block, bits, accuracy, columns)
        inputs = operands(attributes, (1, tokens), zeros=zeros, bias=tokens == 20)
        if accuracy:  # whose rounding depends on a block's largest value
            check(attributes, inputs, target="lavapipe")
            return
        a = inputs[0]
        a[0, 1] *= 1e30
        a[0, 2] *= 1e-20
        a[0, 3, 5] *= 1e5
        a[0, 4] = 0
        a[0, 5, 7] = np.nan
        common = {"domain": MICROSOFT, "version": 1}
        constants = [i for i in range(1, len(inputs)) if inputs[i] is not None]
        (got,) = run_op(OP, inputs, attributes, target="lavapipe", **common)
        (want,) = run_onnx_runtime(OP, inputs, attributes, constants=constants, num_outputs=1, used=None, **common)
        assert np.isnan(got[0, 5]).all()
        for row in (row for row in range(tokens) if row != 5):
            assert error(got[0, row], want[0, row]) <= BENIGN["float32"], row

    @pytest.mark.parametrize(
        ("dtype", "bits", "block", "zeros", "depth", "columns", "tokens", "cut"),
        [
            (np.float32, 4, 32, "", 96, 72, 70, {}),
            (np.float32, 4, 128, "packed", 200, 40, 20, {}),  # a block of several steps, the last one not full
            (np.float32, 8, 32, "packed", 96, 36, 12, {}),
            (np.float32, 2, 64, "packed", 128, 40, 9, {}),
            (ml_dtypes.bfloat16, 4, 64, "packed", 128, 44, 33, {}),
            # Two steps of scales in a tile, one to each of two subgroups along K; both by one subgroup.
            (np.float32, 4, 32, "packed", 128, 40, 41, {"rows": 64, "columns": 32, "depth": 64, "along": 2}),
            (np.float32, 4, 32, "", 64, 72, 34, {"rows": 32, "columns": 64, "depth": 64}),
        ],
    )
    def test_whole_numbers(
        self, dtype: Any, bits: int, block: int, zeros: str, depth: int, columns: int, tokens: int, cut: dict[str, int],
        monkeypatch: pytest.MonkeyPatch,
    ):  # fmt: skip
        """A rounded to int8 by the packed weights, exact in f16; scales of rows and columns after each step."""
        attributes = shape_attributes(depth, block, bits, 4, columns)
        inputs = operands(attributes, (1, tokens), zeros=zeros, bias=tokens == 20, dtype=dtype)
        inputs[0][0, 0, :block] = 0.0  # a block without a largest value
        case = contract(tokens, depth, columns, dtype, block, 4, zeros)
        assert (
            fused_mma.describe(replace(case, bits=bits), matrices.TARGET).partition(", ")[0].endswith("whole numbers")
        )
        plan = mma_plan.plan_for
        monkeypatch.setattr(fused_mma, "plan_for", lambda *size, **given: replace(plan(*size, **given), **cut))
        check(attributes, inputs, target="lavapipe")

    @pytest.mark.parametrize(
        ("copies", "depth", "tokens", "columns", "along"),
        [
            (False, 96, 40, 72, 1),
            (False, 32, 40, 40, 2),  # one step: what comes after it is read again
            (False, 64, 130, 136, 1),  # the largest tiles, whose sums go out in parts
            (True, 32, 40, 72, 1),  # fewer steps than stages
            (True, 192, 40, 40, 2),
        ],
    )
    def test_f16_weights(
        self, copies: bool, depth: int, tokens: int, columns: int, along: int, monkeypatch: pytest.MonkeyPatch
    ):
        """Tiles through registers, and past them; rows and columns that do not fill the last tile; K cut in parts."""
        target = replace(matrices.TARGET, copy_memory=32_768 if copies else 0)
        monkeypatch.setitem(TARGETS, "lavapipe", target)
        monkeypatch.setattr(mma_plan, "_ENOUGH_TILES", 1)
        rng = np.random.default_rng(depth)
        a, b = (rng.standard_normal(size).astype(np.float16) for size in ((1, tokens, depth), (depth, columns)))
        plan = plain_mma.plan_for(mma_plan.Size(tokens, depth, columns), target, transposed=False)
        assert plan.copies == copies
        monkeypatch.setattr(plain_mma, "plan_for", lambda *size, **given: replace(plan, along=along))
        (got,) = run_op("MatMul", [a, b], version=13, target="lavapipe")
        assert error(got, a.astype(np.float64) @ b.astype(np.float64)) <= BENIGN["float16"]

    def test_few_deep_tiles_are_shared(self) -> None:
        """As was measured; neither packed weights nor as many tiles as there are multiprocessors."""
        target = replace(matrices.TARGET, workgroup_memory=49_152)
        sizes = {2: (64, 3584, 7168), 1: (512, 1024, 4096)}
        for along, size in sizes.items():
            assert mma_plan.plan_for(mma_plan.Size(*size), target, transposed=False).along == along
            assert mma_plan.plan_for(mma_plan.Size(*size), target, transposed=True).along == 1

    @pytest.mark.parametrize(
        ("copies", "cut"), [(0, {}), (32_768, {"rows": 32, "columns": 64, "depth": 64, "along": 2, "stages": 2})]
    )
    @pytest.mark.parametrize("gated", [False, True])
    def test_products_of_one_value(
        self, gated: bool, copies: int, cut: dict[str, int], monkeypatch: pytest.MonkeyPatch
    ):
        """Joined, each of columns that do not fill its last tile; and silu(gate) * up, whose gates go far out."""
        target = replace(matrices.TARGET, copy_memory=copies)
        monkeypatch.setitem(TARGETS, "lavapipe", target)
        plan = mma_plan.plan_for
        monkeypatch.setattr(plain_mma, "plan_for", lambda *size, **given: replace(plan(*size, **given), **cut))
        rng = np.random.default_rng(copies)
        columns = (72, 72) if gated else (40, 136, 72)
        a = (rng.standard_normal((1, 70, 64)) * 0.3).astype(np.float16)
        b = [(rng.standard_normal((64, count)) * 0.3).astype(np.float16) for count in columns]
        b[0][:, 0] = -300 * np.sign(a[0, 0])
        common: dict[str, Any] = {"domain": "linattn", "version": 1, "target": "lavapipe"}
        want = [a.astype(np.float64) @ weight.astype(np.float64) for weight in b]
        if gated:
            got = run_op("GatedMatMul", [a, *b], num_outputs=1, **common)
            want = [want[0] * (1 + np.tanh(want[0] / 2)) / 2 * want[1]]
        else:
            got = run_op("JoinedMatMul", [a, *b], num_outputs=len(b), **common)
        for one, other in zip(got, want, strict=True):
            assert error(one, other) <= BENIGN["float16"]


@pytest.mark.parametrize(
    ("case", "target", "strategy"),
    [
        (contract(1), CUDA, "fused_simt"),
        (contract(8, dtype=np.float16), CUDA, "fused_simt"),
        (contract(9, dtype=np.float16), CUDA, "fused_mma"),
        (contract(9), CUDA, "fused_tiled"),
        (contract(9, accuracy=4), CUDA, "fused_mma"),
        (contract(9, accuracy=4, block=16), CUDA, "fused_tiled"),
        (contract(9, accuracy=4, dtype=ml_dtypes.bfloat16), CUDA, "fused_mma"),
        (contract(9), replace(CUDA, fast_math=True), "fused_mma"),
        (contract(9, dtype=ml_dtypes.bfloat16), replace(CUDA, fast_math=True), "fused_tiled"),
        (contract(None, dtype=np.float16), CUDA, "fused_tiled"),
        (contract(64, dtype=np.float16), TARGETS["vulkan"], "fused_tiled"),
        (contract(64, depth=80, block=16, dtype=np.float16), CUDA, "fused_tiled"),
        (contract(64, columns=41), CUDA, "dequantised"),
        (contract(1, depth=96, columns=41, zeros="packed"), CUDA, "dequantised"),
    ],
)
def test_selection(case: MatMulNBits, target: Target, strategy: str) -> None:
    chosen = choose(case, target, OPTIONS)
    assert chosen.strategy == strategy
    assert all(chosen.rejected.values())


def test_reasons() -> None:
    open_rows = choose(contract(None, columns=42, dtype=np.float16), CUDA, OPTIONS)
    assert open_rows.rejected == {
        "fused_mma": "? rows, less than 9",
        "fused_simt": "? rows, not 1 to 8",
        "fused_tiled": "N=42 is not a multiple of 4",
    }
    bytes_left = choose(contract(1, depth=96, columns=41, zeros="packed"), CUDA, OPTIONS)
    assert bytes_left.rejected["fused_simt"] == "the zero points, 41 x 2 bytes, are not whole words"
    assert choose(contract(1, accuracy=4), CUDA, OPTIONS).reason.endswith("A rounded on the way")
    assert choose(contract(1), CUDA, LoweringOptions("dequantised")).strategy == "dequantised"


@pytest.mark.parametrize("target", [CUDA, TARGETS["vulkan"], TARGETS["lavapipe"]], ids=["cuda", "vulkan", "lavapipe"])
@pytest.mark.parametrize(("depth", "columns"), [(16, 4), (1024, 1000), (3584, 1024), (1024, 151_936)])
def test_plans_fit(target: Target, depth: int, columns: int) -> None:
    for rows in (1, 8):
        for bits in (2, 4, 8):
            case = MatMulNBits(
                "test", TensorSpec((rows, depth), "f32"), columns, depth, bits, 16, "default",
                with_bias=False, rounds_a=True,
            )  # fmt: skip
            plan = fused_simt.plan_for(case, target)
            assert plan.memory(rows) <= target.workgroup_memory
            assert plan.threads <= target.max_threads
            assert not plan.subgroup or plan.threads % plan.subgroup == 0
            assert isinstance(fused_tiled.is_legal(case, target), Yes)
            assert isinstance(fused_mma.is_legal(case, target), No)


@pytest.mark.parametrize(
    ("rows", "dtype", "fast", "dispatches"),
    [
        (1, np.float32, False, 1),
        (2, np.float16, False, 1),
        (40, np.float32, False, 2),
        (40, np.float16, False, 2),
        (40, np.float32, True, 2),  # in terms of f16, which are one of its own too
    ],
)
def test_compiles_for_cuda(rows: int, dtype: Any, fast: bool, dispatches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One dispatch where A is not rounded in one of its own; nothing is run."""
    monkeypatch.setitem(TARGETS, "cuda", replace(CUDA, fast_math=fast))
    attributes = shape_attributes(128, 32, 4, 0 if fast else 4, 96)
    specs = [spec(a) for a in operands(attributes, (1, rows), zeros="packed", bias=True, dtype=dtype)]
    session = Session()
    session.set_flags("--iree-hal-target-device=cuda", "--iree-cuda-target=sm_89", "--iree-input-type=none")
    module = lowered(MICROSOFT, OP, 1, specs, attributes, 1, "cuda", OPTIONS, session.context)
    found: list[str] = []
    for op in module.body.operations:
        if op.operation.name == "func.func":
            op.operation.walk(lambda inner: (found.append(inner.name), ir.WalkResult.ADVANCE)[1])
    assert found.count("flow.dispatch") == dispatches
    assert "linalg.generic" not in found
    assert len(compile_module(module, session, "cuda")) > 0


@pytest.mark.parametrize("memory", [0, 49_152])
def test_whole_numbers_in_the_registers_of_warps(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From sm_80 on by instructions of their own, so that a scale is one multiply-add; nothing is run."""
    monkeypatch.setitem(TARGETS, "cuda", replace(CUDA, copy_memory=memory))
    found: list[set[str]] = []
    for bits in (4, 8):
        attributes = shape_attributes(128, 32, bits, 4, 96)
        specs = [spec(a) for a in operands(attributes, (1, 40), zeros="packed")]
        session = Session()
        session.set_flags("--iree-hal-target-device=cuda", "--iree-cuda-target=sm_89", "--iree-input-type=none")
        module = lowered(MICROSOFT, OP, 1, specs, attributes, 1, "cuda", OPTIONS, session.context)
        text = str(module)
        assert ("mma.sync" in text) == (memory > 0) == ("gpu.subgroup_mma" not in text)
        assert "math.fma" in text or not memory
        found.append({line.split("@")[1].split(" ")[0] for line in text.splitlines() if "executable.source" in line})
        assert len(compile_module(module, session, "cuda")) > 0
    assert not found[0] & found[1], "the rounding of A is in another order for other bits, and needs a name of its own"
