"""If: each entry point has the branch that its sizes choose, nested ones too; other conditions are refused by name."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from linattn.frontend import CompileOptions
from linattn.frontend.compile import compile_model
from linattn.runtime import Program
from linattn.runtime.errors import UnsupportedModelError
from onnx import TensorProto, helper
from tolerances import BENIGN, error

from tests.selective_models import scan_model, step_model
from tests.spelled_out import feeds_of, run

WIDTH = 8
node = helper.make_node


def branch(nodes: list[onnx.NodeProto], result: str, weights: tuple[onnx.TensorProto, ...] = ()) -> onnx.GraphProto:
    return helper.make_graph(nodes, "branch", [], [helper.make_tensor_value_info(result, 1, None)], weights)


def model(condition: list[onnx.NodeProto]) -> onnx.ModelProto:
    """y = -x for one token, 2 x for more, 3 x from 8 on: the inner If reads what is outside, and names are reused."""
    value, tokens = helper.make_tensor_value_info, ["batch", "seq", WIDTH]
    three = helper.make_tensor("factor", TensorProto.FLOAT, [1], [3.0])
    inner = node(
        "If", ["many"], ["out"], "inner",
        then_branch=branch([node("Mul", ["x", "factor"], ["r"])], "r", (three,)),
        else_branch=branch([node("Add", ["x", "x"], ["r"])], "r"),
    )  # fmt: skip
    nodes = [
        node("Shape", ["x"], ["count"], "shape", start=1, end=2),
        *condition,
        node("Greater", ["count", "seven"], ["many"], "many"),
        node(
            "If", ["single"], ["z"], "outer",
            then_branch=branch([node("Neg", ["x"], ["out"])], "out"), else_branch=branch([inner], "out"),
        ),
        node("LinearAttention", ["z", "z", "z", "past.0.recurrent"], ["y", "present.0.recurrent"], "attention",
             domain="com.microsoft", q_num_heads=1, kv_num_heads=1, update_rule="linear", scale=1.0),
    ]  # fmt: skip
    state = ["batch", 1, WIDTH, WIDTH]
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, tokens), value("past.0.recurrent", TensorProto.FLOAT, state)],
        [value("y", TensorProto.FLOAT, tokens), value("present.0.recurrent", TensorProto.FLOAT, state)],
        [helper.make_tensor(name, TensorProto.INT64, [1], [n]) for name, n in (("one", 1), ("seven", 7))],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


BY_SIZE = [node("Equal", ["count", "one"], ["single"], "compare")]
BY_DATA = [
    node("ReduceSum", ["x"], ["sum"], "sum", keepdims=0),
    node("Cast", ["sum"], ["single"], "cast", to=TensorProto.BOOL),
]


def test_each_entry_point_has_its_branch() -> None:
    proto = model(BY_SIZE)
    program = Program.load(compile_model(proto, CompileOptions(prefill_blocks=(8, 4))).module)
    runtime = onnxruntime.InferenceSession(proto.SerializeToString())
    for tokens in (1, 4, 8):
        x = np.random.default_rng(tokens).standard_normal((1, tokens, WIDTH)).astype(np.float32)
        feeds = {"x": x, "past.0.recurrent": np.zeros((1, 1, WIDTH, WIDTH), np.float32)}
        got = program.run(feeds)
        for output, want in zip(runtime.get_outputs(), runtime.run(None, feeds), strict=True):
            assert error(got[output.name], want) < BENIGN["float32"], (tokens, output.name)


@pytest.mark.parametrize(
    ("condition", "blocks"), [(BY_DATA, (8,)), (BY_SIZE, None)], ids=["by data", "by a size that is open"]
)
def test_refused_where_sizes_do_not_tell(condition: list[onnx.NodeProto], blocks: tuple[int, ...] | None) -> None:
    with pytest.raises(UnsupportedModelError, match=r"node 'outer.* \(If\): its condition depends on more than the "):
        compile_model(model(condition), CompileOptions(prefill_blocks=blocks))


def test_what_is_in_a_branch_is_checked() -> None:
    proto = model(BY_SIZE)
    outer = next(n for n in proto.graph.node if n.name == "outer")
    outer.attribute[0].g.node[0].op_type = "LSTM"
    with pytest.raises(UnsupportedModelError, match=r"node 'outer\.else\.inner': the operator ai\.onnx\.LSTM is not"):
        compile_model(proto)


def of_branches(condition: list[onnx.NodeProto]) -> onnx.ModelProto:
    """Mamba-1's step for one token, else a Scan, which reads a value of its branch from around its body."""
    branches: list[onnx.GraphProto] = []
    for part in (step_model(), scan_model(rate="captured")):
        graph = part.graph
        names = {v.name: f"{v.name}_result" for v in graph.output}
        for inner in graph.node:
            inner.output[:] = [names.get(name, name) for name in inner.output]
            inner.input[:] = [names.get(name, name) for name in inner.input]
        results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names.values()]
        branches.append(helper.make_graph(graph.node, "branch", [], results, graph.initializer))
    chosen = node("If", ["single"], ["y", "present"], "branch", then_branch=branches[0], else_branch=branches[1])
    count = node("Shape", ["x"], ["count"], "shape", start=1, end=2)
    whole = scan_model().graph
    one = helper.make_tensor("one", TensorProto.INT64, [1], [1])
    graph = helper.make_graph([count, *condition, chosen], "g", whole.input, whole.output, [one])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)


def test_a_loop_in_a_branch_is_raised_and_its_state_paired() -> None:
    proto = of_branches(BY_SIZE)
    compiled = compile_model(proto, CompileOptions(prefill_blocks=(6,)))
    assert [note.rpartition(" -> ")[2] for note in compiled.report.notes if "raised" in note] == ["SelectiveScan"]
    program = Program.load(compiled.module)
    assert [(state.name, state.output) for state in program.states] == [("past", "present")]
    for tokens in (1, 6):
        feeds = feeds_of(proto, {"B": 1, "T": tokens})
        got, want = program.run(feeds), run(proto, feeds)
        for name, value in want.items():
            assert error(got[name], value) < BENIGN["float32"], (tokens, name)
    with pytest.raises(UnsupportedModelError, match=r"node 'branch.* \(If\): its condition depends on more than the "):
        compile_model(of_branches(BY_DATA))
