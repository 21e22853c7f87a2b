"""Slices that run backwards, as ONNX has them: IREE 3.13's importer takes a row too many where they start past the end.

ONNX cuts the start of such a slice to the last row; the importer cuts it to the number of rows, as of a slice that runs
forwards, and reads the row before the first one, which is not there. Steps that are computed it takes for positive.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from linattn.runtime.errors import UnsupportedModelError
from onnx import numpy_helper

from .index_tables import Shapes, operand
from .schema import domain_of

_FAR = (1 << 31) - 1
"""A start from here on means the last row, whatever the size: exporters write the largest number of 32 or 64 bits."""


def explicit_slices(graph: onnx.GraphProto, types: dict[str, onnx.TypeProto]) -> None:
    """Cut the starts of slices that run backwards to the last row.

    Args:
        graph: The graph, changed in place; what is constant in it is an initializer.
        types: Types of its values; those of new values are added.

    Raises:
        UnsupportedModelError: if a slice has computed steps, or runs backwards from where only a run can tell.
    """
    constants = {t.name: t for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL}
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "Slice" and domain_of(node) == "" and operand(node, 4):
            kept += _cut_start(graph, node, constants, types)
        kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


def _cut_start(
    graph: onnx.GraphProto,
    node: onnx.NodeProto,
    constants: Mapping[str, onnx.TensorProto],
    types: dict[str, onnx.TypeProto],
) -> list[onnx.NodeProto]:
    """Give a node a start that the importer takes rightly; returns the nodes before it that compute one."""
    starts, axes, steps = (
        numpy_helper.to_array(constants[name]) if (name := operand(node, port)) in constants else None
        for port in (1, 3, 4)
    )
    where = f"node '{node.name}' (Slice)"
    if steps is None or (axes is None and operand(node, 3)):
        hint = "export them as constants"
        raise UnsupportedModelError("computed steps and axes are not supported", where=where, hint=hint)
    if (steps > 0).all():
        return []
    axes = np.arange(steps.size) if axes is None else axes
    dtype = steps.dtype if starts is None else starts.dtype
    last = np.full(steps.shape, np.iinfo(dtype).max, dtype)
    for i in np.flatnonzero(steps < 0):
        size = Shapes(types).size(operand(node, 0), int(axes[i]))
        if size is not None:
            last[i] = size - 1
        elif starts is not None and (starts[i] < 0 or starts[i] >= _FAR):
            last[i] = -1 if starts[i] > 0 else starts[i]
        else:
            hint = "bind the size with --dim NAME=N"
            raise UnsupportedModelError("a slice that runs backwards over an open size", where=where, hint=hint)
    name = f"{node.output[0]}.start"
    if starts is not None:
        graph.initializer.append(numpy_helper.from_array(np.minimum(starts, last), name))
        node.input[1] = name
        return []
    graph.initializer.append(numpy_helper.from_array(last, f"{name}.last"))
    types[name] = types[node.input[1]]
    cut = onnx.helper.make_node("Min", [node.input[1], f"{name}.last"], [name], f"{node.name}.start")
    node.input[1] = name
    return [cut]
