"""Scans that spell LinearAttention out become it, with ONNX Runtime's outputs for the Scan; others stay."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from linattn.frontend import compile as compiler
from linattn.frontend.compile import CompileOptions, compile_model
from linattn.frontend.graph.raising.raise_operators import raise_operators
from linattn.frontend.graph.states import find_states
from linattn.frontend.graph.validate import check_graph
from linattn.runtime.errors import LinattnError, UnsupportedModelError
from onnx import helper

from tests.selective_models import scan_model, step_model, value_model
from tests.spelled_out import (
    RULES,
    Graph,
    Shape,
    Step,
    by_einsum,
    by_matmul,
    by_sums,
    feeds_of,
    inlined,
    model_of,
    operator_model,
    optimized,
    recurrence_model,
    run,
)
from tests.tolerances import BENIGN, error
from tests.unit.frontend.test_hostile_models import DAMAGES, Planned, stop
from tests.unit.frontend.test_raised_convolutions import Form, convolution_model


def raised(model: onnx.ModelProto, tokens: int = 5) -> list[onnx.NodeProto]:
    """The LinearAttention nodes that a model has after the pass, which must not change what it computes."""
    before = copy.deepcopy(model)
    done = raise_operators(model)
    assert not done.misses, done.misses
    check_graph(model)
    feeds = feeds_of(model, {"B": 2, "T": tokens})
    want, got = run(before, feeds), run(model, feeds)
    for name, value in want.items():
        assert error(got[name], value) <= BENIGN[value.dtype.name], name
    nodes = [node for node in model.graph.node if node.op_type == "LinearAttention"]
    assert len(nodes) == len(done.notes)
    assert not [node for node in model.graph.node if node.op_type == "Scan"]
    return nodes


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


@pytest.mark.parametrize("per_key", [False, True])
@pytest.mark.parametrize("step", [by_matmul, by_sums, by_einsum])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_in_every_spelling(rule: str, step: Any, per_key: bool) -> None:
    model = recurrence_model(rule, step, per_key=per_key)
    (node,) = raised(model)
    found = attributes(node)
    assert (found["update_rule"], found["q_num_heads"], found["kv_num_heads"]) == (rule.encode(), 2, 4)
    assert found["scale"] == pytest.approx(0.25)
    # The same node as the direct export: packed inputs as they came, no moves and no repetition of heads left.
    assert [n for n in node.input if n] == [n for n in ("q", "k", "v", "past", "decay", "beta") if n in node.input]
    assert list(node.output)[1] == "present"
    assert [n.op_type for n in model.graph.node] == ["LinearAttention", "Neg"]


def test_the_report_names_what_was_raised() -> None:
    model = recurrence_model("gated_delta")
    name = next(n.name for n in model.graph.node if n.op_type == "Scan")
    assert raise_operators(model).notes == [f"raised: Scan '{name}' -> LinearAttention (gated_delta)"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value_first", [False, True])
def test_heads_repeated_the_other_way_keep_their_order(rule: str, value_first: bool) -> None:
    """Query h mod r is not what the operator reads for fewer queries: the repeated heads are its inputs then."""
    (node,) = raised(recurrence_model(rule, repeat="before", value_first=value_first))
    assert attributes(node)["q_num_heads"] == 4


@pytest.mark.parametrize("sizes", [Shape(heads=1, q_heads=1), Shape(q_heads=1, heads=3), Shape(dk=4, dv=4, q_heads=4)])
@pytest.mark.parametrize("tokens", [1, 7])
def test_sizes_that_coincide(sizes: Shape, tokens: int) -> None:
    raised(recurrence_model("gated_delta", shape=sizes), tokens)
    raised(recurrence_model("gated", by_sums, sizes, per_key=True), tokens)


def defined_model(
    rule: str, dtype: int, state: int, q_heads: int, *, per_key: bool = False, past: bool = True
) -> onnx.ModelProto:
    """LinearAttention of opset 27, with two state heads."""
    inputs: dict[str, tuple[int, list[int | str]]] = {
        "q": (dtype, ["B", "T", q_heads * 8]),
        "k": (dtype, ["B", "T", 16]),
        "v": (dtype, ["B", "T", 12]),
        "past" if past else "-past": (state, ["B", 2, 8, 6]),
        "decay" if "gated" in rule else "-decay": (dtype, ["B", "T", 16 if per_key else 2]),
        "beta" if "delta" in rule else "-beta": (dtype, ["B", "T", 1 if per_key else 2]),
    }
    outputs = {"y": (dtype, ["B", "T", q_heads * 6]), "present": (state if past else dtype, ["B", 2, 8, 6])}
    more = {"q_num_heads": q_heads, "kv_num_heads": 2, "update_rule": rule}
    return operator_model("LinearAttention", inputs, outputs, **more)


HALF, SINGLE = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT


@pytest.mark.parametrize(
    ("dtype", "state", "form"),
    [
        (SINGLE, SINGLE, {"q_heads": 4}),
        (SINGLE, SINGLE, {"q_heads": 6, "past": False}),
        (HALF, HALF, {"q_heads": 4, "past": False}),
        (HALF, SINGLE, {"q_heads": 2, "per_key": True}),
    ],
)
@pytest.mark.parametrize("rule", RULES)
def test_the_body_that_onnx_defines_the_operator_with(rule: str, dtype: int, state: int, form: dict[str, Any]) -> None:
    (node,) = raised(inlined(model := defined_model(rule, dtype, state, **form)))
    assert list(node.input) == list(model.graph.node[0].input)  # of the same types, too: no casts are left
    assert attributes(node)["q_num_heads"] == form["q_heads"]
    assert attributes(node)["scale"] == pytest.approx(8**-0.5)


@pytest.mark.parametrize("level", ["ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED"])
@pytest.mark.parametrize("rule", RULES)
def test_what_onnx_runtime_expands_the_operator_to(rule: str, level: str, tmp_path: Path) -> None:
    model = defined_model(rule, SINGLE, SINGLE, 4)
    levels = onnxruntime.GraphOptimizationLevel
    (node,) = raised(optimized(model, getattr(levels, level), tmp_path / "optimized.onnx"))
    assert list(node.input) == list(model.graph.node[0].input)


@pytest.mark.parametrize("axis", [0, 2])
@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_the_loop_of_transformers(dtype: int, axis: int) -> None:
    """As transformers.js' exports have it: [B, H, T, d] in f32, tokens first or where they are, then back."""
    g, body = Graph(), Graph("body_")
    sizes = {"q": 8, "k": 8, "v": 6, "beta": 0, "decay": 0}
    for name, size in sizes.items():
        value = g.op("Reshape", name, g.ints(0, 0, 2, size)) if size else name
        value = g.op("Cast", value, to=SINGLE) if dtype == HALF else value
        value = g.op("Transpose", value, perm=[0, 2, 1, 3] if size else [0, 2, 1])
        if name == "q":
            value = g.op("Div", value, g.number(8**0.5))
        if axis == 0:
            value = g.op("Transpose", value, perm=[2, 0, 1, 3] if size else [2, 0, 1])
        g.op("Identity", value, outputs=[f"{name}_all"])
    step = Step(body, "state", *(f"{name}_t" for name in ("q", "k", "v", "decay", "beta")))
    # exp(g) of [B, H] and then two new axes; sums that keep the axis they sum over.
    decay = body.op("Unsqueeze", body.op("Unsqueeze", body.op("Exp", step.decay), body.ints(-1)), body.ints(-1))
    state = body.op("Mul", step.state, decay)
    found = body.op("ReduceSum", body.op("Mul", state, step.column(step.k)), body.ints(-2), keepdims=0)
    delta = body.op("Mul", body.op("Sub", step.v, found), step.column(step.beta))
    state = body.op("Add", state, body.op("Mul", step.column(step.k), step.row(delta)))
    read = body.op("ReduceSum", body.op("Mul", state, step.column(step.q)), body.ints(-2), keepdims=1)
    results = [body.op("Identity", state), body.op("Squeeze", read, body.ints(2))]
    names = ["state", *(f"{name}_t" for name in sizes), *results]
    infos = [helper.make_tensor_value_info(name, SINGLE, None) for name in names]
    inner = helper.make_graph(body.nodes, "step", infos[:6], infos[6:])
    axes = {} if axis == 0 else {"scan_input_axes": [2] * 5, "scan_output_axes": [2]}
    scanned = [f"{name}_all" for name in sizes]
    g.op("Scan", "past", *scanned, outputs=["present", "all"], body=inner, num_scan_inputs=5, **axes)
    value = g.op("Transpose", g.op("Transpose", "all", perm=[1, 2, 0, 3]) if axis == 0 else "all", perm=[0, 2, 1, 3])
    value = g.op("Cast", value, to=dtype) if dtype == HALF else value
    g.op("Neg", g.op("Reshape", value, g.ints(0, 0, -1)), outputs=["y"])
    inputs = {name: ["B", "T", 2 * (size or 1)] for name, size in sizes.items()}
    model = model_of(g, inputs, {"y": ["B", "T", 12]}, dtype)
    for values in (model.graph.input, model.graph.output):
        name = "past" if values is model.graph.input else "present"
        values.append(helper.make_tensor_value_info(name, SINGLE, ["B", 2, 8, 6]))
    (node,) = raised(model)
    assert attributes(node)["update_rule"] == b"gated_delta"
    assert attributes(node)["scale"] == pytest.approx(8**-0.5)
    left = [n.op_type for n in model.graph.node if n.op_type not in ("LinearAttention", "Neg")]
    assert dtype == HALF or not left  # casts stand between moves, which stay then


