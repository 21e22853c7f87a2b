"""Convolutions that spell CausalConvWithState out become it, with ONNX Runtime's outputs; others stay."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from linattn.frontend.graph.raising.raise_operators import raise_operators
from linattn.frontend.graph.states import find_states
from linattn.frontend.graph.validate import check_graph
from onnx import TensorProto, helper

from tests.spelled_out import Graph, feeds_of, inlined, model_of, operator_model, run
from tests.tolerances import BENIGN, error

CHANNELS, TAPS = 6, 4


def raised(model: onnx.ModelProto, tokens: int = 5) -> onnx.NodeProto:
    """The CausalConvWithState that a model has after the pass, which must not change what it computes."""
    before = copy.deepcopy(model)
    (note,) = raise_operators(model).notes
    assert note.startswith("raised: Conv '")
    check_graph(model)
    feeds = feeds_of(model, {"B": 2, "T": tokens})
    want, got = run(before, feeds), run(model, feeds)
    for name, value in want.items():
        assert error(got[name], value) <= BENIGN[value.dtype.name], name
    (node,) = (n for n in model.graph.node if n.op_type == "CausalConvWithState")
    return node


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


@dataclass(frozen=True)
class Form:
    """How a convolution is spelled out.

    Attributes:
        held: Columns of the state.
        bias: ``""``, ``port`` of Conv or ``add``.
        activation: ``""``, ``mul`` or ``swish``.
        first: Start of the next state's Slice: ``computed`` or a number.
        last: End of it: ``computed`` or a number.
        skip: Columns of the convolution left out, with a state that has more than it needs.
        more: Attributes of Conv.
    """

    held: int = TAPS - 1
    bias: str = "add"
    activation: str = "mul"
    first: int | str = "computed"
    last: int | str = "computed"
    skip: int | None = None
    more: tuple[tuple[str, Any], ...] = ()


def convolution_model(form: Form) -> onnx.ModelProto:
    """As mobius writes it: Concat, Slice, Conv, Add, Sigmoid, Mul."""
    g = Graph()
    rng = np.random.default_rng(0)
    weight = g.weight("weight", rng.normal(size=(CHANNELS, 1, TAPS)).astype(np.float32))
    bias = g.weight("bias", rng.normal(size=CHANNELS).astype(np.float32))
    whole = g.op("Concat", "past", "x", axis=2)
    length = g.op("Gather", g.op("Shape", whole), g.op("Constant", value_int=2), axis=0)
    ends: dict[str, str] = {}
    for name, value in (("first", form.first), ("last", form.last)):
        size = length if name == "last" else g.op("Sub", length, g.op("Constant", value_int=form.held))
        ends[name] = g.op("Reshape", size, g.ints(1)) if value == "computed" else g.ints(int(value))
    g.op("Slice", whole, ends["first"], ends["last"], g.ints(2), outputs=["present"])
    more = {"group": CHANNELS, "kernel_shape": [TAPS], **dict(form.more)}
    y = g.op("Conv", whole, weight, *([bias] if form.bias == "port" else []), **more)
    if form.skip is not None:
        y = g.op("Slice", y, g.ints(form.skip), g.ints(1 << 40), g.ints(-1))
    if form.bias == "add":
        y = g.op("Add", y, g.op("Reshape", bias, g.ints(1, -1, 1)))
    if form.activation == "mul":
        y = g.op("Mul", g.op("Sigmoid", y), y)
    elif form.activation == "swish":
        y = g.op("Swish", y)
    g.op("Neg", y, outputs=["y"])
    inputs = {"past": ["B", CHANNELS, form.held], "x": ["B", CHANNELS, "T"]}
    return model_of(g, inputs, {"y": ["B", CHANNELS, "T2"], "present": ["B", CHANNELS, form.held]})


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize(
    "form",
    [
        Form(),
        Form(bias="port", activation=""),
        Form(bias="", activation="mul"),
        Form(first=-3, last=(1 << 63) - 1),
        Form(more=(("dilations", [2]),), held=6),
        Form(held=4, skip=1),
        Form(held=5, skip=2, first=-5, bias="port"),
    ],
)
def test_every_spelling(form: Form, tokens: int) -> None:
    model = convolution_model(form)
    node = raised(model, tokens)
    assert attributes(node).get("activation", b"none") == (b"silu" if form.activation else b"none")
    assert list(node.input)[:3] == ["x", "weight", "bias" if form.bias else ""]
    (pair,) = find_states(model.graph)
    assert (pair.past, pair.present, pair.node) == ("past", "present", node.name)
    # Nothing is left of what it replaces, but for the columns of a longer state.
    longer = ["Slice", "Concat", "Slice", "Concat"] if form.skip else []
    assert sorted(n.op_type for n in model.graph.node) == sorted(["CausalConvWithState", "Neg", *longer])


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16])
@pytest.mark.parametrize("past", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["none", "silu", "swish"])
def test_the_body_that_onnx_defines_the_operator_with(activation: str, bias: bool, past: bool, dtype: int) -> None:
    inputs = {
        "x": (dtype, ["B", CHANNELS, "T"]),
        "weight": (dtype, [CHANNELS, 1, TAPS]),
        "bias" if bias else "-bias": (dtype, [CHANNELS]),
        "past" if past else "-past": (dtype, ["B", CHANNELS, TAPS - 1]),
    }
    outputs = {"y": (dtype, ["B", CHANNELS, "T"]), "present": (dtype, ["B", CHANNELS, TAPS - 1])}
    model = inlined(operator_model("CausalConvWithState", inputs, outputs, activation=activation))
    node = raised(model)
    assert attributes(node).get("activation", b"none") == (b"none" if activation == "none" else b"silu")
    assert [n for n in node.input if n] == [n for n in inputs if not n.startswith("-")]
    assert [n.op_type for n in model.graph.node][:1] == ["CausalConvWithState"]


NEAR = {
    "a state of one column less": (Form(held=2), "reads 2 columns of state, where 4 taps need 3"),
    "the next state one column early": (Form(first=-4, last=-1), "takes others than its last 3 columns"),
    "the next state one column short": (Form(first=-2, last=1 << 40), "takes others than its last 3 columns"),
    "padding besides the state": (Form(more=(("pads", [1, 0]),)), "pads its input"),
    "strides": (Form(more=(("strides", [2]),)), "leaves out columns"),
    "a longer state, columns left in": (Form(held=4, bias="port"), "keeps columns from before the input"),
    "a longer state, the wrong columns": (Form(held=5, skip=1), "does not take the input's columns"),
}


@pytest.mark.parametrize("case", NEAR)
def test_near_misses_stay_as_they_are(case: str) -> None:
    form, reason = NEAR[case]
    model = convolution_model(form)
    before = copy.deepcopy(model)
    (note,) = raise_operators(model).notes
    assert note.startswith("not raised: Conv '")
    assert reason in note
    assert model == before


def test_a_value_that_others_read_stays_outside() -> None:
    """The activation is another reader's business where the sum before it is an output as well."""
    model = convolution_model(Form())
    add = next(n for n in model.graph.node if n.op_type == "Add")
    model.graph.output.append(helper.make_tensor_value_info(add.output[0], TensorProto.FLOAT, ["B", CHANNELS, "T3"]))
    assert "activation" not in attributes(raised(model))


