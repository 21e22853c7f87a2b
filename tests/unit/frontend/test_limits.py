"""What a few bytes of model may ask for: one line within seconds and 1 GiB, in a process that may not have more.

All cases run in one child process, whose address space is limited: a case that took more, or did not end, would fail.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from linattn.frontend.compile import CompileOptions, compile_model
from linattn.frontend.options import parse_size
from linattn.runtime.errors import InputError, LinattnError
from onnx import TensorProto, helper, numpy_helper

MOST_SECONDS = 30  # for a case that takes 1 s on an idle machine
MOST_BYTES = 1 << 30
HUGE = 1 << 31

node = helper.make_node


def ints(name: str, value: object) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(value, np.int64), name)


def floats(name: str, value: object) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(value, np.float32), name)


def model(
    nodes: Sequence[onnx.NodeProto],
    initializers: Sequence[onnx.TensorProto] = (),
    inputs: Sequence[onnx.ValueInfoProto] = (),
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    """What the nodes make of the value `r` is added up and to the input."""
    ends = [
        node("Cast", ["r"], ["c"], "cast", to=TensorProto.FLOAT),
        node("ReduceSum", ["c"], ["s"], "sum", keepdims=0),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy")
    graph = helper.make_graph(
        [*nodes, *ends, node("Add", ["x", "s"], ["y"], "add")], "g", [x, *inputs], [y], initializers
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, ir_version=10, opset_imports=opsets, functions=functions)


def tokens() -> onnx.ModelProto:
    """A model with a KV cache, batch and tokens open."""
    from samples.tiny_hybrid import build

    return build()


def doubled() -> onnx.ModelProto:
    """A list that a chain of Concat doubles 40 times."""
    nodes = [node("Concat", [f"v{i}", f"v{i}"], [f"v{i + 1}"], f"n{i}", axis=0) for i in range(40)]
    return model([*nodes, node("Identity", ["v40"], ["r"], "last")], [ints("v0", [1])])


def gathered() -> onnx.ModelProto:
    """As many elements of a list as there are zeros in a constant."""
    zeros = node("ConstantOfShape", ["n"], ["i"], "zeros", value=ints("", [0]))
    return model([zeros, node("Gather", ["v", "i"], ["r"], "gather")], [ints("v", [1]), ints("n", [HUGE])])


def products(side: int = 3000, count: int = 6) -> onnx.ModelProto:
    """Square products of constants, one after the other."""
    nodes = [node("ConstantOfShape", ["n"], ["a0"], "zeros")]
    nodes += [node("MatMul", [f"a{i}", f"a{i}"], [f"a{i + 1}"], f"n{i}") for i in range(count)]
    return model([*nodes, node("Identity", [f"a{count}"], ["r"], "last")], [ints("n", [side, side])])


def attention() -> onnx.ModelProto:
    """Attention of constants whose scores are far larger than what goes in and out."""
    nodes = [node("ConstantOfShape", ["n"], ["q"], "zeros"), node("Attention", ["q", "q", "q"], ["r"], "attention")]
    proto = model(nodes, [ints("n", [1, 1, 60000, 1])])
    proto.opset_import[0].version = 24
    return proto


def nested_functions() -> onnx.ModelProto:
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    functions: list[onnx.FunctionProto] = []
    for level in range(12):
        name, domain = ("Neg", "") if level == 11 else (f"f{level + 1}", "local")
        body = [node(name, ["a"], ["t"], domain=domain)]
        body += [
            node(name, ["t" if i == 0 else f"t{i}"], [f"t{i + 1}" if i < 8 else "b"], domain=domain) for i in range(9)
        ]
        functions.append(helper.make_function("local", f"f{level}", ["a"], ["b"], body, imports))
    return model([node("f0", ["x"], ["r"], domain="local")], functions=functions)


def folded(count: int = 4000) -> onnx.ModelProto:
    """Many constants that are each small enough to fold, 2 GiB together."""
    nodes = [node("Expand", ["v", "n"], [f"e{i}"], f"expand{i}") for i in range(count)]
    sums = [node("Sum", [f"e{i}" for i in range(count)], ["r"], "total")]
    return model([*nodes, *sums], [floats("v", [1]), ints("n", [65536])])


CASES: dict[str, tuple[Callable[[], onnx.ModelProto], dict[str, object], str]] = {
    "range": (
        lambda: model([node("Range", ["a", "b", "d"], ["r"], "n")], [ints("a", 0), ints("b", HUGE), ints("d", 1)]),
        {}, "node 'n' (Range): what is computed from constants alone takes too much memory",
    ),
    "expand": (
        lambda: model([node("Expand", ["v", "n"], ["r"], "n")], [floats("v", [1]), ints("n", [HUGE])]),
        {}, "node 'n' (Expand): what is computed from constants alone takes too much memory",
    ),
    "splat": (
        lambda: model([node("ConstantOfShape", ["n"], ["r"], "n")], [ints("n", [HUGE])]),
        {}, "node 'n' (ConstantOfShape): what is computed from constants alone takes too much memory",
    ),
    "tile": (
        lambda: model([node("Tile", ["v", "n"], ["r"], "n")], [floats("v", [1]), ints("n", [HUGE])]),
        {}, "node 'n' (Tile): what is computed from constants alone takes too much memory",
    ),
    "pad": (
        lambda: model([node("Pad", ["v", "n"], ["r"], "n")], [floats("v", [1]), ints("n", [HUGE, 0])]),
        {}, "node 'n' (Pad): what is computed from constants alone takes too much memory",
    ),
    "outer product": (
        lambda: model([node("Einsum", ["v", "v", "v"], ["r"], "n", equation="i,j,k->ijk")], [floats("v", [1] * 1500)]),
        {}, "node 'n' (Einsum): what is computed from constants alone takes too much memory",
    ),
    "an input's expansion": (
        lambda: model([node("Expand", ["x", "n"], ["r"], "n")], [ints("n", [1 << 38])]),
        {}, "node 'n' (Expand): its output 'r' takes too much memory",
    ),
    "concat": (doubled, {}, "what is computed from constants alone takes too much memory"),
    "gather": (gathered, {}, "node 'zeros' (ConstantOfShape): what is computed from constants alone"),
    "a long input": (
        lambda: model(
            [node("Cast", ["i"], ["j"], "n", to=TensorProto.INT32), node("Expand", ["j", "m"], ["r"], "e")],
            [ints("m", [64, 1])], [helper.make_tensor_value_info("i", TensorProto.INT64, [HUGE])]),
        {}, "takes too much memory",
    ),
    "products": (products, {}, "products of constants take too long to compute"),
    "many folded": (folded, {}, "what is computed from constants alone takes too much memory"),
    "scores": (attention, {}, "products of constants take too long to compute"),
    "taps": (
        lambda: model(
            [node("CausalConvWithState", ["z", "w"], ["r", "p"], "n", domain="com.microsoft")],
            [floats("w", np.ones((1, 1, 20000)))], [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 1, 4])]),
        {}, "input 'weight', got 20000 taps, expected up to 256",
    ),
    "functions": (nested_functions, {}, "too large with its functions inlined"),
    "batch": (tokens, {"batch": HUGE - 1}, "takes too much memory for entry point 'decode'"),
    "context": (tokens, {"max_context": HUGE - 1}, "--max-context: longer than the model supports"),
    "block": (tokens, {"prefill_blocks": (HUGE - 1,), "max_context": None}, "takes too much memory"),
    "blocks": (tokens, {"prefill_blocks": tuple(range(2, 300))}, "--prefill-blocks: too many sizes, got 298"),
    "a limit of one's own": (tokens, {"max_memory": 10_000}, "or raise --max-memory"),
}  # fmt: skip


def child() -> None:
    """Run all cases and print what each said and how long it took."""
    compile_model(model([node("Identity", ["x"], ["r"])]), CompileOptions(cpu_features="generic"))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for name, (build, options, _) in CASES.items():
        proto, start = build(), time.monotonic()
        try:
            compile_model(proto, CompileOptions(cpu_features="generic", **options))  # type: ignore[arg-type]
            text = "compiled"
        except LinattnError as error:
            text = str(error)
        print(json.dumps([name, text, time.monotonic() - start]), flush=True)


@cache
def outcomes() -> dict[str, tuple[str, float]]:
    command = [sys.executable, __file__]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=MOST_SECONDS * len(CASES), check=False)
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert ended.returncode == 0, (lines[-1:], ended.stderr[-2000:])
    return {name: (text, seconds) for name, text, seconds in lines}


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process as Linux does")
@pytest.mark.parametrize("case", CASES)
def test_refused(case: str) -> None:
    text, seconds = outcomes()[case]
    assert CASES[case][2] in text
    assert seconds < MOST_SECONDS


def test_raised() -> None:
    """The option raises the limit: what was refused compiles."""
    nodes = [node("Expand", ["x", "n"], ["r"], "n")]
    proto = model(nodes, [ints("n", [3000])])
    with pytest.raises(LinattnError, match=r"takes too much memory.* or raise --max-memory"):
        compile_model(proto, CompileOptions(cpu_features="generic", max_memory=8000))
    compile_model(proto, CompileOptions(cpu_features="generic", max_memory=80_000))


def test_sizes() -> None:
    assert parse_size("500MiB", "--max-memory") == 500 << 20
    assert parse_size("64GiB", "--max-memory") == 64 << 30
    assert parse_size("123", "--max-memory") == 123
    for text in ("", "0", "-1", "1e9", "16GB", "GiB", "9" * 50):
        with pytest.raises(InputError, match="--max-memory: not a size"):
            parse_size(text, "--max-memory")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[3]))
    child()
