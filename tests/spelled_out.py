"""Models that spell recurrences and convolutions out, as exporters do, and ONNX Runtime's outputs of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
from linattn.frontend.graph.name_nodes import name_nodes
from onnx import TensorProto, helper, numpy_helper

RULES = ("linear", "gated", "delta", "gated_delta")


class Graph:
    """Collects nodes; every operator gives the name of its first output."""

    def __init__(self, prefix: str = "") -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.prefix = prefix

    def op(self, op_type: str, *inputs: str, outputs: Sequence[str] = (), **attributes: Any) -> str:
        label = f"{self.prefix}{op_type}_{len(self.nodes)}"
        names = list(outputs) or [f"{label}_out"]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, label, **attributes))
        return names[0]

    def ints(self, *values: int) -> str:
        return self.op("Constant", value_ints=list(values))

    def number(self, value: float, dtype: type = np.float32) -> str:
        return self.op("Constant", value=numpy_helper.from_array(np.array(value, dtype)))

    def weight(self, name: str, value: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(value, name))
        return name


@dataclass
class Step:
    """Values in the body of a Scan."""

    g: Graph
    state: str
    q: str
    k: str
    v: str
    decay: str = ""
    beta: str = ""

    def column(self, name: str) -> str:
        return self.g.op("Unsqueeze", name, self.g.ints(-1))

    def row(self, name: str) -> str:
        return self.g.op("Unsqueeze", name, self.g.ints(-2))


def by_matmul(s: Step) -> tuple[str, str]:
    """As mobius writes it, and ONNX's function body nearly so: state after the step, output."""
    g, state = s.g, s.state
    if s.decay:
        state = g.op("Mul", state, g.op("Exp", s.column(s.decay)))
    delta = s.v
    if s.beta:
        found = g.op("Squeeze", g.op("MatMul", s.row(s.k), state), g.ints(-2))
        delta = g.op("Mul", g.op("Sub", s.v, found), s.column(s.beta))
    state = g.op("Add", state, g.op("MatMul", s.column(s.k), s.row(delta)))
    return state, g.op("Squeeze", g.op("MatMul", s.row(s.q), state), g.ints(-2))


def by_sums(s: Step) -> tuple[str, str]:
    """As transformers writes it: products and sums."""
    g, state = s.g, s.state
    if s.decay:
        state = g.op("Mul", g.op("Exp", s.column(s.decay)), state)
    delta = s.v
    if s.beta:
        found = g.op("ReduceSum", g.op("Mul", state, s.column(s.k)), g.ints(-2), keepdims=0)
        delta = g.op("Mul", s.column(s.beta), g.op("Sub", s.v, found))
    state = g.op("Add", g.op("Mul", s.column(s.k), s.row(delta)), state)
    return state, g.op("ReduceSum", g.op("Mul", state, s.column(s.q)), g.ints(2), keepdims=0)


def by_einsum(s: Step) -> tuple[str, str]:
    """With Einsum, the minus moved into the update."""
    g, state = s.g, s.state
    if s.decay:
        state = g.op("Mul", state, g.op("Exp", s.column(s.decay)))
    update = g.op("Einsum", s.k, s.v, equation="bhi,bhj->bhij")
    if s.beta:
        beta = s.column(s.beta)
        found = g.op("Einsum", state, s.k, equation="bhnj,bhn->bhj")
        removed = g.op("Einsum", g.op("Mul", s.k, beta), found, equation="bhi,bhj->bhij")
        update = g.op("Sub", g.op("Mul", update, s.column(beta)), removed)
    state = g.op("Add", state, update)
    return state, g.op("Einsum", s.q, state, equation="bhi,bhij->bhj")


StepWriter = Callable[[Step], tuple[str, str]]


@dataclass(frozen=True)
class Shape:
    """Sizes of a recurrence: query and key heads, state heads."""

    batch: int = 2
    tokens: int = 5
    q_heads: int = 2
    heads: int = 4
    dk: int = 8
    dv: int = 6


