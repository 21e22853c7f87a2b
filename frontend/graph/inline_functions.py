"""Functions that a model brings: bodies of operators that we lower ourselves go, the others are inlined."""

from __future__ import annotations

import onnx
import onnx.inliner
from linattn.dialect_patterns.registry import find_op
from linattn.runtime.errors import UnsupportedModelError

from .schema import opset_versions
from .validate import check_functions


def inline_functions(proto: onnx.ModelProto) -> None:
    """Drop function bodies of operators that we lower ourselves, inline the others, in place.

    Raises:
        UnsupportedModelError: if the functions call each other in a circle or cannot be inlined.
    """
    if not proto.functions:
        return
    versions = opset_versions(proto)
    kept = [f for f in proto.functions if find_op(f.domain, f.name, versions.get(f.domain, 1)) is None]
    del proto.functions[:]
    if kept:
        proto.functions.extend(kept)
        check_functions(proto)
        try:
            proto.CopyFrom(onnx.inliner.inline_local_functions(proto))
        except (RuntimeError, ValueError, TypeError) as error:
            raise UnsupportedModelError(
                "its functions cannot be inlined", where="model", hint=str(error).partition("\n")[0][:300]
            ) from error
