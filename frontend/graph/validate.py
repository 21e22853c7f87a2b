"""Refuses models that ONNX does not allow, in one line, before anything else looks at them.

ONNX's own checker says what a node may be (attributes, number of inputs); it is asked about a skeleton of the graph,
without weights, so that it reads no external data. What it does not look at, or says without a name, is checked here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import onnx
from google.protobuf.message import Message
from linattn.dialect_patterns.op import INTERNAL
from linattn.runtime.errors import UnsupportedModelError

from .schema import DTYPES, NOT_IN_ONNX, domain_of

MAX_NODES = 200_000
"""More nodes than any exporter of today writes; keeps hostile graphs from compiling for days."""

MAX_INLINED_NODES = 20_000
MAX_INLINED_BYTES = 64 << 20
"""What functions may add to a model; nested ones grow with the power of their depth."""

MAX_TENSOR_ELEMENTS = 2**40
MAX_RANK = 16
"""Axes of a tensor; the runtime's manifest takes no more."""

PACKED_BITS: dict[int, int] = {
    onnx.TensorProto.UINT4: 4,
    onnx.TensorProto.INT4: 4,
    onnx.TensorProto.UINT2: 2,
    onnx.TensorProto.INT2: 2,
}
"""Bits of the element types of which bytes hold several: only initializers may have them, see ``quantised_weights``."""

MAX_NAME = 2048
"""Characters of a name; those of exporters have some hundred."""

_NOTES = ("doc_string", "metadata_props", "quantization_annotation", "training_info")
"""Fields that say nothing about what is computed."""

_CONTEXT = re.compile(r"\s*==> Context: Bad node spec for node\. Name: (.*) OpType: (\S*)\s*$", re.DOTALL)


def check_fields(proto: onnx.ModelProto, where: str) -> None:
    """Check every name and tensor of a model, and leave out what says nothing about what is computed.

    Args:
        proto: The model; notes in it are cleared.
        where: What errors name where there is nothing better.

    Raises:
        UnsupportedModelError: if a name is not text, a tensor impossible, or the file no model at all.
    """
    _check_fields(proto, where)
    if not proto.HasField("graph") or not proto.opset_import:
        raise UnsupportedModelError(
            "not an ONNX model, or a truncated one: it has no graph or no opsets", where=where, hint="export it again"
        )
    for tensor in proto.graph.initializer:
        if not tensor.name:
            raise UnsupportedModelError("an initializer without a name", where=where, hint="export the model again")


def check_graph(proto: onnx.ModelProto) -> None:
    """Check a model without functions against ONNX's rules.

    Raises:
        UnsupportedModelError: for the first rule that is broken: names that are not unique, values that nothing
            defines, nodes out of order or in a cycle, unknown opsets, attributes or inputs that an operator lacks.
    """
    graph = proto.graph
    _check_opsets(proto)
    if len(graph.node) > MAX_NODES:
        raise UnsupportedModelError("too many nodes", where="model", got=len(graph.node), expected=f"up to {MAX_NODES}")
    if graph.sparse_initializer:
        raise UnsupportedModelError(
            "sparse initializers are not supported", where="model", hint="export the model with dense weights"
        )
    _check_names(graph)
    for value in graph.input:
        _check_value(value, "graph input")
    for value in graph.output:
        _check_value(value, "graph output", shape=False)
    _check_splits(graph)
    try:
        onnx.checker.check_model(_skeleton(proto))  # pyright: ignore[reportUnknownMemberType]
    except onnx.checker.ValidationError as error:
        message = str(error)
        context = _CONTEXT.search(message)
        where = f"node '{context[1]}' ({context[2]})" if context else "model"
        text = message[: context.start()] if context else message
        raise UnsupportedModelError(
            f"not valid ONNX: {' '.join(text.split())[:400]}", where=where, hint="see onnx.checker; export it again"
        ) from error


