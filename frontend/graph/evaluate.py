"""One node computed by ONNX's reference evaluator, its failures as errors of ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from linattn.runtime.errors import UnsupportedModelError
from onnx.reference import ReferenceEvaluator


def evaluate_node(node: onnx.NodeProto, inputs: list[np.ndarray[Any, Any] | None]) -> list[np.ndarray[Any, Any]]:
    """The node's outputs.

    Args:
        node: A node of the default domain.
        inputs: Its inputs in order, None where one is left out.

    Raises:
        UnsupportedModelError: if the values do not fit the operator.
    """
    feeds = {name: value for name, value in zip(node.input, inputs, strict=True) if name and value is not None}
    try:
        with np.errstate(all="ignore"):
            evaluator: Any = ReferenceEvaluator(node)
            results: Any = evaluator.run(None, feeds)
            arrays = [np.asarray(r) for r in results]
    except Exception as error:  # whatever numpy, or onnx's Python, says of values that do not fit the operator
        raise UnsupportedModelError(
            f"cannot be computed from its constant inputs: {' '.join(str(error).split())[:200]}",
            where=f"node '{node.name}' ({node.op_type})",
            got=", ".join(f"{a.dtype}{list(a.shape)}" for a in feeds.values()) or None,
        ) from error
    return arrays
