"""The ONNX models of the bench: one node, a chain of nodes, and the small ones behind overhead and ceilings."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from linattn.runtime.device import HostArray

from .cases import Case
from .lazy import compiler_side, need

AI_ONNX = "ai.onnx"
MICROSOFT = "com.microsoft"
DOMAINS = (MICROSOFT, AI_ONNX)
COPY, MATMUL = (1 << 22, 255 << 16), (512, 4096)
"""Floats of the copies and sizes of the matrix products behind a GPU's ceilings; of the copies no more than 65,535
workgroups of 256, which every Vulkan device has."""


def build_op(case: Case, inputs: dict[str, HostArray], domain: str, nodes: int = 1) -> bytes:
    """A model with the operator, every size fixed.

    Args:
        case: What to compute.
        inputs: Its arrays, for their types; a weight becomes an initializer, as exporters write it.
        domain: `com.microsoft` (version 1) or `ai.onnx` (opset 27).
        nodes: How many in a row. Each has its own state, as layers have (`past_state_I`), and takes the output of the
            one before as its value, query or input, so that none can start early.

    Returns:
        The serialized model.
    """
    onnx = need("onnx", "compile")
    helper = onnx.helper
    constant = {name for name in inputs if name == "weight"}
    feedback = "input" if "input" in inputs else _feedback(case, inputs)
    made: list[Any] = []
    graph_inputs: list[Any] = []
    graph_outputs: list[Any] = []

    def value(name: str, like: str) -> Any:
        array = inputs[like]
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)

    state = {"past_state": "past_state"}
    graph_inputs += [value(name, name) for name in inputs if name not in constant and name not in state]
    chained = feedback
    for index in range(nodes):
        last = index == nodes - 1
        tail = "" if nodes == 1 else f"_{index}"
        names = {name: name for name in inputs} | {"past_state": f"past_state{tail}"}
        if feedback is not None and chained is not None:
            names[feedback] = chained
        output = "output" if last else f"output{tail}"
        present = f"present_state{tail}"
        order = _input_order(case)
        node_inputs = [names.get(name, "") for name in order]
        while node_inputs and not node_inputs[-1]:
            node_inputs.pop()
        where = "" if domain == AI_ONNX else domain
        made.append(
            helper.make_node(
                case.op_type, node_inputs, [output, present], name=f"op{tail}", domain=where, **case.attributes
            )
        )
        graph_inputs.append(value(names["past_state"], "past_state"))
        graph_outputs.append(value(present, "past_state"))
        chained = output
        if last or feedback is None:
            graph_outputs.append(_output_value(helper, case, inputs, output))
    weights = [onnx.numpy_helper.from_array(inputs[name], name) for name in constant]
    graph = helper.make_graph(made, f"{case.op_type}_{nodes}", graph_inputs, graph_outputs, weights)
    opsets = [helper.make_opsetid("", 27 if domain == AI_ONNX else 21)]
    if domain != AI_ONNX:
        opsets.append(helper.make_opsetid(domain, 1))
    ir_version = 13 if domain == AI_ONNX else 10
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version).SerializeToString()


def chain_feeds(inputs: dict[str, HostArray], nodes: int) -> dict[str, HostArray]:
    """Inputs of a chain: every node starts from the same past state."""
    feeds = {name: array for name, array in inputs.items() if name != "past_state"}
    return feeds | {f"past_state_{index}": inputs["past_state"] for index in range(nodes)}


def build_trivial() -> bytes:
    """A model that adds 16 floats: what it takes is what any call takes."""
    return _build("trivial", "Add", {"left": (16,), "right": (16,)}, (16,))


def build_copy(elements: int) -> bytes:
    """A model that reads and writes this many floats."""
    return _build("copy", "Neg", {"left": (elements,)}, (elements,))


def build_matmul(size: int) -> bytes:
    """A model that multiplies two square f32 matrices."""
    return _build("matmul", "MatMul", {"left": (size, size), "right": (size, size)}, (size, size))


def trivial_feeds() -> dict[str, HostArray]:
    """Inputs of the trivial model."""
    return {"left": np.ones(16, np.float32), "right": np.ones(16, np.float32)}


def digest(model: bytes) -> str:
    """Hash of a model, hex."""
    return hashlib.sha256(model).hexdigest()


def strategy_names(op_type: str) -> list[str]:
    """The strategies that the registry has for an operator."""
    with compiler_side():
        from linattn.dialect_patterns.causal_conv import op as conv
        from linattn.dialect_patterns.linear_attention import op as attention
    strategies = attention.STRATEGIES if op_type == "LinearAttention" else conv.STRATEGIES
    return [strategy.name for strategy in strategies]


def _feedback(case: Case, inputs: dict[str, HostArray]) -> str | None:
    """The input that has the shape of the output, for a chain; None if there is none."""
    wanted = _output_shape(case, inputs)
    return next((name for name in ("value", "query") if inputs[name].shape == wanted), None)


def _output_shape(case: Case, inputs: dict[str, HostArray]) -> tuple[int, ...]:
    if "input" in inputs:
        return inputs["input"].shape
    query, value = inputs["query"], inputs["value"]
    heads, kv_heads = case.attributes["q_num_heads"], case.attributes["kv_num_heads"]
    return (*query.shape[:2], max(heads, kv_heads) * (value.shape[2] // kv_heads))


def _output_value(helper: Any, case: Case, inputs: dict[str, HostArray], name: str) -> Any:
    like = inputs["input"] if "input" in inputs else inputs["query"]
    dtype = helper.np_dtype_to_tensor_dtype(like.dtype)
    return helper.make_tensor_value_info(name, dtype, _output_shape(case, inputs))


def _input_order(case: Case) -> tuple[str, ...]:
    if case.op_type == "LinearAttention":
        return ("query", "key", "value", "past_state", "decay", "beta")
    return ("input", "weight", "bias", "past_state")


def _build(name: str, op_type: str, inputs: dict[str, tuple[int, ...]], output: tuple[int, ...]) -> bytes:
    onnx = need("onnx", "compile")
    helper, f32 = onnx.helper, onnx.TensorProto.FLOAT
    node = helper.make_node(op_type, list(inputs), ["output"], name=name)
    values = [helper.make_tensor_value_info(n, f32, shape) for n, shape in inputs.items()]
    graph = helper.make_graph([node], name, values, [helper.make_tensor_value_info("output", f32, output)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