def many_queries_a_head(s: Step) -> tuple[str, str]:
    """As ONNX's function body reads the state: repeated for the queries of a group."""
    g = s.g
    state = g.op("Add", s.state, g.op("MatMul", s.column(s.k), s.row(s.v)))
    wide = g.op("Expand", g.op("Unsqueeze", state, g.ints(2)), g.ints(1, 1, 3, 1, 1))
    read = g.op("Reshape", wide, g.ints(0, -1, 8, 6))
    return state, g.op("Mul", g.number(0.5), g.op("Squeeze", g.op("MatMul", s.row(s.q), read), g.ints(-2)))


def test_more_queries_than_heads() -> None:
    model = recurrence_model("linear", many_queries_a_head, Shape(q_heads=2, heads=2))
    for value in model.graph.input:
        if value.name == "q":
            value.type.tensor_type.shape.dim[2].dim_value = 48
    for value in model.graph.output:
        if value.name == "y":
            value.type.tensor_type.shape.dim[2].dim_value = 36
    for node in model.graph.node:  # the queries' own shape has six heads
        if node.op_type == "Concat" and node.input[0] == "Shape_0_out":
            constant = next(n for n in model.graph.node if n.output[0] == node.input[2])
            constant.attribute[0].ints[:] = [6, -1]
    (node,) = raised(model)
    assert (attributes(node)["q_num_heads"], attributes(node)["kv_num_heads"]) == (6, 2)
    assert attributes(node)["scale"] == pytest.approx(0.125)


