"""What stands around attention goes into its kernels, for one token on a GPU that sums by subgroups."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from linattn.dialect_patterns.op import MICROSOFT
from linattn.dialect_patterns.target import Limits, Target
from linattn.frontend.graph.join_attention import join_attention
from linattn.frontend.graph.schema import infer_types
from linattn.frontend.graph.specialize import SpecializedGraph
from onnx import TensorProto, helper, numpy_helper

GPU = Target("vulkan", is_gpu=True, subgroup_size=8)
HEADS, SIZE, ROWS = {"q": 4, "k": 2}, 16, 12
CACHE = [1, HEADS["k"], ROWS, SIZE]


class Layer:
    """A layer's heart, as onnxruntime-genai writes Qwen3.5's.

    Args:
        tokens: T.
        rotary: The operator that rotates.
        norm: Those that are normed.
        gate: Whether there is a gate.
        parts: Whether queries and gates lie in one value head by head.
        sinks: Whether attention has sinks.
        half: Whether all is in f16 but for the rotation, which is in f32.
    """

    def __init__(
        self, tokens: int = 1, rotary: str = "MRotaryEmbedding", norm: str = "qk", gate: bool = True,
        parts: bool = True, sinks: bool = False, half: bool = False,
    ) -> None:  # fmt: skip
        self.nodes: list[onnx.NodeProto] = []
        self.weights = {"gamma": np.ones(SIZE, np.float32), "last": np.zeros(1, np.int32), "all": np.array(1, np.int32)}
        self.weights |= {name: np.ones((40, 4), np.float32) for name in ("cos", "sin")}
        wide = [1, tokens, HEADS["q"] * SIZE]
        self.shapes: dict[str, Any] = {"q": wide, "gate": wide}
        for name in "kv":
            self.shapes[name] = [1, tokens, HEADS["k"] * SIZE]
        if parts:
            self.shapes = {"both": [1, tokens, 2 * wide[2]]} | {k: v for k, v in self.shapes.items() if k in "kv"}
            self.reshape("both", "apart", [1, tokens, HEADS["q"], 2 * SIZE])
            self.add(
                "Split", ["apart", self.weight("halves", np.array([SIZE, SIZE]))], ["q.part", "gate.part"], axis=-1
            )
            self.reshape("q.part", "q", wide)
            self.reshape("gate.part", "gate", wide)
        self.shapes |= {"past_k": CACHE, "past_v": CACHE}
        for name in "qk":
            source, flat = name, [1, tokens, HEADS[name] * SIZE]
            if name in norm:
                self.reshape(name, f"{name}.heads", [tokens, HEADS[name], SIZE])
                self.add("SimplifiedLayerNormalization", [f"{name}.heads", "gamma"], [f"{name}.norm"], axis=-1)
                source = self.reshape(f"{name}.norm", f"{name}.normed", flat)
            turning: dict[str, Any] = {"num_heads": HEADS[name], "rotary_embedding_dim": 8}
            if rotary == "MRotaryEmbedding":
                turning |= {"mrope_section": [2, 1, 1], "mrope_layout": 1}
            if half:
                self.add("Cast", [source], [f"{name}.wide"], to=TensorProto.FLOAT)
                source = f"{name}.wide"
            turned = f"{name}.turned" + (".wide" if half else "")
            self.add(rotary, [source, "ids", "cos", "sin"], [turned], MICROSOFT, **turning)
            if half:
                self.add("Cast", [turned], [f"{name}.turned"], to=TensorProto.FLOAT16)
        pasts = ["past_k", "past_v", "last", "all"]
        others = ["", "", "", "", self.weight("sinks", np.zeros(HEADS["q"], np.float32))] if sinks else []
        counts = {"num_heads": HEADS["q"], "kv_num_heads": HEADS["k"], "local_window_size": 5, "linattn.capacity": 1}
        outputs = ["y", "present_k", "present_v"]
        self.add("GroupQueryAttention", ["q.turned", "k.turned", "v", *pasts, *others], outputs, MICROSOFT, **counts)
        if gate:
            self.add("Sigmoid", ["gate"], ["open"])
            self.add("Mul", ["y", "open"], ["gated"])
        self.kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        self.weights["gamma"] = np.ones(SIZE, np.float16 if half else np.float32)
        self.streams = [3, 1, tokens] if rotary == "MRotaryEmbedding" else [1, tokens]
        self.results = ["gated" if gate else "y", *outputs[1:]]

    def add(self, kind: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> None:
        self.nodes.append(helper.make_node(kind, inputs, outputs, outputs[0], domain=domain, **attributes))

    def weight(self, name: str, values: np.ndarray) -> str:
        self.weights[name] = values
        return name

    def reshape(self, source: str, name: str, shape: list[int]) -> str:
        self.add("Reshape", [source, self.weight(f"{name}.shape", np.array(shape))], [name])
        return name

    def graph(self) -> SpecializedGraph:
        values = [helper.make_tensor_value_info(name, self.kind, shape) for name, shape in self.shapes.items()]
        values.append(helper.make_tensor_value_info("ids", TensorProto.INT64, self.streams))
        results = [helper.make_tensor_value_info(name, self.kind, None) for name in self.results]
        weights = [numpy_helper.from_array(array, name) for name, array in self.weights.items()]
        proto = helper.make_graph(self.nodes, "g", values, results, weights)
        model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 22), helper.make_opsetid(MICROSOFT, 1)])
        types = infer_types(model)
        for name in ("present_k", "present_v"):  # as for a cache of fixed capacity
            types[name] = helper.make_tensor_type_proto(self.kind, CACHE)
        return SpecializedGraph(model, types)


def joined(layer: Layer, target: Target = GPU) -> list[onnx.NodeProto]:
    source = layer.graph()
    before = source.proto.SerializeToString()
    found = join_attention(source, {"": 22, MICROSOFT: 1}, target)
    assert source.proto.SerializeToString() == before
    return list(found.proto.graph.node)


def step_of(layer: Layer) -> tuple[list[str], dict[str, Any]]:
    (node,) = [node for node in joined(layer) if node.op_type == "AttentionStep"]
    assert node.name == "y"
    assert list(node.output) == layer.results
    return list(node.input), {one.name: helper.get_attribute_value(one) for one in node.attribute}


def test_all_of_it_is_one_node() -> None:
    assert [node.op_type for node in joined(Layer())] == ["AttentionStep"]
    inputs, given = step_of(Layer())
    assert inputs == ["both", "k", "v", "past_k", "past_v", "ids", "cos", "sin", "gamma", "gamma", "both"]
    assert (given["query_start"], given["query_stride"], given["gate_start"], given["gate_stride"]) == (0, 32, 16, 32)
    assert (given["sections"], given["interleaved_sections"], given["rotated"]) == ([2, 1, 1], 1, 8)
    assert (given["left"], given["scale"], given["num_heads"]) == (4, 0.25, 4)


def test_parts_of_it() -> None:
    """No norms, no gate, values of their own, one stream of positions."""
    inputs, given = step_of(Layer(norm="", gate=False, parts=False, rotary="RotaryEmbedding"))
    assert inputs == ["q", "k", "v", "past_k", "past_v", "ids", "cos", "sin", "", ""]
    assert (given["query_start"], given["query_stride"], "sections" in given) == (0, 16, False)
    inputs, given = step_of(Layer(parts=False))
    assert (inputs[0], inputs[10], given["gate_start"], given["gate_stride"]) == ("q", "gate", 0, 16)
    assert step_of(Layer(half=True)) == step_of(Layer())


def test_what_others_read_is_computed_for_them() -> None:
    layer = Layer()
    layer.results = ["y", *layer.results[1:]]
    assert step_of(layer)[0][10:] == []  # attention before its gate is an output
    layer = Layer()
    layer.results.append("k.turned")
    nodes = [node.op_type for node in join_attention(layer.graph(), {"": 22, MICROSOFT: 1}, GPU).proto.graph.node]
    assert nodes.count("AttentionStep") == nodes.count("MRotaryEmbedding") == 1


@pytest.mark.parametrize(
    ("layer", "target"),
    [
        (Layer(2), GPU),
        (Layer(norm="q"), GPU),
        (Layer(sinks=True), GPU),
        (Layer(), Target("cpu", vector_bits=256)),
        (Layer(), Target("vulkan", is_gpu=True)),
        (Layer(), Target("vulkan", is_gpu=True, subgroup_size=32)),  # heads smaller than a subgroup
        (Layer(), Target("vulkan", is_gpu=True, subgroup_size=8, limits=Limits(bindings=10))),
    ],
)
def test_left_alone(layer: Layer, target: Target) -> None:
    assert [node.op_type for node in joined(layer, target)] == [node.op_type for node in layer.nodes]
