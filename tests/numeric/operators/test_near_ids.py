"""NearIds on a Vulkan device (lavapipe in CI), bit by bit, and behind which inputs it stands."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from harness import run_op
from linattn.dialect_patterns.target import Limits, Target
from linattn.frontend import CompileOptions
from linattn.frontend import compile as compiler
from linattn.frontend.graph.near_ids import near_ids
from linattn.frontend.graph.specialize import SpecializedGraph
from onnx import TensorProto, helper

from samples.tiny_hybrid import build

GPU = Target("vulkan", is_gpu=True)
CPU = Target("cpu", is_gpu=False, limits=Limits())


@pytest.mark.vulkan
@pytest.mark.xdist_group("vulkan")
@pytest.mark.parametrize(
    ("dtype", "shape"), [(np.int64, (1, 16)), (np.int64, (3, 2, 129)), (np.int64, (1, 2048)), (np.int32, (2, 18))]
)
def test_ids_come_as_they_are(dtype: Any, shape: tuple[int, ...]) -> None:
    limits = np.iinfo(dtype)
    ids = np.random.default_rng(0).integers(limits.min, limits.max, shape, dtype, endpoint=True)
    (got,) = run_op("NearIds", [ids], {}, domain="linattn", version=1, num_outputs=1, target="vulkan")
    assert got.tobytes() == ids.tobytes()


def nodes(tokens: int, target: Target = GPU, elem: int = TensorProto.INT64) -> list[tuple[str, list[str]]]:
    """The nodes of a graph that looks up its ids twice, with what they read."""
    value = [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in (
        ("table", TensorProto.FLOAT, [8, 4]), ("ids", elem, [1, tokens]), ("mask", TensorProto.INT64, [1, tokens]),
        ("a", TensorProto.FLOAT, [1, tokens, 4]), ("b", TensorProto.FLOAT, [1, tokens, 4]),
    )]  # fmt: skip
    body = [helper.make_node("Gather", ["table", "ids"], [name], name) for name in "ab"]
    body.append(helper.make_node("Identity", ["mask"], ["c"], "c"))
    graph = SpecializedGraph(
        helper.make_model(helper.make_graph(body, "g", value[:3], value[3:])), {one.name: one.type for one in value}
    )
    found = near_ids(graph, ["ids"], tokens, target)
    return [(node.op_type, list(node.input)) for node in found.proto.graph.node]


def test_every_reader_of_a_prompts_ids_reads_one_copy() -> None:
    readers = [("Gather", ["table", "ids.near"])] * 2
    assert nodes(32) == [("NearIds", ["ids"]), *readers, ("Identity", ["mask"])]
    assert nodes(20, elem=TensorProto.INT32)[0] == ("NearIds", ["ids"])


@pytest.mark.parametrize(("tokens", "target"), [(1, GPU), (8, GPU), (17, GPU), (32, CPU)])
def test_a_step_odd_ids_and_cpus_have_none(tokens: int, target: Target) -> None:
    assert [kind for kind, _ in nodes(tokens, target)] == ["Gather", "Gather", "Identity"]


def test_a_prompt_that_is_compiled_for_a_gpu_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, kinds = compiler._plan, dict[str, list[str]]()

    def planned(*args: Any) -> Any:
        found, graphs, needed = plan(*args)
        for entry, graph in zip(found.entry_points, graphs, strict=True):
            kinds[entry.symbol] = [node.op_type for node in graph.proto.graph.node]
        return found, graphs, needed

    monkeypatch.setattr(compiler, "_plan", planned)
    for target in ("vulkan", "cpu"):
        options = CompileOptions(target=target, max_context=64, prefill_blocks=(32,), dry_run=True)
        compiler.compile_model(build(), options)
        assert kinds["prefill_32"].count("NearIds") == (2 if target == "vulkan" else 0)  # ids and positions
        assert "NearIds" not in kinds["decode"]