def test_what_reads_keys_as_values_is_raised_with_that_meaning() -> None:
    """``o = N q`` reads along the values: a linear rule in which the two have changed places."""

    def step(s: Step) -> tuple[str, str]:
        state, _ = by_matmul(s)
        return state, s.g.op("Squeeze", s.g.op("MatMul", state, s.column(s.q)), s.g.ints(-1))

    (node,) = raised(recurrence_model("linear", step, Shape(q_heads=4, dk=6)))
    assert list(node.input[:3]) == ["q", "v", "k"]


def test_an_exponential_outside_of_the_scan() -> None:
    def step(s: Step) -> tuple[str, str]:
        g = s.g
        state = g.op("Add", g.op("Mul", s.state, s.column(s.decay)), g.op("MatMul", s.column(s.k), s.row(s.v)))
        return state, g.op("Squeeze", g.op("MatMul", s.row(s.q), state), g.ints(-2))

    model = recurrence_model("gated", step)
    (scan,) = (n for n in model.graph.node if n.op_type == "Scan")
    place = list(model.graph.node).index(scan)
    without = copy.deepcopy(model)
    assert "no exponential" in next(iter(raise_operators(without).misses.values()))
    for node in model.graph.node[:place]:
        for i, name in enumerate(node.input):
            if name == "decay":
                node.input[i] = "decay_exp"
    model.graph.node.insert(0, helper.make_node("Exp", ["decay"], ["decay_exp"], "exp"))
    (node,) = raised(model)
    assert node.input[4] == "decay"


