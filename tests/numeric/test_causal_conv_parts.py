"""CausalConvWithState whose output a Split cuts into queries, keys and values, as one kernel, against float64."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from linattn.dialect_patterns.causal_conv.reference import reference
from linattn.dialect_patterns.op import MICROSOFT, LoweringOptions
from linattn.dialect_patterns.target import Target
from linattn.frontend import CompileOptions, compile_model
from linattn.frontend.graph.schema import infer_types
from linattn.frontend.graph.specialize import SpecializedGraph
from linattn.frontend.graph.split_convolutions import split_convolutions
from linattn.runtime import Program
from onnx import helper, numpy_helper

from tests.data import causal_conv
from tests.harness import CPUS, WIDTHS, skip_unless_it_runs
from tests.tolerances import BENIGN, check, error

TAPS, FACTOR = 4, 0.25
# batch, tokens, sizes, size of a head of the first two parts (0: no norms): tokens around the state's three and the
# four that are done at once; parts of one size and of several; heads of one vector and of some.
CASES = [
    (1, 2, (32, 32, 32), 16),
    (1, 3, (64, 64, 128), 32),
    (2, 8, (64, 64, 64), 64),
    (1, 38, (512, 512, 1024), 128),
    (1, 9, (48, 16), 0),
]


def tensors(case: tuple[Any, ...], dtype: Any) -> list[np.ndarray]:
    """Input [B, C, T] with a head of zeros, weight, bias and past state."""
    batch, tokens, sizes, head = case
    x, weight, bias, past = causal_conv(batch, sum(sizes), tokens, TAPS, dtype=dtype)
    assert bias is not None
    assert past is not None
    for array in (x, past):
        array[:, : head or 1] = 0
    bias[: head or 1] = 0
    return [x, weight, bias, past]


def build(cases: list[tuple[Any, ...]], dtype: Any, kept: str = "", transposes: bool = True) -> onnx.ModelProto:
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes: list[onnx.NodeProto] = []
    inputs, outputs, weights = [], [], [numpy_helper.from_array(np.array(FACTOR, dtype), "factor")]

    def value(name: str, shape: list[int] | None = None) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, element, shape)

    for i, case in enumerate(cases):
        batch, tokens, sizes, head = case
        _, weight, bias, _ = tensors(case, dtype)
        channels, parts = sum(sizes), [f"p{i}.{n}" for n in range(len(sizes))]
        weights += [numpy_helper.from_array(array, f"{name}{i}") for name, array in (("w", weight), ("b", bias))]
        weights.append(numpy_helper.from_array(np.array(sizes), f"sizes{i}"))
        shape = [batch, tokens, channels] if transposes else [batch, channels, tokens]
        inputs += [value(f"x{i}", shape), value(f"past{i}", [batch, channels, TAPS - 1])]
        outputs.append(value(f"present{i}", [batch, channels, TAPS - 1]))
        if transposes:
            nodes.append(helper.make_node("Transpose", [f"x{i}"], [f"t{i}"], f"before{i}", perm=[0, 2, 1]))
        given = [f"t{i}" if transposes else f"x{i}", f"w{i}", f"b{i}", f"past{i}"]
        nodes += [
            helper.make_node(
                "CausalConvWithState", given, [f"u{i}", f"present{i}"], f"c{i}", domain=MICROSOFT, activation="silu"
            ),
            helper.make_node("Transpose", [f"u{i}"], [f"v{i}"], f"behind{i}", perm=[0, 2, 1]),
            helper.make_node("Split", [f"v{i}", f"sizes{i}"], parts, f"s{i}", axis=-1),
        ]
        for n, (part, size) in enumerate(zip(parts, sizes, strict=True)):
            if not head or n > 1:
                outputs.append(value(part, [batch, tokens, size]))
                continue
            weights += [
                numpy_helper.from_array(np.array(to), f"{part}.{name}")
                for name, to in (("apart", [0, 0, -1, head]), ("flat", [0, 0, size]))
            ]
            nodes += [
                helper.make_node("Reshape", [part, f"{part}.apart"], [f"{part}.heads"], f"{part}.a"),
                helper.make_node("LpNormalization", [f"{part}.heads"], [f"{part}.unit"], f"{part}.n", axis=-1, p=2),
                helper.make_node("Reshape", [f"{part}.unit", f"{part}.flat"], [f"{part}.rows"], f"{part}.f"),
            ]
            if n == 0:
                nodes.append(helper.make_node("Mul", [f"{part}.rows", "factor"], [f"{part}.scaled"], f"{part}.m"))
            outputs.append(value(f"{part}.{'rows' if n else 'scaled'}", [batch, tokens, size]))
    outputs += [value(kept)] if kept else []
    opsets = [helper.make_opsetid("", 22), helper.make_opsetid(MICROSOFT, 1)]
    graph = helper.make_graph(nodes, "convolutions", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize(
    ("target", "dtype"),
    [*((width, np.float32) for width in WIDTHS), ("cpu256", ml_dtypes.bfloat16), ("cpu512", np.float16)],
)
def test_parts(target: str, dtype: Any) -> None:
    model = build(CASES, dtype)
    module = compile_model(model, CompileOptions(cpu_features=CPUS[target])).module
    assert b"_rows_512n128x" in module
    assert b"_reduction_" not in module  # a norm of its own
    assert b"slow_memcpy" not in module  # a copy of a part
    skip_unless_it_runs(target)
    feeds, wants = dict[str, np.ndarray](), dict[str, np.ndarray]()
    for i, case in enumerate(CASES):
        x, weight, bias, past = tensors(case, dtype)
        feeds |= {f"x{i}": np.ascontiguousarray(x.transpose(0, 2, 1)), f"past{i}": past}
        whole, wants[f"present{i}"] = reference(x, weight, bias, past, activation="silu")
        *_, sizes, head = case
        for n, want in enumerate(np.split(whole.transpose(0, 2, 1), np.cumsum(sizes)[:-1], axis=-1)):
            name = f"p{i}.{n}"
            if head and n < 2:
                apart = want.reshape(*want.shape[:2], -1, head)
                norm = np.linalg.norm(apart, axis=-1, keepdims=True)
                want = (apart / np.where(norm, norm, 1)).reshape(want.shape) * (1 if n else FACTOR)
                name += ".rows" if n else ".scaled"
            wants[name] = want
    results = Program.load(module).run(feeds)
    assert wants.keys() == results.keys()
    for name, want in wants.items():
        assert error(results[name], want) <= BENIGN[np.dtype(dtype).name], name


def test_open_tokens() -> None:
    """The number of tokens is known at run time only: fewer than the state has, as many, and more."""
    case = (1, 7, (64, 64, 64), 32)
    model = build([case], np.float32)
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_value == case[1]:
                dim.dim_param = "tokens"
    program = Program.load(compile_model(model, CompileOptions(prefill_blocks=None)).module)
    for tokens in (2, 3, 4, 7, 12):
        x, weight, bias, past = tensors((1, tokens, *case[2:]), np.float32)
        results = program.run({"x0": np.ascontiguousarray(x.transpose(0, 2, 1)), "past0": past})
        _, weight, bias, _ = tensors(case, np.float32)
        whole, state = reference(x, weight, bias, past, activation="silu")
        want = whole.transpose(0, 2, 1)[..., 128:]
        check([results["p0.2"], results["present0"]], (want, state))


CPU = Target("cpu", vector_bits=256)


@pytest.mark.parametrize(
    ("case", "options", "target", "strategy", "made"),
    [
        ((1, 8, (32, 32, 64), 16), {}, CPU, None, [16, 16, 0]),
        ((1, 8, (32, 32, 64), 16), {"kept": "p0.0.rows"}, CPU, None, [16, 16, 0]),
        ((1, 8, (32, 32, 64), 16), {"kept": "p0.0.unit"}, CPU, None, [0, 16, 0]),
        ((1, 8, (36, 36), 12), {}, CPU, None, None),  # vectors do not divide the parts
        ((1, 8, (16, 16, 32), 4), {}, CPU, None, [0, 0, 0]),  # a vector has two heads
        ((1, 8, (32, 32, 64), 16), {"kept": "v0"}, CPU, None, None),
        ((1, 8, (32, 32, 64), 16), {"kept": "u0"}, CPU, None, None),
        ((1, 8, (32, 32, 64), 16), {"transposes": False}, CPU, None, None),
        ((1, 1, (32, 32, 64), 16), {}, CPU, None, None),  # of one token nothing is moved
        ((1, 8, (32, 32, 64), 16), {}, CPU, "direct", None),
        ((1, 8, (32, 32, 64), 16), {}, Target("vulkan", is_gpu=True), None, None),
    ],
)
def test_what_becomes_one_node(
    case: tuple[Any, ...], options: dict[str, Any], target: Target, strategy: str | None, made: list[int] | None
) -> None:
    model = build([case], np.float32, **options)
    before = [node.op_type for node in model.graph.node]
    graph = SpecializedGraph(model, infer_types(model))
    found = split_convolutions(graph, {"": 22, MICROSOFT: 1}, target, LoweringOptions(strategy=strategy)).proto.graph
    joined = [node for node in found.node if node.op_type == "CausalConvParts"]
    if made is None:
        assert [node.op_type for node in found.node] == before
        return
    (node,) = joined
    given = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    assert given["heads"] == made
    assert given["sizes"] == list(case[2])
    assert not {"Split", "Transpose", "CausalConvWithState"} & {other.op_type for other in found.node}
    assert ("LpNormalization" in {other.op_type for other in found.node}) is (0 in made[:2])