def _check_splits(graph: onnx.GraphProto) -> None:
    """A Split has as many outputs as it says: ONNX's own inference reads past the end of a list, and aborts."""
    for node in graph.node:
        said = next((a.i for a in node.attribute if a.name == "num_outputs"), None)
        if node.op_type == "Split" and domain_of(node) == "" and said is not None and said != len(node.output):
            raise UnsupportedModelError(
                "attribute 'num_outputs'", where=f"node '{node.name}' (Split)", got=said,
                expected=f"{len(node.output)}, the number of its outputs", hint="export the model again",
            )  # fmt: skip


def check_functions(proto: onnx.ModelProto) -> None:
    """Check that inlining a model's functions ends, and with how many nodes.

    Raises:
        UnsupportedModelError: if a function calls itself, or the model would have too many nodes or bytes.
    """
    functions = {(domain_of(f), f.name, f.overload): f for f in proto.functions}
    if len(functions) != len(proto.functions):
        raise UnsupportedModelError("two functions of one name", where="model", hint="export the model again")
    sizes: dict[tuple[str, str, str], tuple[int, int]] = {}
    path: list[tuple[str, str, str]] = []

    def size(nodes: Any) -> tuple[int, int]:
        count = total = 0
        for node in nodes:
            key = domain_of(node), node.op_type, node.overload
            inner = function_size(key) if key in functions else (1, node.ByteSize())
            count, total = count + inner[0], total + inner[1]
        return count, total

    def function_size(key: tuple[str, str, str]) -> tuple[int, int]:
        if key not in sizes:
            if key in path or len(path) > 100:
                raise UnsupportedModelError(
                    "a function calls itself" if key in path else "functions nested too deep",
                    where=f"function '{key[1]}'",
                    got=" -> ".join(name for _, name, _ in (*path[-3:], key)),
                )
            path.append(key)
            sizes[key] = size(functions[key].node)
            path.pop()
        return sizes[key]

    count, total = size(proto.graph.node)
    written = len(proto.graph.node) + sum(len(f.node) for f in proto.functions)
    most_nodes, most_bytes = min(written + MAX_INLINED_NODES, MAX_NODES), proto.ByteSize() + MAX_INLINED_BYTES
    if count > most_nodes or total > most_bytes:
        raise UnsupportedModelError(
            "too large with its functions inlined",
            where="model",
            got=f"{count} nodes, {total} bytes",
            expected=f"up to {most_nodes} nodes and {most_bytes} bytes",
        )


def _check_fields(message: Message, where: str) -> None:
    """Check the names and tensors in a message and in all those inside it."""
    if isinstance(message, onnx.TensorProto):
        _check_tensor(message, where)
        return
    if isinstance(message, onnx.SparseTensorProto):
        raise UnsupportedModelError("sparse tensors are not supported", where=where)
    if isinstance(message, onnx.NodeProto | onnx.FunctionProto | onnx.ValueInfoProto):
        where = f"{_kind(message)} {_label(message.name)}"
    for field, value in message.ListFields():
        if field.name in _NOTES:
            message.ClearField(field.name)
        elif field.type == field.TYPE_STRING:
            for text in [value] if isinstance(value, str | bytes) else value:
                _check_text(text, field.name, where)
        elif field.type == field.TYPE_MESSAGE:
            for inner in [value] if isinstance(value, Message) else value:
                _check_fields(inner, where)


def _check_text(text: str | bytes, field: str, where: str) -> None:
    if isinstance(text, bytes):
        raise UnsupportedModelError(f"its {field} is not UTF-8", where=where, got=repr(text[:40]))
    if len(text) > MAX_NAME:
        got = f"{len(text)} characters"
        raise UnsupportedModelError(f"its {field} is too long", where=where, got=got, expected=f"up to {MAX_NAME}")
    if not text.isprintable():
        raise UnsupportedModelError(f"its {field} holds control characters", where=where, got=repr(text[:80]))


def _kind(message: Message) -> str:
    return {"NodeProto": "node", "FunctionProto": "function"}.get(type(message).__name__, "value")