# What is nearly LinearAttention: name -> rule, body, and what the nearest miss says.
def undecayed_retrieval(s: Step) -> tuple[str, str]:
    g = s.g
    state = g.op("Mul", s.state, g.op("Exp", s.column(s.decay)))
    found = g.op("Squeeze", g.op("MatMul", s.row(s.k), s.state), g.ints(-2))
    delta = g.op("Mul", g.op("Sub", s.v, found), s.column(s.beta))
    state = g.op("Add", state, g.op("MatMul", s.column(s.k), s.row(delta)))
    return state, g.op("Squeeze", g.op("MatMul", s.row(s.q), state), g.ints(-2))


def decay_after_update(s: Step) -> tuple[str, str]:
    state, _ = by_matmul(Step(s.g, s.state, s.q, s.k, s.v))
    state = s.g.op("Mul", state, s.g.op("Exp", s.column(s.decay)))
    return state, s.g.op("Squeeze", s.g.op("MatMul", s.row(s.q), state), s.g.ints(-2))


def reads_before(s: Step) -> tuple[str, str]:
    state, _ = by_matmul(s)
    return state, s.g.op("Squeeze", s.g.op("MatMul", s.row(s.q), s.state), s.g.ints(-2))


def scaled_state(s: Step) -> tuple[str, str]:
    scaled = s.g.op("Mul", s.state, s.g.number(0.5))
    return by_matmul(Step(s.g, scaled, s.q, s.k, s.v, s.decay, s.beta))


def scaled_update(s: Step) -> tuple[str, str]:
    g = s.g
    state = g.op("Add", s.state, g.op("Mul", g.op("MatMul", s.column(s.k), s.row(s.v)), g.number(2.0)))
    return state, g.op("Squeeze", g.op("MatMul", s.row(s.q), state), g.ints(-2))


def beta_on_values_only(s: Step) -> tuple[str, str]:
    g = s.g
    found = g.op("Squeeze", g.op("MatMul", s.row(s.k), s.state), g.ints(-2))
    delta = g.op("Sub", g.op("Mul", s.v, s.column(s.beta)), found)
    state = g.op("Add", s.state, g.op("MatMul", s.column(s.k), s.row(delta)))
    return state, g.op("Squeeze", g.op("MatMul", s.row(s.q), state), g.ints(-2))


def adds_the_value(s: Step) -> tuple[str, str]:
    state, output = by_matmul(s)
    return state, s.g.op("Add", output, s.v)


def rounds_the_state(s: Step) -> tuple[str, str]:
    state, output = by_matmul(s)
    half = s.g.op("Cast", state, to=onnx.TensorProto.FLOAT16)
    return s.g.op("Cast", half, to=onnx.TensorProto.FLOAT), output


def keys_to_queries(s: Step) -> tuple[str, str]:
    """Takes away what the query finds, not the key."""
    g = s.g
    found = g.op("Squeeze", g.op("MatMul", s.row(s.q), s.state), g.ints(-2))
    delta = g.op("Mul", g.op("Sub", s.v, found), s.column(s.beta))
    state = g.op("Add", s.state, g.op("MatMul", s.column(s.k), s.row(delta)))
    return state, g.op("Squeeze", g.op("MatMul", s.row(s.q), state), g.ints(-2))


def beta_without_delta(s: Step) -> tuple[str, str]:
    g = s.g
    row = s.row(g.op("Mul", s.v, s.column(s.beta)))
    state = g.op("Add", s.state, g.op("MatMul", s.column(s.k), row))
    return state, g.op("Squeeze", g.op("MatMul", s.row(s.q), state), g.ints(-2))


def mirrored_state(s: Step) -> tuple[str, str]:
    turned = s.g.op("Transpose", s.state, perm=[0, 1, 3, 2])
    return by_matmul(Step(s.g, turned, s.q, s.k, s.v))


def groups_first(s: Step) -> tuple[str, str]:
    """Query 1 reads the state's head 2, and query 2 head 1."""
    g = s.g
    state, _ = by_matmul(s)
    turned = g.op("Transpose", g.op("Reshape", state, g.ints(0, 2, 2, 6, 6)), perm=[0, 2, 1, 3, 4])
    read = g.op("Reshape", turned, g.ints(0, 4, 6, 6))
    return state, g.op("Squeeze", g.op("MatMul", s.row(s.q), read), g.ints(-2))


def delta_without_beta(s: Step) -> tuple[str, str]:
    g = s.g
    found = g.op("Squeeze", g.op("MatMul", s.row(s.k), s.state), g.ints(-2))
    state = g.op("Add", s.state, g.op("MatMul", s.column(s.k), s.row(g.op("Sub", s.v, found))))
    return state, g.op("Squeeze", g.op("MatMul", s.row(s.q), state), g.ints(-2))


