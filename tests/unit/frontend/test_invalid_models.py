"""What ONNX does not allow is refused in one line that names the place; legal oddities run as in ONNX Runtime."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from linattn.frontend import compile as compiler
from linattn.frontend.compile import CompileOptions, compile_model
from linattn.runtime import Program
from linattn.runtime.errors import LinattnError, LoweringError, UnsupportedModelError
from onnx import TensorProto, helper, numpy_helper

from samples.tiny_hybrid import build

CASES = Path(__file__).parents[4] / "shared" / "cases"
MODELS = CASES.parent / "models"

node = helper.make_node
X = np.array([1, -2], np.float32)


def value(
    name: str, elem_type: int = TensorProto.FLOAT, shape: Sequence[int | str] | None = (2,)
) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, elem_type, shape)


def weight(name: str, number: float = 1.0) -> onnx.TensorProto:
    return numpy_helper.from_array(np.full(2, number, np.float32), name)


def model(
    nodes: Sequence[onnx.NodeProto],
    outputs: Sequence[onnx.ValueInfoProto],
    initializers: Sequence[onnx.TensorProto] = (),
    inputs: Sequence[onnx.ValueInfoProto] = (value("x"),),
    opsets: Sequence[tuple[str, int]] = (("", 21),),
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    imports = [helper.make_opsetid(*opset) for opset in opsets]
    return helper.make_model(graph, ir_version=10, opset_imports=imports, functions=functions)


def neg(*, name: str = "n", **fields: object) -> onnx.ModelProto:
    """A model of one node, with fields of the node set."""
    only = node("Neg", ["x"], ["y"], name=name)
    for field, content in fields.items():
        setattr(only, field, content)
    return model([only], [value("y")])


def tensor(**fields: object) -> onnx.ModelProto:
    """A model with one initializer, whose fields are set."""
    made = weight("w")
    for field, content in fields.items():
        if isinstance(content, list):
            made.ClearField(field)
            getattr(made, field).extend(content)
        else:
            setattr(made, field, content)
    return model([node("Add", ["x", "w"], ["y"])], [value("y")], [made])


def bytes_for_name(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A node's name that is not UTF-8: protobuf takes it and gives bytes back."""
    damaged = onnx.ModelProto()
    damaged.ParseFromString(proto.SerializeToString().replace(b"NAME", b"\xff\xfe\x82!"))
    return damaged


def nested(depth: int, calls: int) -> onnx.ModelProto:
    """Functions that call the next one several times: a few hundred bytes, calls ** depth nodes."""
    functions: list[onnx.FunctionProto] = []
    for level in range(depth):
        inner = f"f{level + 1}" if level + 1 < depth else "Neg"
        domain = "local" if level + 1 < depth else ""
        values = ["a", *(f"t{i}" for i in range(calls - 1)), "b"]
        body = [node(inner, [values[i]], [values[i + 1]], domain=domain) for i in range(calls)]
        imports = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
        functions.append(helper.make_function("local", f"f{level}", ["a"], ["b"], body, imports))
    call = node("f0", ["x"], ["y"], domain="local")
    return model([call], [value("y")], opsets=[("", 21), ("local", 1)], functions=functions)


def recursive() -> onnx.ModelProto:
    proto = nested(2, 1)
    proto.functions[1].node[0].domain, proto.functions[1].node[0].op_type = "local", "f0"
    return proto


