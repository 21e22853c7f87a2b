"""States are paired through the graph, symbols get their roles from where they stand."""

from __future__ import annotations

import onnx
import pytest
from linattn.frontend.graph.schema import infer_types
from linattn.frontend.graph.specialize import specialize
from linattn.frontend.graph.state_names import Pairing
from linattn.frontend.graph.states import find_states
from linattn.frontend.plan.dims import evaluate, find_roles
from linattn.runtime.errors import UnsupportedModelError

from samples.tiny_hybrid import build


def renamed(model: onnx.ModelProto, names: dict[str, str]) -> onnx.ModelProto:
    """The model with other names for its inputs and outputs."""
    for value in (*model.graph.input, *model.graph.output):
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        for values in (node.input, node.output):
            for i, name in enumerate(values):
                values[i] = names.get(name, name)
    return model


def test_pairs_do_not_need_names() -> None:
    model = build()
    names = {v.name: f"state_{i}" for i, v in enumerate(model.graph.input) if v.name.startswith("past")}
    names |= {v.name: f"out_{i}" for i, v in enumerate(reversed(model.graph.output)) if v.name.startswith("present")}
    pairs = find_states(build().graph)
    other = find_states(renamed(model, names).graph)
    assert [(names[p.past], names[p.present], p.kind) for p in pairs] == [(p.past, p.present, p.kind) for p in other]
    assert sorted(p.kind for p in pairs) == ["conv"] * 2 + ["kv_cache"] * 2 + ["recurrent"] * 2
    assert all(p.direct for p in pairs)


def test_a_cast_between_is_followed() -> None:
    model = build()
    node = next(n for n in model.graph.node if n.op_type == "LinearAttention")
    past = node.input[3]
    node.input[3] = "cast"
    model.graph.node.insert(0, onnx.helper.make_node("Cast", [past], ["cast"], to=onnx.TensorProto.FLOAT))
    pair = next(p for p in find_states(model.graph) if p.past == past)
    assert (pair.kind, pair.direct) == ("recurrent", False)


def around(before: list[onnx.NodeProto], after: list[onnx.NodeProto]) -> onnx.ModelProto:
    """The model with nodes between its first recurrent state and the operator: past -> "in", "out" -> present."""
    model = build()
    node = next(n for n in model.graph.node if n.op_type == "LinearAttention")
    nodes = [n for n in model.graph.node if n is not node]
    node.input[3], node.output[1] = "in", "out"
    at = next(i for i, n in enumerate(model.graph.node) if n == node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:at], *before, node, *after, *nodes[at:]])
    return model


PAST, PRESENT = "past.0.recurrent", "present.0.recurrent"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["Identity"], ["Identity"]),
        (["Transpose"], ["Transpose"]),
        (["Unsqueeze", "Squeeze"], ["Reshape"]),
        (["Gather"], ["Identity"]),
        (["Slice"], ["Concat"]),
        (["CastLike"], ["Reshape", "Cast"]),
    ],
    ids=lambda names: "+".join(names),
)
def test_what_only_moves_a_state_is_followed(before: list[str], after: list[str]) -> None:
    def chain(ops: list[str], first: str, last: str) -> list[onnx.NodeProto]:
        names = [first, *(f"{last}.{i}" for i in range(len(ops) - 1)), last]
        return [
            onnx.helper.make_node(op, [a, "argument"], [b], op) for op, a, b in zip(ops, names, names[1:], strict=False)
        ]

    model = around(chain(before, PAST, "in"), chain(after, "out", PRESENT))
    pair = next(p for p in find_states(model.graph) if p.past == PAST)
    assert (pair.present, pair.kind, pair.found_by) == (PRESENT, "recurrent", "operator")
    assert (pair.direct, pair.between) == (False, (*before, *after))


def plain(**outputs: list[int | str]) -> onnx.ModelProto:
    """States with no operator of ours: y = x + a, and each output from the input that its name belongs to."""
    value = onnx.helper.make_tensor_value_info
    given = {"input_ids": [1, "t"], "past.0.ssm": [1, 4, "p"], "past_conv.1": [1, 4]}
    nodes = [onnx.helper.make_node("Exp", [next(iter(given))], [name], name) for name in outputs]
    inputs = [value(name, onnx.TensorProto.FLOAT, shape) for name, shape in given.items()]
    results = [value(name, onnx.TensorProto.FLOAT, shape) for name, shape in outputs.items()]
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "plain", inputs, results))


