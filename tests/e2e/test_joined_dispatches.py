"""Dispatches that one thread does are joined: which, how few are left, and that nothing else is different."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
from linattn.frontend.compile import compile_model
from linattn.frontend.lower import alone, iree
from linattn.frontend.lower.join_dispatches import joined_rows
from linattn.frontend.options import CompiledModel, CompileOptions
from linattn.frontend.targets.cpu import LIMITS
from linattn.runtime import Program
from linattn.runtime.manifest import DISPATCHES_KEY
from linattn.runtime.module import Module

from samples.tiny_hybrid import build

LARGE = 200_000
"""Bytes of what is joined at most, fewer than the caches have: attention stays a dispatch of its own."""
IDS = np.random.default_rng(3).integers(0, 256, (1, 24))


@cache
def compiled(*, joined: bool) -> CompiledModel:
    options = CompileOptions(prefill_blocks=(8,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alone, "JOINED_BYTES", LARGE)
        if not joined:
            patch.setattr(iree, "join_dispatches", lambda *_: {})
        return compile_model(build(), options)


def table(module: bytes) -> dict[str, list[dict[str, Any]]]:
    found = Module(module)
    return json.loads(next(text for name in found.functions if (text := found.reflection(name).get(DISPATCHES_KEY))))


def life(module: bytes, device: str | None) -> list[np.ndarray]:
    """Outputs and states of blocks and steps."""
    session = Program.load(module, device).session()
    found = [session.run({"input_ids": IDS[:, :11]})["logits"]]
    found += [session.run({"input_ids": IDS[:, at : at + 1]})["logits"] for at in range(11, 24)]
    return [*found, *session.states.numpy().values()]


@pytest.mark.parametrize("device", [None, "local-sync", "local-task"])
def test_the_same_bits(device: str | None) -> None:
    """Over kernels of one workgroup and of several along x and y, constants, caches that are written in place."""
    want = life(compiled(joined=False).module, "local-task")
    assert all(np.array_equal(a, b) for a, b in zip(want, life(compiled(joined=True).module, device), strict=True))


def test_a_step_is_few_dispatches() -> None:
    """Only what reads large caches is by itself; what a kernel does and how much is still told."""
    before, after = (table(compiled(joined=joined).module)["decode"] for joined in (False, True))
    large = [row["key"] for row in before if row["bytes"] > LARGE]
    assert len(large) == 1
    assert "attention" in large[0]
    assert len(before) > 30
    assert len(after) <= 6
    assert large[0] in [row["key"] for row in after]
    told = [kernel["key"] for row in after for kernel in row.get("kernels", [row])]
    assert sorted(told) == sorted(row["key"] for row in before)
    for quantity in ("bytes", "flop"):
        assert sum(row[quantity] or 0 for row in after) == sum(row[quantity] or 0 for row in before)


def test_the_report_says_so() -> None:
    text = compiled(joined=True).report.to_text()
    assert "joined    decode: " in text
    assert "joined" not in compiled(joined=False).report.to_text()


def test_a_joined_dispatch_has_no_more_buffers_than_a_call_takes() -> None:
    """Of 40 inputs, each with a buffer of its own; IREE 3.13 takes 32 in a dispatch."""
    count, kind = 40, onnx.TensorProto.FLOAT
    names = [f"x{i}" for i in range(count)]
    inputs = [onnx.helper.make_tensor_value_info(name, kind, [1, 8]) for name in names]
    outputs = [onnx.helper.make_tensor_value_info(f"y{i}", kind, [1, 1]) for i in range(count)]
    nodes = [onnx.helper.make_node("ReduceSum", [name], [f"y{i}"], name, keepdims=1) for i, name in enumerate(names)]
    graph = onnx.helper.make_graph(nodes, "sums", inputs, outputs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    module = compile_model(model).module
    values = {name: np.full((1, 8), i + 1, np.float32) for i, name in enumerate(names)}
    found = Program.load(module).run(values)
    assert [float(found[f"y{i}"].item()) for i in range(count)] == [8.0 * (i + 1) for i in range(count)]
    rows = next(iter(table(module).values()))
    assert LIMITS.bindings == 32
    assert 1 < len(rows) <= 4


def test_rows_of_equal_kernels() -> None:
    """Each is taken once, the first that is left."""
    rows = [
        {"key": key, "node": node, "bytes": 2, "flop": None, "dtype": "f32"}
        for key, node in zip("aabab", "12345", strict=True)
    ]
    (found,) = joined_rows({"f": rows}, {"f": [["a", "b"], ["a", "a"]]}).values()
    assert [row["key"] for row in found] == ["f_joined_0", "f_joined_1", "b"]
    assert [[one["node"] for one in row.get("kernels", [row])] for row in found] == [["1", "3"], ["2", "4"], ["5"]]
    assert [row["bytes"] for row in found] == [4, 4, 2]
    assert found[0]["node"] == "1 to 3"