Y = [value("y")]
INVALID = {
    "two values of one name": (
        model([node("Neg", ["x"], ["y"], "a"), node("Abs", ["x"], ["y"], "b")], Y),
        "node 'b' (Abs): 'y' is defined twice, got also node 'a'",
    ),
    "two initializers of one name": (
        model([node("Add", ["x", "w"], ["y"])], Y, [weight("w"), weight("w", 2)]),
        "initializer 'w': 'w' is defined twice",
    ),
    "an initializer shadowed": (
        model([node("Neg", ["x"], ["w"], "a"), node("Add", ["x", "w"], ["y"])], Y, [weight("w")]),
        "node 'a' (Neg): 'w' is defined twice, got also initializer 'w'",
    ),
    "an input shadowed": (
        model([node("Neg", ["x"], ["x"], "a"), node("Abs", ["x"], ["y"])], Y),
        "node 'a' (Neg): 'x' is defined twice, got also graph input 'x'",
    ),
    "two inputs of one name": (
        model([node("Neg", ["x"], ["y"])], Y, inputs=[value("x"), value("x")]),
        "graph input 'x': 'x' is defined twice",
    ),
    "two outputs of one name": (model([node("Neg", ["x"], ["y"])], [*Y, *Y]), "graph output 'y': it is listed twice"),
    "no outputs": (model([node("Neg", ["x"], ["y"])], []), "model: it has no outputs"),
    "an output of nothing": (model([node("Neg", ["x"], ["y"])], [value("q")]), "graph output 'q': nothing defines it"),
    "an output without a name": (model([node("Neg", ["x"], [""])], [value("")]), "graph output '': nothing defines it"),
    "an input of nothing": (model([node("Neg", ["q"], ["y"], "a")], Y), "node 'a' (Neg): nothing defines its"),
    "a cycle": (
        model([node("Add", ["x", "z"], ["y"], "a"), node("Neg", ["y"], ["z"], "b")], Y),
        "node 'a' (Add): its input 'z' is not there yet: the nodes are out of order or in a cycle, got it comes from",
    ),
    "out of order": (
        model([node("Neg", ["z"], ["y"], "a"), node("Abs", ["x"], ["z"], "b")], Y),
        "node 'a' (Neg): its input 'z' is not there yet",
    ),
    "no opset of a domain": (
        model([node("LinearAttention", ["x", "x", "x"], ["y"], "a", domain="com.microsoft")], Y),
        "node 'a' (LinearAttention): the model imports no opset of its domain 'com.microsoft'",
    ),
    "two versions of an opset": (
        model([node("Neg", ["x"], ["y"])], Y, opsets=[("", 21), ("ai.onnx", 13)]),
        "opset 'ai.onnx': two versions of one opset, got 13, expected 21",
    ),
    "an opset of the future": (model([node("Neg", ["x"], ["y"])], Y, opsets=[("", 99)]), "unknown opset, got 99"),
    "no opset": (onnx.ModelProto(graph=neg().graph, ir_version=10), "it has no graph or no opsets"),
    "an attribute too many": (
        model([node("Neg", ["x"], ["y"], "a", foo=1)], Y),
        "node 'a' (Neg): not valid ONNX: Unrecognized attribute: foo",
    ),
    "an attribute missing": (
        model([node("Cast", ["x"], ["y"], "a")], Y),
        "node 'a' (Cast): not valid ONNX: Required attribute 'to' is missing",
    ),
    "an input without a shape": (
        model([node("Neg", ["x"], ["y"])], Y, inputs=[value("x", shape=None)]),
        "graph input 'x': it has no shape",
    ),
    "an input of strings": (
        model([node("Identity", ["x"], ["y"])], Y, inputs=[value("x", TensorProto.STRING)]),
        "graph input 'x': not a tensor of a type that is supported, got STRING",
    ),
    "an input of no known type": (model([node("Neg", ["x"], ["y"])], Y, inputs=[value("x", 99)]), "graph input 'x'"),
    "an input of many axes": (
        model([node("Neg", ["x"], ["y"])], Y, inputs=[value("x", shape=[1] * 17)]),
        "graph input 'x': impossible shape, got 17 axes",
    ),
    "an input of negative size": (
        model([node("Neg", ["x"], ["y"])], Y, inputs=[value("x", shape=[-3])]),
        "graph input 'x': impossible shape, got [-3]",
    ),
    "a name that is not UTF-8": (bytes_for_name(neg(name="NAME")), "its name is not UTF-8, got b'\\xff\\xfe"),
    "NUL in a name": (neg(name="a\0b"), "its name holds control characters, got 'a\\x00b'"),
    "a terminal's escape in a name": (neg(op_type="Neg\x1b[2J"), "its op_type holds control characters"),
    "a name of a megabyte": (neg(name="a" * (1 << 20)), "its name is too long, got 1048576 characters"),
    "an initializer too short": (tensor(raw_data=b"1234"), "initializer 'w': data does not fit the shape, got 4 bytes"),
    "an initializer of two fields": (
        tensor(raw_data=b"", float_data=[1.0, 2.0]),
        "initializer 'w': data does not fit the shape",
    ),
    "an initializer of nothing": (tensor(dims=[3]), "initializer 'w': data does not fit the shape"),
    "an initializer of negative size": (tensor(dims=[-2]), "initializer 'w': impossible shape, got [-2]"),
    "an initializer of 8-bit floats": (tensor(data_type=TensorProto.FLOAT8E4M3FN), "initializer 'w': its element type"),
    "an initializer of no known type": (tensor(data_type=77), "initializer 'w': its element type"),
    "an initializer elsewhere": (
        tensor(data_location=TensorProto.EXTERNAL),
        "initializer 'w': its values lie in a file, but the model was given without a path",
    ),
    "a function that calls itself": (recursive(), "function 'f0': a function calls itself, got f0 -> f1 -> f0"),
    "functions that grow": (nested(20, 10), "model: too large with its functions inlined, got 1"),
}  # fmt: skip