def decays_twice(s: Step) -> tuple[str, str]:
    state = s.g.op("Mul", s.state, s.g.op("Exp", s.column(s.decay)))
    return by_matmul(Step(s.g, state, s.q, s.k, s.v, s.decay))


def output_per_key(s: Step) -> tuple[str, str]:
    state, _ = by_matmul(s)
    return state, s.g.op("Mul", state, s.column(s.q))


def output_stretched(s: Step) -> tuple[str, str]:
    state, output = by_matmul(s)
    return state, s.g.op("Expand", s.row(output), s.g.ints(1, 1, 3, 1))


def output_over_heads(s: Step) -> tuple[str, str]:
    state, output = by_matmul(s)
    return state, s.g.op("ReduceSum", output, s.g.ints(1), keepdims=1)


def decay_per_value(s: Step) -> tuple[str, str]:
    """With sizes of key and value alike, the decay of the keys put on the values."""
    g = s.g
    state = g.op("Mul", s.state, g.op("Exp", s.row(s.decay)))
    state = g.op("Add", state, g.op("MatMul", s.column(s.k), s.row(s.v)))
    return state, g.op("Squeeze", g.op("MatMul", s.row(s.q), state), g.ints(-2))


def computes_in_doubles(s: Step) -> tuple[str, str]:
    """The operator's f32 would be less."""
    wide = [s.g.op("Cast", name, to=onnx.TensorProto.DOUBLE) for name in (s.state, s.q, s.k, s.v)]
    state, output = by_matmul(Step(s.g, *wide))
    return s.g.op("Cast", state, to=SINGLE), s.g.op("Cast", output, to=SINGLE)


NEAR = {
    "takes away before the decay": ("gated_delta", undecayed_retrieval, "before the decay, not after it"),
    "decays after the update": ("gated", decay_after_update, "something else than key times value"),
    "reads before the update": ("gated", reads_before, "from the state before the update"),
    "scales the state": ("linear", scaled_state, "scales the state by 0.5 in every step"),
    "scales the gated state": ("gated_delta", scaled_state, "scales the state by 0.5 in every step"),
    "scales the update": ("linear", scaled_update, "scales what it writes by 2"),
    "beta on values only": ("delta", beta_on_values_only, "something else than what the key finds"),
    "adds the value": ("gated", adds_the_value, "sum of several products"),
    "rounds the state": ("gated_delta", rounds_the_state, "rounds the state to a smaller type|rounded"),
    "keys and queries": ("delta", keys_to_queries, "something else than what the key finds"),
    "beta without delta": ("delta", beta_without_delta, "takes nothing away, which no rule does"),
    "transposes the state": ("linear", mirrored_state, "mixes the state's axes"),
    "heads in another order": ("gated", groups_first, "with its axes merged|in another order"),
    "no beta": ("delta", delta_without_beta, "without a beta"),
    "decays twice": ("gated", decays_twice, "more than one input"),
    "an output a key": ("linear", output_per_key, "does not sum over the keys"),
    "an output stretched": ("linear", output_stretched, "of other axes than"),
    "an output over all heads": ("linear", output_over_heads, "does not sum over the keys alone"),
    "doubles": ("linear", computes_in_doubles, "another type than f32"),
    "decay per value": ("gated", decay_per_value, "neither per head nor per key"),
}


@pytest.mark.parametrize("case", NEAR)
def test_near_misses_stay_as_they_are(case: str) -> None:
    rule, step, reason = NEAR[case]
    model = recurrence_model(rule, step, Shape(q_heads=4, dk=6), per_key=step is decay_per_value)
    before = copy.deepcopy(model)
    done = raise_operators(model)
    assert not done.notes
    ((name, miss),) = done.misses.items()
    assert re.search(reason, miss), miss
    assert name in {node.name for node in model.graph.node if node.op_type == "Scan"}
    assert model == before


def test_the_error_for_a_loop_that_stays_says_what_stood_in_the_way() -> None:
    with pytest.raises(UnsupportedModelError) as error:
        compile_model(recurrence_model("gated", reads_before))
    text = str(error.value)
    assert re.search("node 'Scan_\\d+': the operator ai.onnx.Scan is not supported", text), text
    assert "it computes an output from the state before the update" in text
    assert "\n" not in text


