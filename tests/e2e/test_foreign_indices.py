"""Token ids and positions outside the model's tables: refused in one line before anything runs, on every way in."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from linattn.frontend import CompileOptions, compile_model
from linattn.runtime import InputError, Program, StateError, greedy
from linattn.runtime.cli import main
from linattn.runtime.held import zeros
from onnx import TensorProto, helper

ROWS, POSITIONS, WIDTH = 1000, 16, 8
TARGETS = ["cpu", pytest.param("vulkan", marks=pytest.mark.vulkan)]
FOREIGN = [5_000_000_000, 10**9, -(10**6), ROWS, -ROWS - 1]


@cache
def model() -> onnx.ModelProto:
    """Rows of a table of tokens plus rows of a table of positions, through a convolution with a state."""
    rng = np.random.default_rng(0)

    def value(name: str, dtype: int, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, dtype, list(shape))

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)

    nodes = [
        helper.make_node("Gather", ["tokens", "input_ids"], ["token"]),
        helper.make_node("Gather", ["positions", "position_ids"], ["position"]),
        helper.make_node("Add", ["token", "position"], ["x"]),
        helper.make_node("Transpose", ["x"], ["columns"], perm=[0, 2, 1]),
        helper.make_node(
            "CausalConvWithState", ["columns", "taps", "", "past"], ["y", "present"], domain="com.microsoft"
        ),
        helper.make_node("Transpose", ["y"], ["logits"], perm=[0, 2, 1]),
    ]
    sizes = ("batch_size", "sequence_length")
    graph = helper.make_graph(
        nodes,
        "tables",
        [
            value("input_ids", TensorProto.INT64, *sizes),
            value("position_ids", TensorProto.INT64, *sizes),
            value("past", TensorProto.FLOAT, "batch_size", WIDTH, 3),
        ],
        [
            value("logits", TensorProto.FLOAT, *sizes, WIDTH),
            value("present", TensorProto.FLOAT, "batch_size", WIDTH, 3),
        ],
        [weight("tokens", ROWS, WIDTH), weight("positions", POSITIONS, WIDTH), weight("taps", WIDTH, 1, 4)],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@cache
def compiled(target: str) -> bytes:
    return compile_model(model(), CompileOptions(target=target, prefill_blocks=(4,))).module


@cache
def program(target: str) -> Program:
    return Program.load(compiled(target))


def reference(ids: Any, positions: Any = None) -> np.ndarray:
    ids = np.asarray(ids)
    feeds = {
        "input_ids": ids,
        "position_ids": np.arange(ids.shape[1])[None] if positions is None else np.asarray(positions),
        "past": np.zeros((1, WIDTH, 3), np.float32),
    }
    session = onnxruntime.InferenceSession(model().SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["logits"], feeds)[0]


def test_the_manifest_says_what_is_legal() -> None:
    bounds = {spec.name: spec.bounds for spec in program("cpu").inputs}
    assert bounds == {"input_ids": (-ROWS, ROWS - 1), "position_ids": (-POSITIONS, POSITIONS - 1)}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("token", FOREIGN)
def test_session_refuses(target: str, token: int) -> None:
    session = program(target).session()
    session.run({"input_ids": [[1, 2, 3]]})
    before = session.states["past"].numpy()
    for ids in ([[token]], [[4, 5, 6, 7, token]]):
        with pytest.raises(InputError) as caught:
            session.run({"input_ids": ids})
        place = f"input_ids[0, {len(ids[0]) - 1}]"
        assert str(caught.value) == f"{place}: index out of range, got {token}, expected -1000 to 999"
    assert session.position == 3
    np.testing.assert_array_equal(session.states["past"].numpy(), before)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("token", FOREIGN)
def test_program_refuses(target: str, token: int) -> None:
    with pytest.raises(InputError, match=r"input_ids\[0, 0\]: index out of range, got -?\d+, expected -1000 to 999$"):
        program(target).run({"input_ids": [[token]]})


@pytest.mark.parametrize("token", FOREIGN)
def test_greedy_refuses(token: int) -> None:
    session = program("cpu").session()
    with pytest.raises(InputError, match=r"input_ids\[0, 1\]: index out of range"):
        next(greedy(session, [1, token], 2))
    assert session.position == 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("more", [[], ["--generate", "3"]])
def test_shell_refuses(target: str, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "m.vmfb"
    file.write_bytes(compiled(target))
    for token in FOREIGN:
        assert main([str(file), f"--ids=1,{token}", *more]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        error = printed.err.splitlines()[-1]
        got = f"got {token}, expected -1000 to 999"
        assert error == f"linattn-run: error: input_ids[0, 1]: index out of range, {got}"


@pytest.mark.parametrize("target", TARGETS)
def test_the_ends_of_a_table_and_those_counted_from_its_end(target: str) -> None:
    ids = np.array([[0, ROWS - 1, -1, -ROWS]])
    np.testing.assert_allclose(program(target).run({"input_ids": ids})["logits"], reference(ids), rtol=1e-5, atol=1e-6)
    session = program(target).session()
    parts = [session.run({"input_ids": ids[:, i : i + 1]})["logits"] for i in range(4)]
    np.testing.assert_allclose(np.concatenate(parts, 1), reference(ids), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_positions_beyond_their_table(target: str) -> None:
    given = {"input_ids": [[1]], "position_ids": [[POSITIONS - 1]]}
    np.testing.assert_allclose(
        program(target).run(given)["logits"], reference([[1]], [[POSITIONS - 1]]), rtol=1e-5, atol=1e-6
    )
    for wrong in (POSITIONS, -POSITIONS - 1, 1 << 40):
        for run in (program(target).run, program(target).session().run):
            with pytest.raises(
                InputError, match=rf"position_ids\[0, 0\]: index out of range, got {wrong}, expected -16"
            ):
                run({"input_ids": [[1]], "position_ids": [[wrong]]})


def test_positions_that_the_session_counts_itself() -> None:
    session = program("cpu").session()
    session.run({"input_ids": np.ones((1, POSITIONS), np.int64)})
    with pytest.raises(StateError, match=r"context full, got 16 \+ 1 tokens, expected at most 16; reset the session"):
        session.run({"input_ids": [[1]]})
    assert session.position == POSITIONS


@pytest.mark.parametrize("target", TARGETS)
def test_a_module_without_the_runtime_protects_memory(target: str) -> None:
    """Whoever calls the module itself gets the nearest rows."""
    loaded = program(target)
    entry = next(entry for entry in loaded.manifest.entry_points if entry.tokens == 4)
    ids, positions = np.array([[5 * 10**9, 10**9, -(10**6), ROWS]]), np.array([[POSITIONS, 0, -POSITIONS - 1, 1 << 40]])
    states = zeros(loaded.manifest, loaded._engine.pool, 1).arrays(loaded.manifest)
    (logits,), _ = loaded._engine.call(entry, [ids, positions], states, 0)
    want = reference([[ROWS - 1, ROWS - 1, 0, ROWS - 1]], [[POSITIONS - 1, 0, 0, POSITIONS - 1]])
    np.testing.assert_allclose(loaded.device.to_host(logits), want, rtol=1e-5, atol=1e-6)
