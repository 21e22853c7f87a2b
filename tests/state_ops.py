"""Compiles LinearAttention and CausalConvWithState once per configuration and runs many inputs through the module."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import iree.runtime as rt
import ml_dtypes
import numpy as np
from harness import DTYPES, FLAGS, _host, compile_module, device_config, lowered
from iree.compiler import ir
from iree.compiler.api import Session
from linattn.dialect_patterns.node import TensorSpec
from linattn.dialect_patterns.op import MICROSOFT, LoweringOptions
from linattn.frontend.targets import vulkan
from linattn.frontend.targets.base import TargetOptions

Attributes = tuple[tuple[str, Any], ...]
OPEN_AXES = {
    "LinearAttention": ((0, 1), (0, 1), (0, 1), (0,), (0, 1), (0, 1)),
    "CausalConvWithState": ((0, 2), (), (), (0,)),
}

VULKAN = vulkan.resolve(TargetOptions()).device_attribute


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


@lru_cache(maxsize=256)
def compiled(
    op_type: str,
    domain: str,
    specs: tuple[TensorSpec | None, ...],
    attributes: Attributes,
    target: str,
    options: LoweringOptions,
) -> Any:
    """The loaded function of one configuration."""
    session = Session()
    session.set_flags(*([] if target == "vulkan" else FLAGS[target]), "--iree-input-type=none")
    version = 1 if domain == MICROSOFT else 27
    module = lowered(domain, op_type, version, specs, dict(attributes), 2, target, options, session.context)
    if target == "vulkan":
        module.operation.attributes["hal.device.targets"] = ir.Attribute.parse(VULKAN, session.context)
    context = rt.SystemContext(config=device_config(target))
    context.add_vm_module(rt.VmModule.copy_buffer(context.instance, compile_module(module, session, target)))
    return context.modules.module.main


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
    specs = specs_of(op_type, inputs, open_dims)
    function = compiled(op_type, domain, specs, tuple(sorted(attributes.items())), target, options)
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
