"""MatMul with weights, strategy fused_simd: against float64, at the edges of tiles, blocks and panels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from linattn.dialect_patterns.mat_mul.contract import MatMul
from linattn.dialect_patterns.mat_mul.op import choose
from linattn.dialect_patterns.mat_mul.simd_layout import SHARED, Layout
from linattn.dialect_patterns.node import TensorSpec
from linattn.dialect_patterns.op import LoweringOptions
from linattn.dialect_patterns.target import Target
from linattn.frontend import CompileOptions, compile_model
from linattn.runtime import Program
from onnx import TensorProto, helper, numpy_helper

from tests.harness import CPUS, WIDTHS, skip_unless_it_runs
from tests.tolerances import BENIGN, error

# Rows around tiles of 6 and chunks of 32 tiles; K around blocks of 256 and unrolling by 4; N around panels of 16 and 8.
SHAPES = [
    *((rows, 256, 48) for rows in (1, 2, 3, 5, 6, 7, 12, 13, 64)),
    *((rows, 260, 24) for rows in (191, 193, 200, 385)),
    *((7, depth, 96) for depth in (64, 255, 257, 258, 300, 512, 1030)),
    *((1, depth, 96) for depth in (255, 258, 1030)),
    *((7, 300, columns) for columns in (16, 17, 31, 33, 72, 100)),
    *((1, 300, columns) for columns in (4, 9, 17, 24, 100)),
]
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def build(shapes: list[tuple[int, int, int]], dtype: type, rows: str | None = None) -> onnx.ModelProto:
    """A model of products, each with an input and an output of its own."""
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes, inputs, outputs, weights = [], [], [], []
    for i, (count, depth, columns) in enumerate(shapes):
        lead = [rows] if rows else [count]
        values = np.random.default_rng(i).standard_normal((depth, columns)).astype(dtype)
        weights.append(numpy_helper.from_array(values, f"w{i}"))
        inputs.append(helper.make_tensor_value_info(f"a{i}", element, [*lead, depth]))
        outputs.append(helper.make_tensor_value_info(f"y{i}", element, [*lead, columns]))
        nodes.append(helper.make_node("MatMul", [f"a{i}", f"w{i}"], [f"y{i}"], f"product{i}"))
    graph = helper.make_graph(nodes, "products", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def inputs_of(shapes: list[tuple[int, int, int]], dtype: type) -> dict[str, np.ndarray]:
    random = np.random.default_rng(99)
    return {f"a{i}": random.standard_normal(shape[:2]).astype(dtype) for i, shape in enumerate(shapes)}


def weight(model: onnx.ModelProto, i: int) -> np.ndarray:
    return numpy_helper.to_array(model.graph.initializer[i]).astype(np.float64)


def check(
    program: Program,
    model: onnx.ModelProto,
    shapes: list[tuple[int, int, int]],
    dtype: type,
    rounded_to: type | None = None,
) -> None:
    """Each product against float64, as near as what is computed with (by default of the operands' type) allows."""
    feeds = inputs_of(shapes, dtype)
    results = program.run(feeds)
    for i, shape in enumerate(shapes):
        found = error(results[f"y{i}"], feeds[f"a{i}"].astype(np.float64) @ weight(model, i))
        assert found <= BENIGN[np.dtype(rounded_to or dtype).name], f"{shape}: {found:.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "f16", "bf16"])
def test_products(dtype: type) -> None:
    model = build(SHAPES, dtype)
    compiled = compile_model(model, CompileOptions())
    check(Program.load(compiled.module), model, SHAPES, dtype)
    assert compiled.module.count(b"mat_mul_fused_simd") > 0


@pytest.mark.parametrize("target", WIDTHS)
def test_widths(target: str) -> None:
    """All widths of vectors, one tile of rows and several, columns and depths that no vector divides."""
    shapes = [(2, 258, 33), (6, 130, 9), (12, 67, 100), (13, 67, 41), (64, 301, 72), (1, 1030, 4)]
    model = build(shapes, np.float32)
    compiled = compile_model(model, CompileOptions(cpu_features=CPUS[target]))
    skip_unless_it_runs(target)
    check(Program.load(compiled.module), model, shapes, np.float32)


JOINED = [(1, 258, (33, 4, 100)), (2, 64, (16, 17)), (6, 131, (9, 40, 8, 8))]
GATED = [(1, 258, 72), (3, 65, 33)]


def build_joined(
    dtype: type, depths: int | None = None
) -> tuple[onnx.ModelProto, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Products that share what they multiply, and gated pairs, as a graph has them; its inputs and outputs.

    Args:
        dtype: Of everything.
        depths: K of all, None: several.
    """
    element, random = helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), np.random.default_rng(5)
    nodes, weights = list[onnx.NodeProto](), list[onnx.TensorProto]()
    feeds, expected = dict[str, np.ndarray](), dict[str, np.ndarray]()

    def product(x: str, depth: int, columns: int, y: str) -> np.ndarray:
        values = (random.standard_normal((depth, columns)) * 0.3).astype(dtype)
        if y.startswith("gate"):
            values[:, 0] = -300 * np.sign(feeds[x][0, 0])  # far out, where the exponential overflows
        weights.append(numpy_helper.from_array(values, f"{y}.weight"))
        nodes.append(helper.make_node("MatMul", [x, f"{y}.weight"], [y], y))
        return feeds[x][0].astype(np.float64) @ values.astype(np.float64)

    for i, (rows, own, some) in enumerate(JOINED):
        depth = depths or own
        feeds[f"x{i}"] = random.standard_normal((1, rows, depth)).astype(dtype)
        expected |= {f"y{i}.{n}": product(f"x{i}", depth, count, f"y{i}.{n}")[None] for n, count in enumerate(some)}
    for i, (rows, own, columns) in enumerate(GATED):
        depth = depths or own
        feeds[f"z{i}"] = (random.standard_normal((1, rows, depth)) * 0.3).astype(dtype)
        up, gate = product(f"z{i}", depth, columns, f"up{i}"), product(f"z{i}", depth, columns, f"gate{i}")
        nodes.append(helper.make_node("Sigmoid", [f"gate{i}"], [f"sigmoid{i}"], f"sigmoid{i}"))
        nodes.append(helper.make_node("Mul", [f"gate{i}", f"sigmoid{i}"], [f"silu{i}"], f"silu{i}"))
        nodes.append(helper.make_node("Mul", [f"silu{i}", f"up{i}"], [f"g{i}"], f"last{i}"))
        expected[f"g{i}"] = (gate * (1 + np.tanh(gate / 2)) / 2 * up)[None]
    inputs = [helper.make_tensor_value_info(name, element, array.shape) for name, array in feeds.items()]
    outputs = [helper.make_tensor_value_info(name, element, array.shape) for name, array in expected.items()]
    graph = helper.make_graph(nodes, "joined", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), feeds, expected


@pytest.mark.parametrize(
    ("target", "dtype"), [*((target, np.float32) for target in WIDTHS), *(("portable", dtype) for dtype in DTYPES)]
)
def test_products_of_one_value_are_one_kernel(target: str, dtype: type) -> None:
    """All widths of vectors, several machines in one module; columns that no panel divides, an odd depth."""
    model, feeds, expected = build_joined(dtype)
    compiled = compile_model(model, CompileOptions(cpu_features=CPUS.get(target, target)))
    kinds = Counter(line.split()[2].rstrip(":") for line in compiled.report.others)
    assert kinds == {"JoinedMatMul": 3, "GatedMatMul": 2}  # of different rows each
    if target in CPUS:
        skip_unless_it_runs(target)
    found = Program.load(compiled.module).run(feeds)
    for name, right in expected.items():
        assert error(found[name], right) <= BENIGN[np.dtype(dtype).name], name


@pytest.mark.parametrize(("features", "bits"), [("znver4", 512), ("x86-64-v3", 256), ("generic", 128)])
def test_fits_on_the_stack(features: str, bits: int) -> None:
    """The largest chunks and blocks of each width of vectors compile: IREE refuses more than 32 KiB."""
    compiled = compile_model(build([(500, 1100, 300)], np.float16), CompileOptions(cpu_features=features))
    assert f"mat_mul_fused_simd_f16_500x300x1100_v{bits}".encode() in compiled.module


@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["f32", "f16"])
def test_open_rows(dtype: type) -> None:
    """The number of rows is known at run time only."""
    kinds = [(0, 300, 33), (0, 520, 64)]
    model = build(kinds, dtype, "rows")
    program = Program.load(compile_model(model, CompileOptions()).module)
    for rows in (1, 5, 6, 13, 200):
        check(program, model, [(rows, *kind[1:]) for kind in kinds], dtype)


def test_weights_are_stored_once(tmp_path: Path) -> None:
    """Packed and nothing else, in the module or in the parameter file; two nodes share theirs."""
    model = build([(2, 512, 512)], np.float32)
    model.graph.node.append(helper.make_node("MatMul", ["a0", "w0"], ["again"], "again"))
    model.graph.output.append(helper.make_tensor_value_info("again", TensorProto.FLOAT, [2, 512]))
    inside = compile_model(model, CompileOptions())
    assert (1 << 20) < len(inside.module) < (1 << 20) + 100_000
    file = tmp_path / "w.irpa"
    outside = compile_model(model, CompileOptions(parameters=file), output=tmp_path / "m.vmfb")
    assert (1 << 20) < file.stat().st_size < (1 << 20) + 10_000
    assert outside.report.output_bytes < 100_000
    feeds = inputs_of([(2, 512, 512)], np.float32)
    for program in (Program.load(inside.module), Program.load(tmp_path / "m.vmfb")):
        results = program.run(feeds)
        assert error(results["y0"], feeds["a0"].astype(np.float64) @ weight(model, 0)) <= BENIGN["float32"]
        np.testing.assert_array_equal(results["y0"], results["again"])


@pytest.mark.parametrize("layout", [Layout(16, 16), SHARED], ids=["own", "shared"])
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 40])
def test_pack(columns: int, layout: Layout) -> None:
    weights = np.arange(3 * columns, dtype=np.float32).reshape(3, columns)
    packed = layout.pack(weights)
    assert packed.shape == (-(-columns // layout.multiple) * layout.multiple // 16, 3, 16)
    assert not packed.transpose(1, 0, 2).reshape(3, -1)[:, columns:].any()
    np.testing.assert_array_equal(packed.transpose(1, 0, 2).reshape(3, -1)[:, :columns], weights)


@pytest.mark.parametrize(
    ("contract", "reason"),
    [
        (MatMul("m", TensorSpec((2, 8), "f32"), TensorSpec((8, 8), "f32"), False), "not a weight"),
        (MatMul("m", TensorSpec((2, 8), "f32"), TensorSpec((2, 8, 8), "f32"), True), "one matrix"),
        (MatMul("m", TensorSpec((0, 8), "f32"), TensorSpec((8, 8), "f32"), True), "zero"),
        (MatMul("m", TensorSpec((2, 8), "i32"), TensorSpec((8, 8), "i32"), True), "one matrix"),
    ],
)
def test_what_others_do(contract: MatMul, reason: str) -> None:
    choice = choose(contract, Target("cpu", vector_bits=256), LoweringOptions(strategy="chunked"))
    assert choice.strategy == "imported"
    assert reason in choice.rejected["fused_simd"]
