"""Tables that a model looks tokens up in and multiplies with too: stored once, and ONNX Runtime's logits."""

from __future__ import annotations

import functools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from linattn.frontend import CompileOptions, compile_model
from linattn.frontend.compile import CompiledModel
from linattn.runtime import Program
from linattn.runtime.errors import InputError
from onnx import TensorProto, helper, numpy_helper

from tests.families.compare import LENGTHS, Family, compare
from tests.tolerances import BENIGN, INT4_OWN_NOISE, error


def stored_keys(dump: Path) -> list[str]:
    """What the module's globals hold, by content."""
    text = next(dump.glob("*lower-operators*")).read_text()
    return re.findall(r'util\.global .*#flow\.parameter\.named<"model"::"([0-9a-f]{64})">', text)


@pytest.mark.usefixtures("shared_models")
def test_int4_table_that_is_the_head_too(tmp_path: Path) -> None:
    """GatherBlockQuantized reads the initializer of MatMulNBits through a Reshape."""
    family, params = Family("lfm2--genai-cpu-int4"), tmp_path / "model.irpa"
    options = CompileOptions(prefill_blocks=(8,), parameters=params, dump_ir=tmp_path / "ir")
    compiled = compile_model(family.model, options, output=tmp_path / "model.vmfb")
    assert params.stat().st_size < 1.02 * compiled.report.weight_bytes
    keys = stored_keys(tmp_path / "ir")
    assert keys
    assert max(Counter(keys).values()) == 1
    program = Program.load(tmp_path / "model.vmfb", parameters=params)
    for length in LENGTHS:
        assert (found := compare(program, family, length)).is_right(family, INT4_OWN_NOISE), found


def test_the_smallest_model_with_an_int4_table(shared_models: Path) -> None:
    path = shared_models.parent / "cases" / "gbq_min.onnx"
    program, want = Program.load(compile_model(path).module), np.load(path.with_suffix(".npz"))
    got = program.session().run({"input_ids": want["input_ids"]})
    assert error(got["y"], want["y"]) < BENIGN["float32"]


def int4_head(rows: int, depth: int, block: int = 32) -> onnx.ModelProto:
    """One token looked up in a table and multiplied with it."""
    random, value = np.random.default_rng(0), helper.make_tensor_value_info
    common = {"domain": "com.microsoft", "bits": 4, "block_size": block}
    table = random.integers(0, 256, (rows, depth // block, block // 2)).astype(np.uint8)
    graph = helper.make_graph(
        [
            helper.make_node("Reshape", ["w", "shape"], ["table"]),
            helper.make_node("GatherBlockQuantized", ["table", "ids", "s"], ["x"], quantize_axis=1, **common),
            helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], K=depth, N=rows, **common),
        ],
        "head",
        [value("ids", TensorProto.INT64, [1, 1])],
        [value("y", TensorProto.FLOAT, [1, 1, rows])],
        [
            numpy_helper.from_array(table, "w"),
            numpy_helper.from_array(random.random((rows, depth // block), np.float32), "s"),
            numpy_helper.from_array(np.array([rows, depth // 2], np.int64), "shape"),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize("target", ["cpu", "vulkan"])
def test_int4_table_in_the_module(target: str) -> None:
    """IREE makes a second constant of a constant that is seen in another shape."""
    compiled = compile_model(int4_head(4000, 256), CompileOptions(target=target))
    assert compiled.report.weight_bytes < len(compiled.module) < 1.1 * compiled.report.weight_bytes


ROWS, DEPTH = 600, 64


def tied(form: str, dtype: Any, tokens: int | None = 3) -> onnx.ModelProto:
    """Tokens looked up in a table and multiplied with it, as mobius ("head") and genai ("table") transpose it."""
    value, kind = helper.make_tensor_value_info, helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    table = (np.random.default_rng(0).standard_normal((ROWS, DEPTH)) / 8).astype(dtype)
    look_up, product = ("w", "t") if form == "head" else ("t", "w")
    graph = helper.make_graph(
        [
            helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
            helper.make_node("Gather", [look_up, "ids"], ["x"]),
            helper.make_node("MatMul", ["x", product], ["y"]),
        ],
        "tied",
        [value("ids", TensorProto.INT64, [1, tokens])],
        [value("y", kind, [1, tokens, ROWS])],
        [numpy_helper.from_array(table if form == "head" else np.ascontiguousarray(table.T), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


IDS = np.array([[0, 599, -2]])


@functools.cache
def tied_logits() -> np.ndarray:
    """ONNX Runtime's, in float32."""
    session = onnxruntime.InferenceSession(tied("head", np.float32).SerializeToString())
    return session.run(None, {"ids": IDS})[0]


def check_tied(compiled: CompiledModel, dtype: Any, device: str | None = None) -> None:
    size = ROWS * DEPTH * np.dtype(dtype).itemsize
    assert len(compiled.module) < 1.9 * size + 30_000 * (device is not None)  # with the code, and not two copies
    got = Program.load(compiled.module, device).run({"ids": IDS})["y"]
    assert error(got.astype(np.float32), tied_logits()) < BENIGN[np.dtype(dtype).name]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("form", ["head", "table"])
def test_float_table_that_is_the_head_too(form: str, dtype: Any) -> None:
    compiled = compile_model(tied(form, dtype))
    assert any(line.startswith("1 x GatherColumns: packed") for line in compiled.report.others)
    assert any(line.startswith("1 x MatMul: fused_simd") for line in compiled.report.others)
    check_tied(compiled, dtype)


def test_no_index_beyond_the_table() -> None:
    program = Program.load(compile_model(tied("head", np.float32)).module)
    for index in (ROWS, -ROWS - 1):
        with pytest.raises(InputError, match=r"ids\[0, 2\]: index out of range, .* expected -600 to 599"):
            program.run({"ids": np.array([[0, 1, index]])})


def test_float_table_of_a_portable_module() -> None:
    """Its weights lie in another order, the same for all of its machines."""
    check_tied(compile_model(tied("head", np.float32), CompileOptions(cpu_features="portable")), np.float32)


@pytest.mark.vulkan
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("form", ["head", "table"])
def test_float_table_on_vulkan(form: str, dtype: Any) -> None:
    check_tied(compile_model(tied(form, dtype), CompileOptions(target="vulkan")), dtype, "vulkan")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_float_table_compiles_for_cuda(dtype: Any) -> None:
    compiled = compile_model(tied("head", dtype), CompileOptions(target="cuda"))
    assert any(line.startswith("1 x GatherColumns: direct") for line in compiled.report.others)
