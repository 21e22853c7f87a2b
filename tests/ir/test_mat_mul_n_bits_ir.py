"""What strategy fused_simd of MatMulNBits emits, when it is chosen, and that it compiles for CPUs that are not here."""

from __future__ import annotations

import pytest
from harness import TARGETS, compile_module, lowered, module_text, node_for
from iree.compiler import ir
from iree.compiler.api import Session
from linattn.dialect_patterns.emit.builder import Builder
from linattn.dialect_patterns.mat_mul_n_bits.contract import MatMulNBits, output_types
from linattn.dialect_patterns.mat_mul_n_bits.op import choose, parse
from linattn.dialect_patterns.mat_mul_n_bits.simd_plan import plan
from linattn.dialect_patterns.node import TensorSpec
from linattn.dialect_patterns.op import MICROSOFT, LoweringContext, LoweringOptions
from linattn.dialect_patterns.rewrite import lower_operators
from linattn.dialect_patterns.target import Target
from linattn.frontend.targets import TargetOptions, resolve_target

OP = "MatMulNBits"
AVX2 = Target("cpu", vector_bits=256, features=frozenset({"avx2"}))
X86, ARM = "x86_64-linux-gnu", "aarch64-linux-gnu"


def attributes(columns: int = 96, accuracy: int = 4, depth: int = 128) -> dict[str, int]:
    return {"K": depth, "N": columns, "bits": 4, "block_size": 32, "accuracy_level": accuracy}


def specs(rows: int | None, columns: int = 96, depth: int = 128) -> list[TensorSpec]:
    blocks = depth // 32
    return [
        TensorSpec((rows, depth), "f32"),
        TensorSpec((columns, blocks, 16), "i8"),
        TensorSpec((columns, blocks), "f32"),
    ]


def contract(rows: int | None, columns: int = 96, accuracy: int = 4, depth: int = 128) -> MatMulNBits:
    node = node_for(MICROSOFT, OP, 1, specs(rows, columns, depth), attributes(columns, accuracy, depth), 1)
    return parse(node)


def emit(rows: int | None, accuracy: int, context: ir.Context | None = None) -> ir.Module:
    return lowered(MICROSOFT, OP, 1, specs(rows), attributes(accuracy=accuracy), 1, "cpu", context=context)


@pytest.mark.parametrize(
    ("rows", "accuracy", "dispatches"), [(1, 0, 1), (1, 4, 1), (4, 4, 1), (5, 0, 1), (5, 4, 2), (None, 4, 2)]
)
def test_dispatches(rows: int | None, accuracy: int, dispatches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of A that are rounded for many are a dispatch of their own; nothing else touches memory."""
    monkeypatch.setitem(TARGETS, "cpu", AVX2)
    found: list[str] = []
    for op in emit(rows, accuracy).body.operations:
        if op.operation.name == "func.func":
            op.operation.walk(lambda inner: (found.append(inner.name), ir.WalkResult.ADVANCE)[1])
    assert found.count("flow.dispatch") == dispatches
    assert found.count("flow.tensor.bitcast") == 1
    assert not [name for name in found if name.startswith(("linalg.", "scf.", "tensor.insert", "tensor.extract"))]


def test_choice() -> None:
    chosen = choose(contract(1), AVX2, LoweringOptions())
    assert (chosen.strategy, chosen.rejected) == ("fused_simd", {})
    assert chosen.reason == "products of bytes by avx2 as weights are unpacked, 8 columns a tile"
    many = choose(contract(None, accuracy=0), AVX2, LoweringOptions("fused_simd"))
    assert many.reason == "products of f32 of 66 rows with unpacked tiles, 16 columns a tile"
    few = choose(contract(1, columns=3), AVX2, LoweringOptions())
    assert few.strategy == "dequantised"
    assert few.rejected == {"fused_simd": "N=3 is less than a vector of 8"}
    gpu = choose(contract(1), Target("gpu", is_gpu=True), LoweringOptions())
    assert "fused_simd" not in gpu.rejected  # which is for CPUs
    assert choose(contract(1), AVX2, LoweringOptions("dequantised")).strategy == "dequantised"


@pytest.mark.parametrize("columns", [1024, 3584, 6144, 32000])
def test_two_workers_end_together(columns: int) -> None:
    """IREE's workers take workgroups in eights, so that 24 of them leave one of two workers idle for a third."""
    found = plan(contract(1, columns), AVX2)
    assert not isinstance(found, str)
    workgroups = -(-columns // found.workgroup_columns)
    assert workgroups % 16 in (0, 15)


@pytest.mark.parametrize(
    ("features", "columns"), [("znver4", 8), ("sapphirerapids", 16), ("x86-64-v4", 16), ("x86-64-v3", 8)]
)
def test_few_rows_read_few_lines_at_once(features: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each column is a stream of its own; lines are asked for a few at a time, with products between."""
    target = resolve_target("cpu", TargetOptions(cpu_features=features, target_triple=X86)).capabilities
    monkeypatch.setitem(TARGETS, "cpu", target)
    for rows in (1, 4):
        found = plan(contract(rows), target)
        assert not isinstance(found, str)
        assert (found.tile, found.direct) == (columns, True)
    products = str(emit(1, 4)).partition("scf.for")[2]
    runs, run = [0], 0
    for line in products[products.index("call_intrinsic") :].splitlines():
        run = 0 if "call_intrinsic" in line else run + ("memref.prefetch" in line)
        runs.append(run)
    assert 1 < max(runs) <= 5


@pytest.mark.parametrize(
    ("features", "triple", "instruction"),
    [
        ("znver4", X86, "avx512vnni"),
        ("x86-64-v4", X86, "avx512bw"),
        ("alderlake", X86, "avxvnni"),
        ("generic", X86, ""),
        ("+dotprod", ARM, "dotprod"),
        ("apple-m4", ARM, "i8mm"),
        ("generic", ARM, ""),
    ],
)
def test_compiles_for(features: str, triple: str, instruction: str) -> None:
    """Few rows and many in one module."""
    target = resolve_target("cpu", TargetOptions(cpu_features=features, target_triple=triple))
    for rows in (1, 6):
        found = plan(contract(rows), target.capabilities)
        assert not isinstance(found, str)
        assert (instruction in found.instruction.features) if found.instruction else not instruction
    session = Session()
    session.set_flags(*target.flags, "--iree-input-type=none")
    session.context.load_all_available_dialects()
    with session.context, ir.Location.unknown():
        text = "\n".join(_function(rows) for rows in (1, 6))
        module = ir.Module.parse(text)
        assert lower_operators(module, LoweringContext(Builder(), target.capabilities)) == 2
    assert compile_module(module, session, "cpu")


def _function(rows: int) -> str:
    outputs = output_types(contract(rows))
    text = module_text(MICROSOFT, OP, 1, list(specs(rows)), list(outputs), attributes())
    return text.replace("@main", f"@rows_{rows}")
