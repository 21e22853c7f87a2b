"""Mixtures of experts as mobius writes them, every expert computed and masked, become one node for the chosen ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from linattn.frontend import CompileOptions
from linattn.frontend.compile import compile_model
from linattn.runtime import Program
from onnx import TensorProto, helper, numpy_helper

from tests.tolerances import BENIGN, error

EXPERTS, CHOSEN, HIDDEN, INNER = 6, 2, 32, 48


class Graph:
    """A graph as it grows."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(0)

    def op(self, op_type: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> str:
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        node = helper.make_node(op_type, list(inputs), names, f"n{len(self.nodes)}", domain=domain)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.nodes.append(node)
        return names[-1] if outputs == 1 else names[0]

    def constant(self, value: Any) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(value), f"c{len(self.weights)}"))
        return self.weights[-1].name

    def linear(self, x: str, depth: int, columns: int, bits: int = 0, *, turned: bool = False) -> str:
        if bits:
            blocks = depth // 16
            packed = self.random.integers(0, 256, (columns, blocks, 16 * bits // 8)).astype(np.uint8)
            scales = (self.random.random((columns, blocks)) * 0.02).astype(np.float32)
            zeros = self.random.integers(0, 256, (columns, -(-blocks * bits // 8))).astype(np.uint8)
            given = [self.constant(value) for value in (packed, scales, zeros)]
            return self.op(
                "MatMulNBits", x, *given, domain="com.microsoft", K=depth, N=columns, bits=bits, block_size=16
            )
        values = (self.random.standard_normal((depth, columns)) / np.sqrt(depth)).astype(np.float32)
        if not turned:
            return self.op("MatMul", x, self.constant(values))
        return self.op("MatMul", x, self.op("Transpose", self.constant(np.ascontiguousarray(values.T)), perm=[1, 0]))

    def sliced(self, x: str, weights: str, number: int) -> str:
        """By one expert of weights [E, N, K], as Granite's hybrid models have them."""
        one = self.op("Gather", weights, self.constant(np.array([number])), axis=0)
        return self.op("MatMul", x, self.op("Transpose", self.op("Squeeze", one, self.constant(np.array([0])))))

    def activated(self, kind: str, value: str) -> str:
        if kind == "silu":
            return self.op("Mul", value, self.op("Sigmoid", value))
        if kind == "gelu":
            return self.op("Gelu", value, approximate="tanh")
        relu = self.op("Relu", value)
        return self.op("Mul", relu, relu) if kind == "relu2" else relu


def mixture(
    activation: str, *, gated: bool, bits: int = 0, turned: bool = False, twice: bool = False
) -> onnx.ModelProto:
    """Routing by the softmax of all logits; ``twice`` adds the last expert two times."""
    g = Graph()
    probs = g.op("Softmax", g.linear("x", HIDDEN, EXPERTS), axis=-1)
    weights = g.op("TopK", probs, g.constant(np.array([CHOSEN])), outputs=2, axis=-1)
    chosen = weights[:-1] + "1"
    weights = g.op("Div", weights, g.op("ReduceSum", weights, g.constant(np.array([-1])), keepdims=1))
    result = ""
    for number in [*range(EXPERTS), *([EXPERTS - 1] if twice else [])]:
        hidden = g.activated(activation, g.linear("x", HIDDEN, INNER, bits, turned=turned))
        if gated:
            hidden = g.op("Mul", hidden, g.linear("x", HIDDEN, INNER, bits, turned=turned))
        value = g.linear(hidden, INNER, HIDDEN, bits, turned=turned)
        mask = g.op("CastLike", g.op("Equal", chosen, g.constant(np.int64(number))), weights)
        factor = g.op("ReduceSum", g.op("Mul", weights, mask), g.constant(np.array([-1])), keepdims=1)
        part = g.op("Mul", value, factor)
        result = part if not result else g.op("Add", result, part)
    g.op("Add", result, "x")
    g.nodes[-1].output[0] = "y"
    shape = [1, "tokens", HIDDEN]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    graph = helper.make_graph(g.nodes, "mixture", values[:1], values[1:], g.weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def stacked_mixture() -> onnx.ModelProto:
    """Weights of all experts in one array, gate and factor in one product; the model has chosen, maybe wrongly."""
    g, result = Graph(), ""
    first, second = (
        g.constant((g.random.standard_normal((EXPERTS, n, k)) / np.sqrt(k)).astype(np.float32))
        for n, k in ((2 * INNER, HIDDEN), (HIDDEN, INNER))
    )
    for number in range(EXPERTS):
        gate = g.op("Split", g.sliced("x", first, number), outputs=2, axis=-1, num_outputs=2)
        value = g.sliced(g.op("Mul", g.activated("silu", gate), gate[:-1] + "1"), second, number)
        mask = g.op("CastLike", g.op("Equal", "chosen", g.constant(np.int64(number))), "weights")
        factor = g.op("ReduceSum", g.op("Mul", "weights", mask), g.constant(np.array([-1])), keepdims=1)
        part = g.op("Mul", value, factor)
        result = part if not result else g.op("Add", result, part)
    g.nodes[-1].output[0] = "y"
    shapes = {"x": HIDDEN, "chosen": CHOSEN, "weights": CHOSEN, "y": HIDDEN}
    values = [
        helper.make_tensor_value_info(name, TensorProto.INT64 if name == "chosen" else TensorProto.FLOAT, [1, 4, size])
        for name, size in shapes.items()
    ]
    graph = helper.make_graph(g.nodes, "mixture", values[:3], values[3:], g.weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("target", ["cpu", pytest.param("vulkan", marks=pytest.mark.vulkan)])
def test_numbers_that_are_no_experts_count_nothing(target: str) -> None:
    model = stacked_mixture()
    compiled = compile_model(model, CompileOptions(target=target))
    assert any("1 mixtures of experts" in note for note in compiled.report.notes), compiled.report.notes
    random = np.random.default_rng(1)
    feeds = {
        "x": random.standard_normal((1, 4, HIDDEN)).astype(np.float32),
        "chosen": np.array([[[0, 5], [-1, 3], [EXPERTS, 2], [2**40, -(2**40)]]]),
        "weights": random.random((1, 4, CHOSEN)).astype(np.float32),
    }
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (want,) = session.run(None, feeds)
    assert error(Program.load(compiled.module, device=target).run(feeds)["y"], want) < BENIGN["float32"]


def agrees(model: onnx.ModelProto, tokens: int, target: str = "cpu") -> list[str]:
    """Compares with ONNX Runtime; the report's lines."""
    compiled = compile_model(model, CompileOptions(target=target, prefill_blocks=(8,)))
    program = Program.load(compiled.module, device=target)
    x = np.random.default_rng(1).standard_normal((1, tokens, HIDDEN)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (want,) = session.run(None, {"x": x})
    assert error(program.run({"x": x})["y"], want) < BENIGN["float32"]
    return [*compiled.report.notes, *compiled.report.others]


@pytest.mark.parametrize(
    ("activation", "gated", "bits", "turned", "tokens"),
    [
        ("silu", True, 0, True, 8),
        ("silu", True, 4, False, 1),
        ("relu2", False, 0, False, 1),
        ("gelu", True, 8, False, 8),
    ],
)
def test_one_node(activation: str, gated: bool, bits: int, turned: bool, tokens: int) -> None:
    notes = agrees(mixture(activation, gated=gated, bits=bits, turned=turned), tokens)
    assert any("1 mixtures of experts" in note for note in notes), notes
    assert any("ChosenExperts: fused_simd" in note for note in notes), notes
    assert sum("MatMul" in note for note in notes) <= 1, notes  # the router's


@pytest.mark.vulkan
def test_vulkan() -> None:
    assert any("ChosenExperts: fused_simt" in note for note in agrees(mixture("silu", gated=True), 8, "vulkan"))


def test_near_miss() -> None:
    """An expert that counts twice is left as it is, with the reason."""
    notes = agrees(mixture("relu", gated=False, twice=True), 8)
    assert any("does not add each expert once" in note for note in notes), notes