def test_names_decide_where_the_graph_does_not() -> None:
    model = plain(**{"present_conv.1": [1, 4], "present.0.ssm": [1, 4, "p + t"], "logits": [1, 2]})
    pairs = [(p.past, p.present, p.found_by) for p in find_states(model.graph)]
    assert pairs == [("past.0.ssm", "present.0.ssm", "name"), ("past_conv.1", "present_conv.1", "name")]


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"present_conv.1": [1, 4]}, r"past\.0\.ssm.*looks like a state.*--state past\.0\.ssm=OUTPUT.*--no-state past"),
        (
            {"present.0.ssm": [1, 5, "p"], "present_conv.1": [1, 4]},
            r"past\.0\.ssm.*cannot be the next value.*float \[1, 5",
        ),
    ],
    ids=["no partner", "another shape"],
)
def test_a_state_without_a_partner_stops_the_compile(outputs: dict[str, list[int | str]], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        find_states(plain(**outputs).graph)


def test_pairs_by_hand() -> None:
    graph = plain(other=[1, 4, "q"], logits=[1, 2]).graph
    pairing = Pairing({"past.0.ssm": "other"}, frozenset({"past_conv.1"}))
    assert [(p.past, p.present, p.found_by) for p in find_states(graph, pairing)] == [
        ("past.0.ssm", "other", "--state")
    ]
    for bad, message in (
        (Pairing({"nobody": "other"}), r"--state.*no such input.*'nobody'.*past_conv\.1"),
        (Pairing({"past.0.ssm": "nothing"}), r"--state.*no such output.*'nothing'.*other, logits"),
        (Pairing({"past.0.ssm": "logits"}), r"past\.0\.ssm.*cannot be the next value"),
        (Pairing({}, frozenset({"nobody"})), r"--no-state.*no such input"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            find_states(graph, bad)


def test_a_state_that_never_comes_back_is_refused() -> None:
    model = build()
    kept = [v for v in model.graph.output if v.name != "present.0.recurrent"]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    with pytest.raises(UnsupportedModelError, match=r"past\.0\.recurrent.*not an output"):
        find_states(model.graph)


def test_a_cache_that_cannot_grow_is_refused() -> None:
    model = build()
    past = next(p.past for p in find_states(model.graph) if p.kind == "kv_cache")
    dim = next(v for v in model.graph.input if v.name == past).type.tensor_type.shape.dim[2]
    dim.Clear()
    dim.dim_value = 12
    with pytest.raises(UnsupportedModelError, match=rf"{past}.*fixed number of rows.*--no-state {past}"):
        find_states(model.graph)
    assert past not in [p.past for p in find_states(model.graph, Pairing({}, frozenset({past})))]


def test_roles() -> None:
    model = build()
    roles = find_roles(model.graph, infer_types(model), find_states(model.graph)).roles
    assert roles == {"batch": "batch", "sequence": "tokens", "total": "total", "past": "past"}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("batch", 3),
        ("past + seq", 12),
        ("4*batch*seq", 60),
        ("seq // 2", 2),
        ("seq // zero", None),
        ("unknown + 1", None),
        ("__import__('os')", None),
        ("2**99999999", None),
        ("(" * 500 + "1" + ")" * 500, None),
        ("sequence length", None),
    ],
)
def test_dim_expressions(expression: str, value: int | None) -> None:
    assert evaluate(expression, {"batch": 3, "seq": 5, "past": 7, "zero": 0}) == value


def test_bound_dims_leave_no_shape_arithmetic() -> None:
    sizes = {"batch": 1, "sequence": 4, "past": 0, "total": 4}
    graph = specialize(build(), sizes, {}, ()).proto.graph
    assert not [n for n in graph.node if n.op_type in ("Shape", "Constant")]
    assert all(d.HasField("dim_value") for v in graph.output for d in v.type.tensor_type.shape.dim)


def test_what_an_exporter_says_of_inner_values_is_not_believed() -> None:
    model = build()
    wrong = onnx.helper.make_tensor_value_info("layers.0.norm", onnx.TensorProto.FLOAT, [1])
    model.graph.value_info.append(wrong)
    types = infer_types(model)
    assert len(types["layers.0.norm"].tensor_type.shape.dim) == 3


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "past.0.conv"])
def test_roles_of_inputs_without_dimensions(name: str) -> None:
    model = build()
    value = next(v for v in model.graph.input if v.name == name)
    value.CopyFrom(onnx.helper.make_tensor_value_info(name, value.type.tensor_type.elem_type, []))
    assert "batch" in find_roles(model.graph, infer_types(model), find_states(model.graph)).roles.values()


def test_a_cache_of_fixed_size_that_a_concat_makes_longer_is_refused() -> None:
    value, past, present = onnx.helper.make_tensor_value_info, "past_key_values.0.key", "present.0.key"
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Concat", [past, "x"], [present], "join", axis=2)],
        "g",
        [value("x", 1, ["B", 2, "T", 16]), value(past, 1, ["B", 2, 64, 16])],
        [value(present, 1, ["B", 2, "total", 16])],
    )
    with pytest.raises(UnsupportedModelError, match=rf"node 'join' .*{past}.*fixed number of rows.*--no-state {past}"):
        find_states(graph)
    assert find_states(graph, Pairing({}, frozenset({past}))) == []
