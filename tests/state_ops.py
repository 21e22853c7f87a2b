"""Compiles LinearAttention and CausalConvWithState once per configuration and runs many inputs through the module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import iree.runtime as rt
import ml_dtypes
import numpy as np
from harness import DTYPES, _host, device_config, skip_unless_it_runs
from linattn.dialect_patterns.node import Node, TensorSpec
from linattn.dialect_patterns.op import MICROSOFT, LoweringOptions
from together import functions

OPEN_AXES = {
    "LinearAttention": ((0, 1), (0, 1), (0, 1), (0,), (0, 1), (0, 1)),
    "CausalConvWithState": ((0, 2), (), (), (0,)),
    "SelectiveScan": ((0, 1), (0, 1), (), (0, 1), (0, 1), (0,)),
}


def specs_of(op_type: str, inputs: Sequence[np.ndarray | None], open_dims: bool | str) -> tuple[TensorSpec | None, ...]:
    """The types of arrays, with batch and tokens open if asked, or with "tokens" only these."""
    return tuple(
        None
        if array is None
        else TensorSpec(
            tuple(
                None if open_dims and axis in axes and (axis or open_dims is True) else size
                for axis, size in enumerate(array.shape)
            ),
            DTYPES[array.dtype.name],
        )
        for array, axes in zip(inputs, OPEN_AXES[op_type], strict=False)
    )


@dataclass(frozen=True)
class Call:
    """What one node is given.

    Attributes:
        inputs: Its operands, None for one that it lacks.
        attributes: Its attributes.
    """

    inputs: Sequence[np.ndarray | None]
    attributes: Mapping[str, Any]


def run(
    op_type: str,
    inputs: Sequence[np.ndarray | None],
    *,
    domain: str = "",
    target: str = "cpu",
    open_dims: bool | str = True,
    options: LoweringOptions = LoweringOptions(),  # noqa: B008
    **attributes: Any,
) -> list[np.ndarray]:
    """Output and present state; bfloat16 as ml_dtypes arrays."""
    calls = [Call(inputs, attributes)]
    return run_all(op_type, calls, domain=domain, target=target, open_dims=open_dims, options=options)[0]


def run_all(
    op_type: str,
    calls: Sequence[Call],
    *,
    domain: str = "",
    target: str = "cpu",
    open_dims: bool | str = True,
    options: LoweringOptions = LoweringOptions(),  # noqa: B008
) -> list[list[np.ndarray]]:
    """The same for many nodes, compiled together: much cheaper than one by one."""
    target = "baseline" if target == "vulkan" else target
    mains = functions([_node(op_type, domain, call, open_dims) for call in calls], target, options)
    skip_unless_it_runs(target)
    return [_call(main, c.inputs, target) for main, c in zip(mains, calls, strict=True)]


def _node(op_type: str, domain: str, call: Call, open_dims: bool | str) -> Node:
    version = 1 if domain == MICROSOFT else 27
    return Node("test", domain, op_type, version, specs_of(op_type, call.inputs, open_dims), 2, dict(call.attributes))


def _call(function: Any, inputs: Sequence[np.ndarray | None], target: str) -> list[np.ndarray]:
    device = device_config(target).device
    arrays = []
    for array in inputs:
        if array is None:
            continue
        if array.dtype == ml_dtypes.bfloat16:
            view = device.allocator.allocate_buffer_copy(
                memory_type=rt.MemoryType.DEVICE_LOCAL,
                allowed_usage=rt.BufferUsage.DEFAULT,
                device=device,
                buffer=np.ascontiguousarray(array).view(np.uint16),
                element_type=rt.HalElementType.BFLOAT_16,
            )
            arrays.append(rt.DeviceArray(device, view))
        else:
            arrays.append(rt.asdevicearray(device, np.ascontiguousarray(array)))
    dtypes = (inputs[0], inputs[3] if len(inputs) > 3 and inputs[3] is not None else inputs[0])
    return [
        host.view(ml_dtypes.bfloat16) if like is not None and like.dtype == ml_dtypes.bfloat16 else host
        for host, like in zip((_host(device, result) for result in function(*arrays)), dtypes, strict=True)
    ]
