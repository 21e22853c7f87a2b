"""What differs between layers or sizes by its numbers alone is one kernel: a driver compiles each that a module has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from linattn.frontend.compile import compile_model
from linattn.frontend.options import CompileOptions
from linattn.runtime import Program
from linattn.runtime.manifest import DISPATCHES_KEY
from linattn.runtime.module import Module
from onnx import helper, numpy_helper
from tolerances import BENIGN, error

from samples.benchmark_model import Shape, write


def layers(dtype: Any, size: int) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """exp(x * a + b) of two inputs, each with lists of its own, as the gates of two layers are."""
    generator = np.random.default_rng(7)
    lists = {name: generator.standard_normal(size).astype(dtype) for name in ("a0", "b0", "a1", "b1")}
    nodes, kind = [], helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    for i in "01":
        nodes.append(helper.make_node("Mul", [f"x{i}", f"a{i}"], [f"m{i}"]))
        nodes.append(helper.make_node("Add", [f"m{i}", f"b{i}"], [f"s{i}"]))
        nodes.append(helper.make_node("Exp", [f"s{i}"], [f"y{i}"]))
    inputs = [helper.make_tensor_value_info(f"x{i}", kind, [8, size]) for i in "01"]
    outputs = [helper.make_tensor_value_info(f"y{i}", kind, [8, size]) for i in "01"]
    weights = [numpy_helper.from_array(values, name) for name, values in lists.items()]
    graph = helper.make_graph(nodes, "layers", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), lists


def table(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The dispatches of each function."""
    module = Module(path)
    tables = [text for name in module.functions if (text := module.reflection(name).get(DISPATCHES_KEY))]
    found = json.loads(tables[0]).items()
    return {name: [kernel for row in rows for kernel in row.get("kernels", [row])] for name, rows in found}


@pytest.mark.parametrize(
    ("target", "dtype", "size"),
    [
        ("cpu", np.float32, 64),
        ("cpu", np.float16, 16),
        ("cpu", np.float32, 200),
        ("vulkan", np.float32, 16),
        ("cuda", np.float16, 16),
    ],
)
def test_layers_share_a_kernel(target: str, dtype: Any, size: int, tmp_path: Path) -> None:
    """Lists of up to 256 bytes too, which IREE would write into the kernel."""
    model, lists = layers(dtype, size)
    path = tmp_path / "model.vmfb"
    compile_model(model, CompileOptions(target=target), output=path)
    found = [row["key"] for rows in table(path).values() for row in rows]
    assert len(found) == 2
    assert len(set(found)) == 1
    if target == "cpu":
        x = np.random.default_rng(8).standard_normal((2, 8, size)).astype(dtype)
        outputs = Program.load(path).run({"x0": x[0], "x1": x[1]})
        for i in (0, 1):
            expected = np.exp(x[i].astype(np.float64) * lists[f"a{i}"] + lists[f"b{i}"])
            assert error(outputs[f"y{i}"], expected) <= BENIGN[np.dtype(dtype).name]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_what_writes_into_a_list_leaves_it_as_it_was(dtype: Any, tmp_path: Path) -> None:
    """The list is read from memory, and the next call reads it again."""
    values, kind = np.arange(32).reshape(8, 4).astype(dtype), helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    places, updates = np.array([[1], [3]], np.int64), np.ones((2, 4), dtype)
    graph = helper.make_graph(
        [helper.make_node("ScatterND", ["list", "places", "updates"], ["y"])],
        "scatter",
        [
            helper.make_tensor_value_info("places", onnx.TensorProto.INT64, [2, 1]),
            helper.make_tensor_value_info("updates", kind, [2, 4]),
        ],
        [helper.make_tensor_value_info("y", kind, [8, 4])],
        [helper.make_tensor("list", kind, [8, 4], values.tobytes(), raw=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path = tmp_path / "model.vmfb"
    compile_model(model, CompileOptions(target="cpu"), output=path)
    program = Program.load(path)
    for first in (0, 4, 2):
        y = program.run({"places": places + first, "updates": updates})["y"]
        want = values.copy()
        want[places[:, 0] + first] = updates
        np.testing.assert_array_equal(y, want)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The dispatches of a model of four layers, one of them of softmax attention."""
    folder = tmp_path_factory.mktemp("layers")
    write(Shape(dtype="fp16", hidden=256, heads=4, mlp=512, vocabulary=320), folder / "model.onnx")
    options = CompileOptions(target="vulkan", gpu_target="hopper", max_context=128, prefill_blocks=(64, 48))
    compile_model(folder / "model.onnx", options, output=folder / "model.vmfb")
    return table(folder / "model.vmfb")


def test_a_step_is_few_dispatches(rows: dict[str, list[dict[str, Any]]]) -> None:
    """Each costs beside its work: on an H100 a microsecond and more, with Vulkan three."""
    assert len(rows["decode"]) == 24
    for layer, count in (("layers.1/", 5), ("layers.3/", 7)):
        keys = [row["key"] for row in rows["decode"] if layer in row["node"]]
        assert len(keys) == count
        assert not [key for key in keys if "_dispatch_" in key]


def test_prompts_of_several_sizes_share_kernels(rows: dict[str, list[dict[str, Any]]]) -> None:
    """Those that we write, but for ones of few rows and of attention on matrix units; products over sizes too."""
    larger, smaller = (
        {row["key"] for row in rows[name] if not re.search(r"_dispatch_|attention_fused|_mma_c|conv", row["key"])}
        for name in ("prefill_64", "prefill_48")
    )
    assert larger == smaller
    assert [key for key in larger if key.startswith("split_columns")]
    products = [row for row in rows["prefill_64"] if "fused_mma" in row["key"]]
    assert len({row["key"] for row in products}) < len({row["flop"] for row in products})
    mlp = next(row for row in products if "gate_proj" in row["node"])
    assert mlp["flop"] == 2 * 64 * 256 * 2 * 512  # and up_proj
