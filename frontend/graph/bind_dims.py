"""Symbolic dims that the user gives sizes (``--dim NAME=N``)."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from linattn.runtime.errors import UnsupportedModelError


def bind_dims(proto: onnx.ModelProto, dims: Mapping[str, int]) -> None:
    """Write sizes where the model has symbols, in place.

    Args:
        proto: The model.
        dims: Symbol -> size.

    Raises:
        UnsupportedModelError: if the model has no such symbol.
    """
    graph = proto.graph
    found: set[str] = set()
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                found.add(dim.dim_param)
                if dim.dim_param in dims:
                    dim.dim_value = dims[dim.dim_param]
    for name in dims:
        if name not in found:
            known = ", ".join(sorted(found)) or "none"
            raise UnsupportedModelError("the model has no such dim", where=f"--dim {name}", expected=known)
