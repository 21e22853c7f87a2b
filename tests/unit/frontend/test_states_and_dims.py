"""States are paired through the graph, symbols get their roles from where they stand."""

from __future__ import annotations

import onnx
import pytest
from linattn.frontend.dims import evaluate, find_roles
from linattn.frontend.schema import infer_types
from linattn.frontend.specialize import specialize
from linattn.frontend.states import find_states
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


def test_a_state_that_never_comes_back_is_refused() -> None:
    model = build()
    kept = [v for v in model.graph.output if v.name != "present.0.recurrent"]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    with pytest.raises(UnsupportedModelError, match=r"past\.0\.recurrent.*not an output"):
        find_states(model.graph)


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