def test_kernels_shared_between_channels_stay() -> None:
    model = convolution_model(Form(bias="", more=(("group", CHANNELS // 2),)))
    model.graph.initializer[0].CopyFrom(
        onnx.numpy_helper.from_array(np.ones((CHANNELS, 2, TAPS), np.float32), "weight")
    )
    assert "has no kernel of its own for each channel" in raise_operators(model).notes[0]


def test_what_is_concatenated_in_another_way_stays() -> None:
    model = convolution_model(Form())
    concat = next(n for n in model.graph.node if n.op_type == "Concat")
    concat.input.append("x")
    assert "a Concat of 3 values" in raise_operators(model).notes[0]
    model = convolution_model(Form(bias="", activation=""))
    next(n for n in model.graph.node if n.op_type == "Concat").attribute[0].i = 0
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B2", CHANNELS, "T2"]))
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[2].dim_value = 3
    assert "along another axis" in raise_operators(model).notes[0]


def test_two_convolutions_of_one_state_stay() -> None:
    """One state cannot be the state of two operators."""
    model = convolution_model(Form(bias="", activation=""))
    first = next(n for n in model.graph.node if n.op_type == "Conv")
    second = copy.deepcopy(first)
    second.name, second.output[0] = "second", "y2"
    model.graph.node.append(second)
    model.graph.output.append(helper.make_tensor_value_info("y2", TensorProto.FLOAT, ["B", CHANNELS, "T3"]))
    before = copy.deepcopy(model)
    notes = raise_operators(model).notes
    assert len(notes) == 2
    assert all("another Conv reads too" in note for note in notes)
    assert model == before


def test_a_kernel_that_is_computed_from_the_state_stays() -> None:
    """Its operator would have to run before itself."""
    model = convolution_model(Form(bias="", activation=""))
    model.graph.initializer[0].name = "other"
    place = next(i for i, n in enumerate(model.graph.node) if n.op_type == "Conv")
    model.graph.node.insert(place, helper.make_node("ReduceMax", ["present"], ["most"], "most", keepdims=0))
    model.graph.node.insert(place + 1, helper.make_node("Mul", ["most", "other"], ["weight"], "computed"))
    assert "computed from its state" in raise_operators(model).notes[0]
    model = convolution_model(Form(activation=""))
    (reshape,) = (n for n in model.graph.node if n.op_type == "Reshape" and n.input[0] == "bias")
    reshape.input[0] = "sum"
    place = list(model.graph.node).index(reshape)
    model.graph.node.insert(place, helper.make_node("ReduceMax", ["present"], ["most"], "most", keepdims=0))
    model.graph.node.insert(place + 1, helper.make_node("Mul", ["most", "bias"], ["sum"], "computed"))
    assert list(raised(model).input)[:3] == ["x", "weight", ""]


def test_a_bias_of_several_rows_is_no_bias() -> None:
    """[2, C, 1] is another one for each row of the batch: the sum stays."""
    model = convolution_model(Form(activation=""))
    (reshape,) = (n for n in model.graph.node if n.op_type == "Reshape" and n.input[0] == "bias")
    rows = np.random.default_rng(1).normal(size=(2, CHANNELS, 1)).astype(np.float32)
    model.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(rows, reshape.output[0]))
    model.graph.node.remove(reshape)
    node = raised(model)
    assert list(node.input)[:3] == ["x", "weight", ""]
    assert "Add" in {n.op_type for n in model.graph.node}


def test_doubles_stay() -> None:
    model = convolution_model(Form())
    for tensor in model.graph.initializer:
        tensor.CopyFrom(
            onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float64), tensor.name)
        )
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.DOUBLE
    assert "other types than f32" in raise_operators(model).notes[0]