class Planned(BaseException):
    """The model was found good and would be compiled now."""


def stop(*_: object) -> None:
    raise Planned


@pytest.mark.parametrize(("proto", "message"), INVALID.values(), ids=INVALID)
def test_refused(proto: onnx.ModelProto, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "Compiler", stop)
    for _ in range(2):  # what the first compile registers with ONNX does not change the second
        with pytest.raises(UnsupportedModelError) as caught:
            compile_model(proto)
        assert message in str(caught.value)
        assert len(str(caught.value)) < 2000
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("entry", [
    ("location", "a\0b", "its external_data value holds control characters|external_data value"),
    ("location", "../x", "outside the model's folder"),
    ("location", "loop", "not a file|is missing"),  # the latter from Python 3.13 on
    ("offset", "many", "not numbers"),
    ("length", "7", "does not fit the shape"),
])  # fmt: skip
def test_external_data(entry: tuple[str, str, str], tmp_path: Path) -> None:
    proto = model([node("Add", ["x", "w"], ["y"])], Y, [weight("w")])
    path = tmp_path / "model.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    damaged = onnx.load(path, load_external_data=False)
    (tmp_path / "loop").symlink_to("loop")
    info = damaged.graph.initializer[0].external_data
    for item in info:
        if item.key == entry[0]:
            item.value = entry[1]
    path.write_bytes(damaged.SerializeToString())
    with pytest.raises(UnsupportedModelError, match=entry[2]):
        compile_model(path)


LEGAL = {
    "an output that is an input": model([node("Neg", ["x"], ["y"])], [*Y, value("x")]),
    "only an output that is an input": model([], [value("x")]),
    "an output that is an initializer": model([node("Neg", ["x"], ["y"])], [*Y, value("w")], [weight("w")]),
    "an input with a default": model(
        [node("Add", ["x", "w"], ["y"])], Y, [weight("w")], inputs=[value("x"), value("w")]
    ),
    "nested functions": nested(3, 3),
    "a default of an input that is left out": model([node("Clip", ["x", "", "w"], ["y"])], Y, [
        numpy_helper.from_array(np.float32(0.5), "w")]),
}  # fmt: skip


@pytest.mark.parametrize("proto", LEGAL.values(), ids=LEGAL)
def test_legal(proto: onnx.ModelProto) -> None:
    onnx.checker.check_model(proto)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    want = dict(zip([v.name for v in proto.graph.output], session.run(None, {"x": X}), strict=True))
    program = Program.load(compile_model(proto, CompileOptions(cpu_features="generic")).module, "local-sync")
    got = program.run({"x": X})
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


