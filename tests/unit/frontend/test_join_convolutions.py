"""The convolution goes into the kernel of LinearAttention, for one token on a GPU that sums by subgroups."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from linattn.dialect_patterns.op import INTERNAL, MICROSOFT, LoweringOptions
from linattn.dialect_patterns.target import Limits, Target
from linattn.frontend.graph.internal import import_internal
from linattn.frontend.graph.join_convolutions import join_convolutions
from linattn.frontend.graph.schema import infer_types
from linattn.frontend.graph.specialize import SpecializedGraph
from onnx import TensorProto, helper, numpy_helper

GPU = Target("vulkan", is_gpu=True, subgroup_size=32)
HEADS, SIZE, TAPS = 2, 16, 4
WIDTH = HEADS * SIZE
CHANNELS = 3 * WIDTH


class Layer:
    """A layer's heart, whose gates are joined.

    Args:
        order: Which parts of the convolution are queries, keys and values.
        dilation: Of the convolution.
        moved: Whether a transpose and its inverse stand around the convolution.
        kept: A value that is an output, too.
    """

    def __init__(
        self, order: str = "qkv", dilation: int = 1, moved: bool = True, kept: str = "", gates: int = 1
    ) -> None:
        self.weights = {"weight": np.ones((CHANNELS, 1, TAPS), np.float32), "bias": np.zeros(CHANNELS, np.float32)}
        self.weights |= {"widths": np.array([WIDTH] * 3), "rate": -np.ones(HEADS, np.float32)}
        self.nodes: list[onnx.NodeProto] = []
        x = "row"
        if moved:
            self.add("Transpose", ["row"], ["column"], perm=[0, 2, 1])
            x = "column"
        conv = {"activation": "silu"} | ({"dilation": dilation} if dilation > 1 else {})
        domain = "" if dilation > 1 else MICROSOFT
        self.add("CausalConvWithState", [x, "weight", "bias", "past_conv"], ["mixed", "present_conv"], domain, **conv)
        if moved:
            self.add("Transpose", ["mixed"], ["back"], perm=[0, 2, 1])
        self.add("Split", ["back" if moved else "mixed", "widths"], list(order), axis=-1 if moved else 1)
        names = list("qkv")
        if not moved:
            for i, name in enumerate(names):
                self.add("Transpose", [name], [f"{name}.row"], perm=[0, 2, 1])
                names[i] = f"{name}.row"
        rest = ["a", "b", "rate", "rate"] if gates else ["a", "b"]
        rule = {"q_num_heads": HEADS, "kv_num_heads": HEADS, "query_norm": 1, "key_norm": 1, "scale": 0.5}
        inputs, outputs = [*names, "past", *rest], ["y", "present"]
        self.add("GatedLinearAttention", inputs, outputs, INTERNAL, **rule)
        self.row = [1, 1, CHANNELS] if moved else [1, CHANNELS, 1]
        self.results, self.length = ["y", "present", "present_conv", *([kept] if kept else [])], (TAPS - 1) * dilation

    def add(self, kind: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> None:
        self.nodes.append(helper.make_node(kind, inputs, outputs, outputs[0], domain=domain, **attributes))

    def graph(self) -> SpecializedGraph:
        shapes = {"row": self.row, "past_conv": [1, CHANNELS, self.length], "past": [1, HEADS, SIZE, SIZE]}
        shapes |= {name: [1, 1, HEADS] for name in "ab"}
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
        results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self.results]
        weights = [numpy_helper.from_array(array, name) for name, array in self.weights.items()]
        proto = helper.make_graph(self.nodes, "g", values, results, weights)
        model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 27), helper.make_opsetid(MICROSOFT, 1)])
        import_internal(model)
        return SpecializedGraph(model, infer_types(model))


def joined(layer: Layer, target: Target = GPU) -> list[onnx.NodeProto]:
    source = layer.graph()
    before = source.proto.SerializeToString()
    found = join_convolutions(source, {"": 27, MICROSOFT: 1, INTERNAL: 1}, target, LoweringOptions())
    assert source.proto.SerializeToString() == before
    return list(found.proto.graph.node)


@pytest.mark.parametrize("moved", [True, False])
def test_both_are_one_node(moved: bool) -> None:
    node = joined(Layer(moved=moved))[-1]
    assert (node.op_type, node.name) == ("ConvolvedLinearAttention", "y")
    start = "column" if moved else "row"
    assert list(node.input) == [start, "weight", "bias", "past_conv", "past", "a", "b", "rate", "rate"]
    assert list(node.output) == ["y", "present", "present_conv"]
    given = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    assert (given["key_heads"], given["activation"], given["scale"]) == (HEADS, b"silu", 0.5)


@pytest.mark.parametrize(
    ("layer", "target"),
    [
        (Layer(order="kqv"), GPU),
        (Layer(kept="mixed"), GPU),
        (Layer(kept="q"), GPU),
        (Layer(), Target("cpu", vector_bits=256)),
        (Layer(), Target("vulkan", is_gpu=True)),
        (Layer(), Target("vulkan", is_gpu=True, subgroup_size=32, limits=Limits(bindings=11))),
    ],
)
def test_left_alone(layer: Layer, target: Target) -> None:
    assert [node.op_type for node in joined(layer, target)] == [node.op_type for node in layer.nodes]
