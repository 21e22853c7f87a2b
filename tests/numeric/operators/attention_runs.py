"""Runs an attention operator with open dimensions, and over a KV cache of fixed capacity that is updated in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import harness
import iree.runtime as rt
import ml_dtypes
import numpy as np
import together
from iree.compiler import ir
from iree.compiler.api import Session
from iree.compiler.passmanager import PassManager
from iree.compiler.tools import InputType, compile_str
from linattn.dialect_patterns.emit.builder import Builder
from linattn.dialect_patterns.node import TensorSpec
from linattn.dialect_patterns.op import LoweringContext
from linattn.dialect_patterns.rewrite import lower_operators


def error(got: np.ndarray, want: np.ndarray) -> float:
    """max|d| / max|ref|; differing shapes and NaNs fail."""
    assert got.shape == want.shape
    got, want = got.astype(np.float64), want.astype(np.float64)
    assert np.isfinite(got).all()
    return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-30)) if want.size else 0.0


def open_axes(array: np.ndarray, axes: Sequence[int]) -> TensorSpec:
    spec = harness.spec(array)
    return replace(spec, shape=tuple(None if i in axes else d for i, d in enumerate(spec.shape)))


def load(vmfb: bytes, target: str) -> Any:
    harness.skip_unless_it_runs(target)
    context = rt.SystemContext(config=harness.device_config(target))
    context.add_vm_module(rt.VmModule.copy_buffer(context.instance, vmfb))
    return context.modules.module.main


def to_device(array: np.ndarray, target: str) -> Any:
    device = harness.device_config(target).device
    if array.dtype.name == "bfloat16":
        view = device.allocator.allocate_buffer_copy(  # asdevicearray drops its element_type (IREE 3.13)
            memory_type=rt.MemoryType.DEVICE_LOCAL, allowed_usage=rt.BufferUsage.DEFAULT, device=device,
            buffer=np.ascontiguousarray(array).view(np.uint16), element_type=rt.HalElementType.BFLOAT_16,
        )  # fmt: skip
        return rt.DeviceArray(device, view, override_dtype=np.dtype(np.uint16))
    return rt.asdevicearray(device, np.asarray(array, order="C"))  # ascontiguousarray would make [1] of a scalar


def to_host(array: Any, target: str, dtype: np.dtype) -> np.ndarray:
    host = harness._host(harness.device_config(target).device, array)
    return host.view(dtype) if dtype == ml_dtypes.bfloat16 else host


def run_open(
    op_type: str,
    inputs: Sequence[np.ndarray | None],
    attributes: Mapping[str, Any],
    axes: Mapping[int, Sequence[int]] | None = None,
    *,
    domain: str = "",
    version: int = 24,
    num_outputs: int = 3,
    target: str = "cpu",
) -> list[np.ndarray]:
    """One operator with the given axes of its inputs open; outputs of the type of the first input."""
    specs = [None if a is None else open_axes(a, (axes or {}).get(i, ())) for i, a in enumerate(inputs)]
    node = harness.node_for(domain, op_type, version, specs, attributes, num_outputs)
    main = together.function(node, target, harness.DEFAULTS)
    harness.skip_unless_it_runs(target)
    results = main(*[to_device(a, target) for a in inputs if a is not None])
    return [to_host(r, target, inputs[0].dtype) for r in results]


def capacity_module(
    op_type: str,
    domain: str,
    version: int,
    inputs: Sequence[TensorSpec | None],
    outputs: Sequence[TensorSpec],
    attributes: Mapping[str, Any],
    pasts: tuple[int, int],
) -> str:
    """An entry point that takes a position last and returns its two caches in the buffers that it got."""
    given = [(i, s) for i, s in enumerate(inputs) if s is not None]
    order = [i for i, _ in given]
    torch = [harness.torch_type(s) for s in outputs]
    tied = [torch[0], *(f"{t} {{iree.abi.tied = {order.index(p)}}}" for t, p in zip(torch[1:], pasts, strict=True))]
    attributes = {**attributes, "linattn.capacity": 1}
    attrs = "".join(f", torch.onnx.{k} = {harness._attribute(v)}" for k, v in attributes.items())
    operands = ", ".join("%none" if s is None else f"%a{i}" for i, s in enumerate(inputs))
    arguments = ", ".join(f"%a{i}: {harness.torch_type(s)}" for i, s in given)
    return f"""
func.func @main({arguments}, %position: !torch.int) -> ({", ".join(tied)})
    attributes {{torch.onnx_meta.opset_version = 23 : si64}} {{
  %none = torch.constant.none
  %r:3 = torch.operator "onnx.{op_type}"({operands}) {{linattn.domain = "{domain}", linattn.version = {version} : i64,
      linattn.node = "test"{attrs}}} : ({", ".join(harness.torch_type(s) for s in inputs)}) -> ({", ".join(torch)})
  return %r#0, %r#1, %r#2 : {", ".join(torch)}
}}"""


def capacity_lowered(text: str, session: Session, target: str) -> ir.Module:
    context = session.context
    context.load_all_available_dialects()
    with context, ir.Location.unknown():
        module = ir.Module.parse(text)
        assert lower_operators(module, LoweringContext(Builder(), harness.TARGETS[target])) == 1
        harness.set_device(module, target)
        module.operation.verify()
        return module


class CapacityRun:
    """One operator over caches of capacity M: :meth:`step` runs it and commits its tokens."""

    def __init__(
        self,
        op_type: str,
        domain: str,
        version: int,
        inputs: Sequence[np.ndarray | None],
        outputs: Sequence[TensorSpec],
        attributes: Mapping[str, Any],
        pasts: tuple[int, int],
        target: str,
    ) -> None:
        specs = [harness.spec(a) for a in inputs]
        self.text = capacity_module(op_type, domain, version, specs, outputs, attributes, pasts)
        self.target, self.pasts = target, pasts
        session = Session()
        session.set_flags(*harness.FLAGS[target], "--iree-input-type=none")
        module = capacity_lowered(self.text, session, target)
        self.lowered = str(module)
        self.function = load(harness.compile_module(module, session, target), target)
        self.dtype = inputs[0].dtype

    def step(self, inputs: Sequence[np.ndarray | None], caches: Sequence[Any], position: int) -> np.ndarray:
        """The output; ``caches`` are device arrays that are updated in place."""
        given = []
        for i, array in enumerate(inputs):
            if i in self.pasts:
                given.append(caches[self.pasts.index(i)])
            elif array is not None:
                given.append(to_device(array, self.target))
        results = self.function(*given, position)
        return to_host(results[0], self.target, self.dtype)


def stream_ir(text: str, target: str) -> str:
    """The entry point after IREE's stream passes: its dispatches and copies."""
    session = Session()
    module = capacity_lowered(text, session, target)
    with session.context, ir.Location.unknown():
        passes = "builtin.module(func.func(convert-torch-onnx-to-torch),torch-to-iree)"
        PassManager.parse(passes).run(module.operation)
    flags = [*harness.FLAGS[target], "--compile-to=stream"]
    return compile_str(str(module), input_type=InputType.NONE, extra_args=flags).decode()
