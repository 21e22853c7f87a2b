"""The model of the benchmarks: the graph that an exporter writes, in every type; it computes what ONNX Runtime does."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from linattn.frontend import CompileOptions, compile_model
from linattn.runtime import Program

from samples import benchmark_model
from samples.benchmark_model import Shape, write
from tests.tolerances import relative_norm

EXPORTS = Path(__file__).parents[3] / "shared" / "models" / "qwen35-0.8b-shape"
SMALL = {"hidden": 256, "heads": 2, "mlp": 256, "vocabulary": 320}


@pytest.mark.parametrize(("dtype", "export"), [("fp32", "genai-fp32"), ("int4", "genai-int4")])
def test_it_is_the_exported_graph(dtype: str, export: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators and weights of the published sizes are those of the real export; none of them is written here."""

    def record(g: Any, name: str, array: np.ndarray) -> str:
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        g.weights.append(onnx.TensorProto(name=name, dims=array.shape, data_type=kind, data_location=1))
        return name

    class Zeros:
        def standard_normal(self, dims: Any, dtype: Any) -> np.ndarray:
            return np.broadcast_to(dtype(0), dims)

        def integers(self, low: int, high: int, dims: Any, dtype: Any) -> np.ndarray:
            return np.broadcast_to(dtype(0), dims)

        def uniform(self, low: float, high: float, dims: int) -> np.ndarray:
            return np.zeros(dims)

    graph = benchmark_model._Graph
    monkeypatch.setattr(graph, "weight", record)
    monkeypatch.setattr(graph, "random", lambda *_: Zeros())

    def values(g: Any, name: str, *dims: int, scale: float = 0) -> str:
        return record(g, name, np.broadcast_to(np.float32(scale), dims))

    monkeypatch.setattr(graph, "values", values)
    write(Shape(dtype=dtype), tmp_path / "model.onnx")
    files = tmp_path / "model.onnx", EXPORTS / export / "model.onnx"
    ours, theirs = (onnx.load(file, load_external_data=False).graph for file in files)
    operators = (Counter(node.op_type for node in g.node if node.op_type != "Constant") for g in (ours, theirs))
    assert next(operators) == next(operators)
    weights = (
        Counter((tensor.data_type, tuple(tensor.dims)) for tensor in g.initializer if tensor.data_location == 1)
        for g in (ours, theirs)
    )
    assert next(weights) == next(weights)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int4"])
def test_it_compiles(dtype: str, tmp_path: Path) -> None:
    write(Shape(dtype=dtype, **SMALL), tmp_path / "model.onnx")
    sizes = {"max_context": 64, "prefill_blocks": (16,)}
    report = compile_model(tmp_path / "model.onnx", CompileOptions(dry_run=True, **sizes)).report
    assert [row.strategy for row in report.nodes if "LinearAttention" in row.op] == ["fused_simd"] * 3


def onnx_runtime_logits(model: Path, ids: np.ndarray, level: int) -> np.ndarray:
    """With the activations of MatMulNBits rounded to int8 (level 4) or not (0)."""
    proto = onnx.load(model, load_external_data=False)
    for attribute in (a for node in proto.graph.node for a in node.attribute if a.name == "accuracy_level"):
        attribute.i = level
    file = model.with_name(f"level{level}.onnx")  # beside its weights
    onnx.save(proto, file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones(ids.shape, np.int64)}
    feeds["position_ids"] = np.broadcast_to(np.arange(ids.shape[1]), (3, *ids.shape)).copy()
    for value in session.get_inputs()[3:]:
        sizes = [dim if isinstance(dim, int) else int(dim == "batch_size") for dim in value.shape]
        feeds[value.name] = np.zeros(sizes, np.float32)
    return session.run(["logits"], feeds)[0]


def test_int4_differs_no_more_than_onnx_runtime_from_itself(tmp_path: Path) -> None:
    """In 24 layers: ours is nearer to ONNX Runtime's rounding than that is to none, and no further from none."""
    model = tmp_path / "model.onnx"
    shape = Shape(dtype="int4", layers=24, **SMALL)
    write(shape, model)
    first = model.with_name(f"{model.name}.data").read_bytes()
    write(shape, model)
    assert model.with_name(f"{model.name}.data").read_bytes() == first  # equal arguments, equal files
    compile_model(model, CompileOptions(max_context=32, prefill_blocks=(16,)), output=tmp_path / "m.vmfb")
    ids = np.random.default_rng(0).integers(0, SMALL["vocabulary"], (1, 16))
    with Program.load(tmp_path / "m.vmfb") as program:
        logits = program.session().run({"input_ids": ids})["logits"]
    rounded, exact = (onnx_runtime_logits(model, ids, level) for level in (4, 0))
    own = relative_norm(rounded, exact)
    assert relative_norm(logits, rounded) < own
    assert relative_norm(logits, exact) < 1.1 * own
    print(f"ours:theirs {relative_norm(logits, rounded):.1e}, rounded:exact {own:.1e}")