@pytest.mark.parametrize(("size", "reason"), [("dk", "over the keys alone"), ("dv", "of size 1|values' size is 1")])
def test_heads_of_size_1_do_not_tell_which_axis_is_which(size: str, reason: str) -> None:
    model = recurrence_model("gated", shape=Shape(**{size: 1}))
    assert re.search(reason, next(iter(raise_operators(model).misses.values())))


def test_a_state_without_heads_is_not_raised() -> None:
    g, body = Graph(), Graph("body_")
    update = body.op("MatMul", body.op("Unsqueeze", "k_t", body.ints(-1)), body.op("Unsqueeze", "v_t", body.ints(-2)))
    state = body.op("Add", "state", update)
    read = body.op("MatMul", body.op("Unsqueeze", "q_t", body.ints(-2)), state)
    results = [body.op("Identity", state), body.op("Squeeze", read, body.ints(-2))]
    infos = [helper.make_tensor_value_info(n, SINGLE, None) for n in ("state", "q_t", "k_t", "v_t", *results)]
    inner = helper.make_graph(body.nodes, "step", infos[:4], infos[4:])
    g.op("Scan", "past", "q", "k", "v", outputs=["present", "y"], body=inner, num_scan_inputs=3)
    inputs = {"past": ["B", 8, 6], "q": ["T", "B", 8], "k": ["T", "B", 8], "v": ["T", "B", 6]}
    model = model_of(g, inputs, {"present": ["B", 8, 6], "y": ["T", "B", 6]})
    assert "a state of 3 axes" in next(iter(raise_operators(model).misses.values()))


def test_a_state_given_out_at_every_token_is_not_raised() -> None:
    model = recurrence_model("gated", extra=lambda step, state, output: step.g.op("Identity", state))
    assert "gives 2 outputs a token" in next(iter(raise_operators(model).misses.values()))


def test_a_loop_with_another_state_is_not_raised() -> None:
    model = recurrence_model("linear")
    scan = next(n for n in model.graph.node if n.op_type == "Scan")
    body = next(a for a in scan.attribute if a.name == "body").g
    names = [list(scan.input), list(scan.output)]
    scan.input[:], scan.output[:] = ["past", *names[0]], ["present_2", *names[1]]
    other = helper.make_tensor_value_info("state_2", SINGLE, None)
    inputs, outputs = [other, *body.input], [helper.make_tensor_value_info("next_2", SINGLE, None), *body.output]
    body.node.append(helper.make_node("Neg", ["state_2"], ["next_2"], "negative"))
    del body.input[:], body.output[:]
    body.input.extend(inputs)
    body.output.extend(outputs)
    assert "carries 2 states" in next(iter(raise_operators(model).misses.values()))


@pytest.mark.parametrize("scale", [0.0, 1e-60, float("inf")])
def test_a_scale_that_the_operator_reads_otherwise_is_not_raised(scale: float) -> None:
    """A scale of 0 is the operator's word for 1/sqrt(dk)."""
    model = recurrence_model("gated", scale=scale)
    before = copy.deepcopy(model)
    assert "scales its output by" in next(iter(raise_operators(model).misses.values()))
    assert model == before


def test_backwards_is_not_raised() -> None:
    model = recurrence_model("linear", scan={"scan_input_directions": [1, 1, 1]})
    assert "from the last token to the first" in next(iter(raise_operators(model).misses.values()))


def test_values_that_the_model_has_already_are_not_overwritten() -> None:
    model = recurrence_model("gated", repeat="before", value_first=True)
    name = next(n.name for n in model.graph.node if n.op_type == "Scan")
    taken = [
        f"{name}.raised",
        f"{name}.state",
        *(f"{name}.{op}_{i}.out" for op in ("Reshape", "Transpose") for i in range(9)),
    ]
    taken += [f"{name}.shape_{i}" for i in range(9)]
    for value in taken:
        model.graph.node.append(helper.make_node("Neg", ["q"], [value], value.removesuffix(".out")))
        model.graph.output.append(helper.make_tensor_value_info(value, SINGLE, ["B", "T", 16]))
    raised(model)
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)


