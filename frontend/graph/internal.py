"""The domain of the operators that passes make, which models cannot contain."""

from __future__ import annotations

import onnx
from linattn.dialect_patterns.op import INTERNAL


def import_internal(proto: onnx.ModelProto) -> None:
    """Import the domain, once."""
    if all(opset.domain != INTERNAL for opset in proto.opset_import):
        proto.opset_import.append(onnx.helper.make_opsetid(INTERNAL, 1))
