"""Inner values as outputs (`--extra-output`): hidden states and embeddings that a graph computes on its way."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

import onnx
from linattn.runtime.errors import InputError

from .schema import infer_types


def add_outputs(proto: onnx.ModelProto, names: Sequence[str]) -> None:
    """Make values of the graph outputs of it, in place, after those that it has.

    Raises:
        InputError: There is no such value, it is an output or an input already, or nothing tells its type.
    """
    if not names:
        return
    graph = proto.graph
    inner = [name for node in graph.node for name in node.output if name]
    known = {value.name for value in graph.output}
    types = infer_types(proto) | {value.name: value.type for value in graph.value_info}
    for name in names:
        where = f"--extra-output {name}"
        if name in known:
            raise InputError("is an output already", where=where)
        if name not in inner:
            near = get_close_matches(name, inner, 3, 0.3)
            raise InputError("the graph computes no such value", where=where, expected=", ".join(near) or None)
        found = types.get(name)
        if found is None or not found.tensor_type.elem_type or not found.tensor_type.HasField("shape"):
            hint = "run onnx.shape_inference, or give it a value_info"
            raise InputError("its type is not known", where=where, hint=hint)
        value = graph.output.add(name=name)
        value.type.CopyFrom(found)
        known.add(name)