def recurrence_model(
    rule: str,
    step: StepWriter = by_matmul,
    shape: Shape | None = None,
    *,
    per_key: bool = False,
    repeat: str = "after",
    scale: float = 0.25,
    value_first: bool = False,
    scan: Mapping[str, Any] | None = None,
    extra: Callable[[Step, str, str], str] | None = None,
) -> onnx.ModelProto:
    """Packed inputs, a Scan over tokens, packed output: mobius' ``onnx-standard`` form.

    Args:
        rule: The update rule.
        step: Writes the body.
        shape: Sizes; batch and tokens stay open.
        per_key: Whether the decay is one a key.
        repeat: ``after``: head h reads query h // r (``Unsqueeze, Tile``), ``before``: query h mod r.
        scale: Of the queries, before the Scan.
        value_first: Whether the state is [B, H, dv, dk] outside of the body.
        scan: More attributes of the Scan.
        extra: Writes another output a token, of the step, the state and the output.
    """
    shape = shape or Shape()
    g = Graph()
    kinds = {"q": (shape.q_heads, shape.dk), "k": (shape.q_heads, shape.dk), "v": (shape.heads, shape.dv)}
    if "gated" in rule:
        kinds["decay"] = (shape.heads, shape.dk if per_key else 1)
    scanned: dict[str, str] = {}
    for name, (heads, _) in kinds.items():
        dims = [g.op("Shape", name, start=i, end=i + 1) for i in (0, 1)]
        packed = g.op("Concat", *dims, g.ints(heads, -1), axis=0)
        value = g.op("Transpose", g.op("Reshape", name, packed), perm=[0, 2, 1, 3])
        ratio = shape.heads // heads
        if ratio > 1:
            place = 2 if repeat == "after" else 1
            repeats = [1] * 5
            repeats[place] = ratio
            tiled = g.op("Tile", g.op("Unsqueeze", value, g.ints(place)), g.ints(*repeats))
            sizes = [g.op("Shape", value, start=i, end=i + 1) for i in (0, 2, 3)]
            whole = g.op("Concat", sizes[0], g.ints(-1), *sizes[1:], axis=0)
            value = g.op("Reshape", tiled, whole)
        if name == "q" and scale != 1.0:
            value = g.op("Mul", value, g.number(scale))
        scanned[name] = g.op("Transpose", value, perm=[2, 0, 1, 3])
    if "delta" in rule:
        scanned["beta"] = g.op("Transpose", "beta", perm=[1, 0, 2])
    body = Graph("body_")
    names = {name: f"{name}_t" for name in scanned}
    start = "past"
    if value_first:
        start = g.op("Transpose", start, perm=[0, 1, 3, 2])
    s = Step(body, "state", names["q"], names["k"], names["v"], names.get("decay", ""), names.get("beta", ""))
    state, output = step(s)
    results = [body.op("Identity", state), output]
    if extra is not None:
        results.append(extra(s, state, output))
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("state", *names.values(), *results)]
    count = 1 + len(names)
    inner = helper.make_graph(body.nodes, "step", value[:count], value[count:])
    final = ["present"] if not value_first else ["last_state"]
    tokens = ["tokens_out", *(["more"] if extra is not None else [])]
    attributes = {"body": inner, "num_scan_inputs": len(names), **(scan or {})}
    g.op("Scan", start, *scanned.values(), outputs=[*final, *tokens], **attributes)
    if value_first:
        g.op("Transpose", "last_state", outputs=["present"], perm=[0, 1, 3, 2])
    dims = [g.op("Shape", "q", start=i, end=i + 1) for i in (0, 1)]
    turned = g.op("Transpose", "tokens_out", perm=[1, 0, 2, 3])
    g.op("Neg", g.op("Reshape", turned, g.op("Concat", *dims, g.ints(-1), axis=0)), outputs=["y"])
    inputs = {name: ["B", "T", heads * size] for name, (heads, size) in kinds.items()}
    if "delta" in rule:
        inputs["beta"] = ["B", "T", shape.heads]
    sizes = [shape.dv, shape.dk] if value_first else [shape.dk, shape.dv]
    inputs["past"] = ["B", shape.heads, *sizes]
    outputs = {"y": ["B", "T", shape.heads * shape.dv], "present": inputs["past"]}
    if extra is not None:
        outputs["more"] = None  # type: ignore[assignment]
    return model_of(g, inputs, outputs)


def model_of(
    g: Graph,
    inputs: Mapping[str, Sequence[int | str]],
    outputs: Mapping[str, Sequence[int | str] | None],
    dtype: int = TensorProto.FLOAT,
    opset: int = 24,
) -> onnx.ModelProto:
    """A model of a graph."""
    graph = helper.make_graph(
        g.nodes,
        "spelled_out",
        [helper.make_tensor_value_info(n, dtype, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, dtype, s) for n, s in outputs.items()],
        g.initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def optimized(model: onnx.ModelProto, level: Any, path: Path) -> onnx.ModelProto:
    """What ONNX Runtime makes of a model before it runs it."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 4
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result = onnx.load(path)
    name_nodes(result.graph)
    return result


def feeds_of(model: onnx.ModelProto, sizes: Mapping[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs: keys of length about 1, decays below 0, betas between 0 and 1."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, np.ndarray] = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        array = rng.normal(size=[sizes[d.dim_param] if d.HasField("dim_param") else d.dim_value for d in dims])
        if value.name.startswith("decay"):
            array = -np.abs(array)
        elif value.name.startswith("beta"):
            array = 1 / (1 + np.exp(-array))
        elif value.name.startswith("k"):
            array *= 0.3
        feeds[value.name] = array.astype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
    return feeds


def run(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """ONNX Runtime's outputs."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def operator_model(
    op_type: str,
    inputs: Mapping[str, tuple[int, Sequence[int | str]]],
    outputs: Mapping[str, tuple[int, Sequence[int | str]]],
    **attributes: Any,
) -> onnx.ModelProto:
    """A model of one operator of opset 27; input names that start with "-" are left out."""
    names = ["" if name.startswith("-") else name for name in inputs]
    while not names[-1]:
        names.pop()
    (first, (dtype, dims)), *others = outputs.items()
    nodes = [
        helper.make_node(op_type, names, ["inner", *(name for name, _ in others)], "operator", **attributes),
        helper.make_node("Neg", ["inner"], [first], "negative"),
    ]
    graph = helper.make_graph(
        nodes,
        "operator",
        [helper.make_tensor_value_info(n, *inputs[n]) for n in names if n],
        [helper.make_tensor_value_info(first, dtype, dims), *(helper.make_tensor_value_info(n, *t) for n, t in others)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 27)], ir_version=10)


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with the operator replaced by the body that ONNX defines it with."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    node = result.graph.node[0]
    types = {v.name: v.type for v in result.graph.input}
    context = [types.get(name, onnx.TypeProto()).SerializeToString() for name in node.input]
    schema = onnx.defs.get_schema(node.op_type, 27, "")
    body = onnx.FunctionProto()
    body.ParseFromString(
        schema.get_context_dependent_function_with_opset_version(27, node.SerializeToString(), context)
    )
    body.domain = node.domain = "spelled_out"
    result.functions.append(body)
    result.opset_import.append(helper.make_opsetid("spelled_out", 1))
    result = onnx.inliner.inline_local_functions(result)
    name_nodes(result.graph)
    return result