def test_shapes_in_external_data(tmp_path: Path) -> None:
    """`size_threshold=0` puts the shapes into the data file too, and a value that folds from a larger one."""
    table = np.arange(600, dtype=np.float32).reshape(300, 2)
    initializers = [
        numpy_helper.from_array(np.array([1, 2]), "shape"),
        numpy_helper.from_array(np.array([299, 7]), "rows"),
        numpy_helper.from_array(table, "table"),
    ]
    nodes = [
        node("Reshape", ["x", "shape"], ["r"]),
        node("Gather", ["table", "rows"], ["g"]),
        node("Cast", ["g"], ["c"], to=TensorProto.INT64),
        node("ReduceMax", ["c"], ["m"], keepdims=0),
        node("Range", ["zero", "m", "step"], ["range"]),
        node("Cast", ["range"], ["f"], to=TensorProto.FLOAT),
        node("ReduceSum", ["f"], ["s"]),
        node("Add", ["r", "s"], ["y"]),
    ]
    scalars = [numpy_helper.from_array(np.array(n), name) for name, n in (("zero", 0), ("step", 100))]
    proto = model(nodes, [value("y", shape=[1, 2])], [*initializers, *scalars])
    path = tmp_path / "model.onnx"
    onnx.save(
        onnx.load_from_string(proto.SerializeToString()),
        path,
        save_as_external_data=True,
        location="w.bin",
        size_threshold=0,
    )
    program = Program.load(compile_model(path, CompileOptions(cpu_features="generic")).module, "local-sync")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(program.run({"x": X})["y"], session.run(None, {"x": X})[0])


def test_hybrid_in_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a model's shapes and tables outside: the same plan as with them inside."""
    monkeypatch.setattr(compiler, "Compiler", stop)
    path = tmp_path / "model.onnx"
    onnx.save(build(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    with pytest.raises(Planned):
        compile_model(path, CompileOptions(prefill_blocks=(4,), max_context=32))


@pytest.mark.skipif(not CASES.is_dir(), reason=f"no shared cases in {CASES}")
@pytest.mark.parametrize("case", sorted((CASES / "damaged").glob("*.onnx")), ids=lambda path: path.stem)
def test_damaged_exports(case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "Compiler", stop)
    names = {"mob": "mobius-f32-cpu", "int4": "genai-int4-cpu", "g32": "genai-fp32-cpu"}
    (tmp_path / "model.onnx").write_bytes(case.read_bytes())
    shutil.copyfile(MODELS / names[case.stem.partition("-")[2]] / "model.onnx.data", tmp_path / "model.onnx.data")
    with pytest.raises(UnsupportedModelError, match=r"^(node|graph output) .*: .*, got |^(node|graph output) .*: .*; "):
        compile_model(tmp_path / "model.onnx", CompileOptions(prefill_blocks=(8,), max_context=32))


def test_last_net(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that nobody foresaw: one line with the stage, and its cause for --debug."""

    def fail(*_: object) -> None:
        raise KeyError("first line\nsecond")

    monkeypatch.setattr(compiler, "import_entry_point", fail)
    with pytest.raises(
        LoweringError, match=r"^stage 'import 1 entry points': unexpected KeyError.*bug in linattn"
    ) as caught:
        compile_model(neg())
    assert isinstance(caught.value, LinattnError)
    assert isinstance(caught.value.__cause__, KeyError)
    assert not re.search(r"[\n\x1b]", str(caught.value))


def test_a_negative_size_is_named() -> None:
    """ONNX's shape inference takes it: 2 elements less than there are."""
    sizes = numpy_helper.from_array(np.array([-2], np.int64), "sizes")
    nodes = [node("Expand", ["x", "sizes"], ["y"], name="expand"), node("Neg", ["y"], ["z"])]
    bad = model(nodes, [value("z", shape=("n",))], [sizes], [value("x", shape=(1,))])
    with pytest.raises(LinattnError, match=r"^node 'expand'") as caught:
        compile_model(bad)
    assert "bug in linattn" not in str(caught.value)