def test_two_scans_of_one_state_are_raised_and_refused_as_states() -> None:
    model = recurrence_model("gated_delta")
    first = next(n for n in model.graph.node if n.op_type == "Scan")
    second = copy.deepcopy(first)
    second.name, second.output[:] = "second", ["present_2", "tokens_2"]
    place = list(model.graph.node).index(first)
    model.graph.node.insert(place + 1, second)
    present = model.graph.output[1].type.tensor_type
    model.graph.output.append(helper.make_tensor_value_info("present_2", present.elem_type, ["B", 4, 8, 6]))
    model.graph.output.append(helper.make_tensor_value_info("tokens_2", present.elem_type, ["T", "B", 4, 6]))
    assert len(raised(model)) == 2
    with pytest.raises(UnsupportedModelError, match="state of two nodes"):
        find_states(model.graph)


def test_a_state_that_others_read_too_is_still_theirs() -> None:
    model = recurrence_model("gated_delta")
    model.graph.node.append(helper.make_node("Neg", ["past"], ["negative"], "reader"))
    model.graph.node.append(helper.make_node("Abs", ["present"], ["absolute"], "other_reader"))
    for name, dims in (("negative", ["B", 4, 8, 6]), ("absolute", ["B", 4, 8, 6]), ("tokens_out", ["T", "B", 4, 6])):
        model.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims))
    raised(model)


def test_what_is_raised_computes_the_same_whatever_the_body() -> None:
    """Bodies with an operator, an operand or an axis changed: either left alone, or equal in ONNX Runtime."""
    count = 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        rule, step = RULES[seed % 4], (by_matmul, by_sums, by_einsum)[seed // 4 % 3]
        model = recurrence_model(rule, step, Shape(q_heads=4, heads=4, dk=4, dv=4), per_key=bool(seed % 2), scale=1.0)
        scan = next(n for n in model.graph.node if n.op_type == "Scan")
        body = next(a for a in scan.attribute if a.name == "body").g
        before = body.SerializeToString()
        mutate(body, rng)
        feeds = feeds_of(model, {"B": 4, "T": 4})
        try:
            want = run(model, feeds)
        except Exception:  # a body that ONNX Runtime refuses says nothing
            continue
        if not raise_operators(model).notes:
            continue
        count += body.SerializeToString() != before
        for name, value in run(model, feeds).items():
            assert error(value, want[name]) <= BENIGN["float32"], f"seed {seed}, {name}"
    assert count >= 3  # changes that mean the same, such as operands of a sum in the other order


@pytest.mark.parametrize(
    "build",
    [lambda: recurrence_model("gated_delta"), lambda: convolution_model(Form()), step_model, value_model, scan_model],
)
def test_damaged_loops_end_in_one_line(build: Callable[[], onnx.ModelProto], monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass sees graphs that nobody has specialised yet, and bodies that nothing else looks into."""
    monkeypatch.setattr(compiler, "Compiler", stop)
    refused: list[str] = []
    for seed in range(24):
        rng = random.Random(seed)
        model = build()
        bodies = [a.g for n in model.graph.node for a in n.attribute if a.name == "body"]
        with suppress(IndexError, ValueError):  # nothing of that kind to damage
            rng.choice(DAMAGES)(rng, rng.choice([model.graph, *bodies]))
        try:
            compile_model(model, CompileOptions(prefill_blocks=(4,)))
        except LinattnError as error:
            refused.append(str(error))
        except Planned:
            pass
    assert refused
    assert not [text for text in refused if "\n" in text or "bug in linattn" in text]


def mutate(body: onnx.GraphProto, rng: np.random.Generator) -> None:
    nodes = [n for n in body.node if n.op_type not in ("Constant", "Identity")]
    node = nodes[rng.integers(len(nodes))]
    place = list(body.node).index(node)
    known = [v.name for v in body.input] + [n.output[0] for n in body.node[:place] if n.op_type != "Constant"]
    kind = rng.integers(4)
    if kind == 0 and node.op_type in ("Add", "Sub", "Mul"):
        node.op_type = ("Add", "Sub", "Mul")[rng.integers(3)]
    elif kind == 1 and len(node.input) > 1:
        first, second = node.input[0], node.input[1]
        node.input[0], node.input[1] = second, first
    elif kind == 2:
        node.input[0] = known[rng.integers(len(known))]
    else:
        constants = [n for n in body.node if n.op_type == "Constant"]
        if constants:
            constant = constants[rng.integers(len(constants))]
            constant.attribute[0].ints[0] = int(rng.integers(-3, 3))
