"""Runs one operator through ONNX Runtime on the CPU: numpy arrays in, numpy arrays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime


def run_onnx_runtime(
    op_type: str,
    inputs: Sequence[np.ndarray | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    domain: str = "",
    version: int = 24,
    num_outputs: int = 1,
    used: Sequence[bool] | None = None,
    constants: Sequence[int] = (),
) -> list[np.ndarray]:
    """The outputs that ``used`` marks (default all).

    Inputs in ``constants`` become initializers: ONNX Runtime takes other kernels for constant weights.
    """
    used = used or [True] * num_outputs
    fixed = {f"in{i}": inputs[i] for i in constants}
    names = [f"in{i}" if a is not None else "" for i, a in enumerate(inputs)]
    outputs = [f"out{i}" if u else "" for i, u in enumerate(used)]
    node = onnx.helper.make_node(op_type, names, outputs, domain=domain, **(attributes or {}))
    graph = onnx.helper.make_graph(
        [node],
        "test",
        [
            onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in zip(names, inputs, strict=True)
            if a is not None and n not in fixed
        ],
        [onnx.helper.make_empty_tensor_value_info(n) for n in outputs if n],
        [onnx.numpy_helper.from_array(a, n) for n, a in fixed.items() if a is not None],
    )
    opsets = [onnx.helper.make_opsetid("", version if not domain else 21)]
    if domain:
        opsets.append(onnx.helper.make_opsetid(domain, 1))
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {n: a for n, a in zip(names, inputs, strict=True) if a is not None and n not in fixed})