def _label(name: str | bytes) -> str:
    return repr(name) if len(name) <= 80 else f"{name[:80]!r}..."


def _type_name(data_type: int) -> str:
    known = data_type in onnx.TensorProto.DataType.values()
    return onnx.TensorProto.DataType.Name(data_type) if known else str(data_type)


def _check_tensor(tensor: onnx.TensorProto, where: str) -> None:
    is_initializer = not where.startswith(("node", "function"))
    _check_text(tensor.name, "tensor's name", where)
    where = f"initializer '{tensor.name}'" if is_initializer else where
    tensor.ClearField("doc_string")
    tensor.ClearField("metadata_props")
    for entry in tensor.external_data:
        _check_text(entry.key, "external_data key", where)
        _check_text(entry.value, "external_data value", where)
    count = math.prod(tensor.dims)
    if any(d < 0 for d in tensor.dims) or len(tensor.dims) > MAX_RANK or count > MAX_TENSOR_ELEMENTS:
        got = f"{len(tensor.dims)} axes" if len(tensor.dims) > MAX_RANK else list(tensor.dims)
        raise UnsupportedModelError("impossible shape", where=where, got=got)
    if tensor.data_type not in DTYPES and not (is_initializer and tensor.data_type in PACKED_BITS):
        raise UnsupportedModelError(
            "its element type is not supported",
            where=where,
            got=_type_name(tensor.data_type),
            expected=", ".join(_type_name(t) for t in DTYPES),
        )
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        if not is_initializer:
            raise UnsupportedModelError("external data in an attribute is not supported", where=where)
        return
    if tensor.HasField("segment"):
        raise UnsupportedModelError("tensors in segments are not supported", where=where)
    if tensor.HasField("raw_data"):
        want, got, unit = tensor_bytes(tensor), len(tensor.raw_data), "bytes"
    else:
        field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
        want = tensor_bytes(tensor) if tensor.data_type in PACKED_BITS else count
        got, unit = len(getattr(tensor, field)), f"values in {field}"
    if got != want:
        raise UnsupportedModelError(
            "data does not fit the shape", where=where, got=f"{got} {unit}", expected=f"{want} for {list(tensor.dims)}"
        )


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of a tensor's elements."""
    if tensor.data_type in PACKED_BITS:
        return -(-math.prod(tensor.dims) * PACKED_BITS[tensor.data_type] // 8)
    return math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _check_opsets(proto: onnx.ModelProto) -> None:
    versions: dict[str, int] = {}
    for opset in proto.opset_import:
        domain = "" if opset.domain == "ai.onnx" else opset.domain
        if versions.setdefault(domain, opset.version) != opset.version:
            raise UnsupportedModelError(
                "two versions of one opset", where=f"opset '{domain or 'ai.onnx'}'", got=opset.version,
                expected=versions[domain],
            )  # fmt: skip
    newest = onnx.defs.onnx_opset_version()
    if not 0 < versions.get("", 1) <= newest:
        raise UnsupportedModelError(
            "unknown opset", where="opset 'ai.onnx'", got=versions[""], expected=f"1 to {newest}"
        )
    for node in proto.graph.node:
        if domain_of(node) not in versions:
            raise UnsupportedModelError(
                f"the model imports no opset of its domain '{domain_of(node) or 'ai.onnx'}'",
                where=f"node '{node.name}' ({node.op_type})",
                expected=", ".join(name or "ai.onnx" for name in versions),
                hint="add the domain to the model's opset_import",
            )


def _check_names(graph: onnx.GraphProto) -> None:
    """Every value is defined once, and before it is read."""
    defined: dict[str, str] = {}
    for name, what in _definitions(graph):
        if name in defined:
            raise UnsupportedModelError(
                f"'{name}' is defined twice", where=what, got=f"also {defined[name]}", hint="give it a name of its own"
            )
        defined[name] = what
    known = {v.name for v in graph.input} | {t.name for t in graph.initializer}
    for node in graph.node:
        missing = next((name for name in node.input if name and name not in known), None)
        if missing is not None:
            raise UnsupportedModelError(
                f"its input '{missing}' is not there yet: the nodes are out of order or in a cycle"
                if missing in defined
                else f"nothing defines its input '{missing}'",
                where=f"node '{node.name}' ({node.op_type})",
                got=f"it comes from {defined[missing]}" if missing in defined else None,
                expected="nodes in the order in which they compute" if missing in defined else None,
                hint="export the model again" if missing not in defined else "sort the nodes, or break the cycle",
            )
        known.update(node.output)
    if not graph.output:
        raise UnsupportedModelError("it has no outputs", where="model", hint="export it with what it shall compute")
    outputs: set[str] = set()
    for value in graph.output:
        if value.name in outputs or not value.name or value.name not in known:
            raise UnsupportedModelError(
                "it is listed twice" if value.name in outputs else "nothing defines it",
                where=f"graph output '{value.name}'",
                hint="export the model again",
            )
        outputs.add(value.name)


def _definitions(graph: onnx.GraphProto) -> Iterator[tuple[str, str]]:
    """Name and place of each definition. An initializer may give an input its default: one definition."""
    inputs = {v.name for v in graph.input}
    for value in graph.input:
        yield value.name, f"graph input '{value.name}'"
    seen: set[str] = set()
    for tensor in graph.initializer:
        if tensor.name not in inputs or tensor.name in seen:
            yield tensor.name, f"initializer '{tensor.name}'"
        seen.add(tensor.name)
    for node in graph.node:
        for name in node.output:
            if name:
                yield name, f"node '{node.name}' ({node.op_type})"


def _check_value(value: onnx.ValueInfoProto, what: str, shape: bool = True) -> None:
    where = f"{what} '{value.name}'"
    tensor = value.type.tensor_type
    if tensor.elem_type not in DTYPES:
        raise UnsupportedModelError(
            "not a tensor of a type that is supported", where=where,
            got=_type_name(tensor.elem_type) if value.type.HasField("tensor_type") else value.type.WhichOneof("value"),
            expected=", ".join(_type_name(t) for t in DTYPES),
        )  # fmt: skip
    if shape and not tensor.HasField("shape"):
        raise UnsupportedModelError("it has no shape", where=where, hint="export the model with its inputs' shapes")
    dims = [dim.dim_value for dim in tensor.shape.dim]
    if len(dims) > MAX_RANK or any(d < 0 for d in dims) or math.prod(d or 1 for d in dims) > MAX_TENSOR_ELEMENTS:
        got = f"{len(dims)} axes" if len(dims) > MAX_RANK else dims
        raise UnsupportedModelError("impossible shape", where=where, got=got)


def _skeleton(proto: onnx.ModelProto) -> onnx.ModelProto:
    """What ONNX's checker shall see: no values of weights, and operators that ONNX does not define without attributes.

    Operators of ours are in ONNX's registry, with no attributes, once shape inference has run in the process.
    """
    skeleton = onnx.ModelProto(ir_version=max(proto.ir_version, 4))  # version 3 wants initializers among the inputs
    skeleton.opset_import.extend(proto.opset_import)
    skeleton.opset_import.add(domain=INTERNAL, version=1)
    graph = skeleton.graph
    graph.name = proto.graph.name or "graph"
    graph.node.extend(proto.graph.node)
    graph.input.extend(proto.graph.input)
    graph.output.extend(proto.graph.output)
    for tensor in proto.graph.initializer:
        graph.initializer.add(name=tensor.name, data_type=onnx.TensorProto.FLOAT, dims=[0], raw_data=b"")
    for node in graph.node:
        if domain_of(node) != "" or ("", node.op_type) in NOT_IN_ONNX:
            node.domain = INTERNAL
            del node.attribute[:]
    return skeleton
