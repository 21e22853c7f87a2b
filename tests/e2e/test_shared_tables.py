"""Tables that a model looks tokens up in and multiplies with too: stored once, and ONNX Runtime's logits."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from linattn.frontend import CompileOptions, compile_model
from linattn.runtime import Program
from onnx import TensorProto, helper, numpy_helper

from tests.families.compare import LENGTHS, Family, compare
from tests.families.noise import INT4_FACTOR, own_noise
from tests.tolerances import BENIGN, error


def stored_keys(dump: Path) -> list[str]:
    """What the module's globals hold, by content."""
    text = next(dump.glob("*lower-operators*")).read_text()
    return re.findall(r'util\.global .*#flow\.parameter\.named<"model"::"([0-9a-f]{64})">', text)


@pytest.mark.usefixtures("shared_models")
def test_int4_table_that_is_the_head_too(tmp_path: Path) -> None:
    """GatherBlockQuantized reads the initializer of MatMulNBits through a Reshape."""
    family, params = Family("lfm2--genai-cpu-int4"), tmp_path / "model.irpa"
    options = CompileOptions(prefill_blocks=(8,), params=params, dump_ir=tmp_path / "ir")
    compiled = compile_model(family.model, options, output=tmp_path / "model.vmfb")
    assert params.stat().st_size < 1.02 * compiled.report.weight_bytes
    keys = stored_keys(tmp_path / "ir")
    assert keys
    assert max(Counter(keys).values()) == 1
    program = Program.load(tmp_path / "model.vmfb", parameters=params)
    limit = INT4_FACTOR * own_noise(family, program)
    for length in LENGTHS:
        assert (found := compare(program, family, length)).is_right(family, limit), found


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
