"""Reshapes say their sizes: the importer takes no 0, and gets some forms with -1 wrong."""

from __future__ import annotations

import numpy as np
import onnx
from linattn.dialect_patterns.node import TensorSpec
from onnx import numpy_helper

from .schema import domain_of, spec_of_type, type_of_spec


def explicit_reshapes(graph: onnx.GraphProto, types: dict[str, onnx.TypeProto]) -> None:
    """Write a reshape's target as sizes where the result is static: no 0 and no -1 left to the importer."""
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        kept.append(node)
        if node.op_type != "Reshape" or domain_of(node) != "":
            continue
        source, result = spec_of_type(types.get(node.input[0])), spec_of_type(types.get(node.output[0]))
        if source is None or result is None:
            continue
        if None not in result.shape:
            _set_target(graph, node, [d or 0 for d in result.shape])
            continue
        last = source.shape[-1] if source.rank else None
        if source.shape.count(None) > 1 and result.rank == 2 and result.shape[0] is None and last and result.shape[1]:
            # The importer gets [?, ?, 512] -> [-1, 128] wrong (a static size of 0), by way of [0, 0, 4, 128] right.
            split = onnx.helper.make_node(
                "Reshape", [node.input[0], ""], [f"{node.output[0]}.split"], f"{node.name}.split"
            )
            sizes = [0] * (source.rank - 1) + [last // result.shape[1], result.shape[1]]
            if sizes[-2] * sizes[-1] == last:
                _set_target(graph, split, sizes)
                shape = (*source.shape[:-1], *sizes[-2:])
                types[split.output[0]] = type_of_spec(TensorSpec(shape, source.dtype))
                node.input[0] = split.output[0]
                kept.insert(-1, split)
    del graph.node[:]
    graph.node.extend(kept)


def _set_target(graph: onnx.GraphProto, node: onnx.NodeProto, sizes: list[int]) -> None:
    name = f"{node.output[0]}.shape"
    graph.initializer.append(numpy_helper.from_array(np.array(sizes, np.int64), name))
    node.input[1] = name
    if 0 not in sizes:
        del node.attribute[:]  # allowzero says nothing any more
