"""Runs one operator through its pattern and IREE, without the frontend: numpy arrays in, numpy arrays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import iree.runtime as rt
import numpy as np
import pytest
from iree.compiler import ir
from iree.compiler.api import Invocation, Output, Session
from linattn.dialect_patterns.emit.builder import Builder
from linattn.dialect_patterns.emit.dialect_modules import load_dialects
from linattn.dialect_patterns.node import Node, TensorSpec
from linattn.dialect_patterns.op import LoweringContext, LoweringOptions
from linattn.dialect_patterns.registry import find_op
from linattn.dialect_patterns.rewrite import lower_operators
from linattn.dialect_patterns.target import STACK_BYTES, Target
from linattn.frontend.lower.iree import execute, verify_between_passes
from linattn.frontend.lower.kept_roundings import keep_roundings
from linattn.frontend.lower.kernel_bodies import KernelBodies
from linattn.frontend.targets import TargetOptions, resolve_target, vulkan
from linattn.frontend.targets.vulkan_device import Device
from linattn.runtime.opening import open_device

FLAGS = {
    "cpu": [
        "--iree-hal-target-device=local",
        "--iree-hal-local-target-device-backends=llvm-cpu",
        "--iree-llvmcpu-target-cpu=host",
        f"--iree-llvmcpu-stack-allocation-limit={STACK_BYTES}",
    ],
    "vulkan": ["--iree-hal-target-device=vulkan"],
}
HOST = resolve_target("cpu", TargetOptions()).capabilities
# The Vulkan device of CI (lavapipe) with its subgroups of 8 threads, which the baseline does not use.
LAVAPIPE = Device(subgroup_size=8, max_threads=512, workgroup_memory=32_768, int64=True)
FLAGS["lavapipe"] = []
TARGETS = {
    "cpu": HOST,
    "vulkan": Target("vulkan", is_gpu=True),
    "lavapipe": Target("vulkan", is_gpu=True, subgroup_size=8, max_threads=512, workgroup_memory=32_768),
}
TARGETS["cuda"] = resolve_target("cuda", TargetOptions()).capabilities
# What --target vulkan compiles for by itself; "vulkan" above is IREE's own description.
FLAGS["baseline"], TARGETS["baseline"] = [], TARGETS["vulkan"]
DEVICE_ATTRIBUTES = {
    "lavapipe": vulkan.device_attribute("lavapipe", LAVAPIPE),
    "baseline": vulkan.resolve(TargetOptions()).device_attribute,
}
DEFAULTS = LoweringOptions()
DRIVERS = {"cpu": "cpu", "vulkan": "vulkan", "lavapipe": "vulkan", "baseline": "vulkan"}
# CPUs by what --cpu-features names them: vectors of 128 bits (without fused multiply-adds), 256 and 512 bits, and those
# whose instructions for products of bytes are others. What a kernel does depends on these, not on the machine at hand.
CPUS = {
    "cpu128": "x86-64-v2",
    "cpu256": "x86-64-v3",
    "cpu512": "x86-64-v4",
    "cpu256vnni": "+avx2,+fma,+f16c,+avxvnni",
    "cpu512vnni": "cascadelake",
}
WIDTHS = ["cpu128", "cpu256", "cpu512"]
for _name, _features in CPUS.items():
    _cpu = resolve_target("cpu", TargetOptions(cpu_features=_features))
    FLAGS[_name], TARGETS[_name], DRIVERS[_name] = list(_cpu.flags), _cpu.capabilities, "cpu"
# AVX-VNNI's instruction is AVX-512's of 256 bits in another encoding: a machine with that one runs the same kernel.
if {"avx512vl", "avx512vnni"} <= HOST.features and "avxvnni" not in HOST.features:
    _cpu = resolve_target("cpu", TargetOptions(cpu_features="+avx2,+fma,+f16c,+avx512vl,+avx512vnni"))
    FLAGS["cpu256vnni"] = list(_cpu.flags)
    HOST_RUNS = HOST.features | {"avxvnni"}
else:
    HOST_RUNS = HOST.features
DTYPES = {
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "int64": "i64",
    "int32": "i32",
    "bool": "i1",
    "uint8": "i8",
    "int8": "i8",
}
TORCH = {"i64": "si64", "i32": "si32", "i8": "ui8"}


def missing_features(target: str) -> frozenset[str]:
    """What this CPU lacks of what a target's code uses."""
    return TARGETS[target].features - HOST_RUNS if target in CPUS else frozenset[str]()


def skip_unless_it_runs(target: str) -> None:
    """Call between compiling and running: a test for a CPU that has more than this one ends there."""
    missing = missing_features(target)
    if missing:
        pytest.skip(f"compiled, not run: this CPU lacks {', '.join(sorted(missing))}")


def spec(array: np.ndarray | None, open_dims: bool = False) -> TensorSpec | None:
    if array is None:
        return None
    return TensorSpec(tuple(None if open_dims else d for d in array.shape), DTYPES[array.dtype.name])


def opened(tensor: TensorSpec | None, axes: Sequence[int]) -> TensorSpec | None:
    if tensor is None:
        return None
    return TensorSpec(tuple(None if i in axes else d for i, d in enumerate(tensor.shape)), tensor.dtype)


def torch_type(spec: TensorSpec | None) -> str:
    if spec is None:
        return "!torch.none"
    dims = ",".join("?" if d is None else str(d) for d in spec.shape)
    return f"!torch.vtensor<[{dims}],{TORCH.get(spec.dtype, spec.dtype)}>"


def _attribute(value: Any) -> str:
    if isinstance(value, bool | int):
        return f"{int(value)} : si64"
    if isinstance(value, float):
        return f"{value!r} : f32" if "e" not in repr(value) or "." in repr(value) else f"{float(value):.17e} : f32"
    if isinstance(value, str):
        return f'"{value}"'
    return "[" + ", ".join(_attribute(v) for v in value) + "]"


def node_for(
    domain: str,
    op_type: str,
    version: int,
    inputs: Sequence[TensorSpec | None],
    attributes: Mapping[str, Any],
    num_outputs: int,
    used: Sequence[bool] | None = None,
) -> Node:
    used = (True,) * num_outputs if used is None else tuple(bool(u) for u in used)
    return Node("test", domain, op_type, version, tuple(inputs), num_outputs, dict(attributes), used)


def module_text(
    domain: str,
    op_type: str,
    version: int,
    inputs: Sequence[TensorSpec | None],
    outputs: Sequence[TensorSpec | None],
    attributes: Mapping[str, Any],
    name: str = "main",
) -> str:
    """The function ``name`` around one imported operator, as the importer would leave it."""
    given = [(i, s) for i, s in enumerate(inputs) if s is not None]
    wanted = [(i, s) for i, s in enumerate(outputs) if s is not None]
    operands = ", ".join("%none" if s is None else f"%a{i}" for i, s in enumerate(inputs))
    attrs = "".join(f", torch.onnx.{k} = {_attribute(v)}" for k, v in attributes.items())
    results = f"%r:{len(outputs)}" if len(outputs) > 1 else "%r"
    returned = ", ".join(f"%r#{i}" if len(outputs) > 1 else "%r" for i, _ in wanted)
    arguments = ", ".join(f"%a{i}: {torch_type(s)}" for i, s in given)
    types = ", ".join(torch_type(s) for _, s in wanted)
    return f"""
func.func @{name}({arguments}) -> ({types})
    attributes {{torch.onnx_meta.opset_version = {max(version, 17)} : si64}} {{
  %none = torch.constant.none
  {results} = torch.operator "onnx.{op_type}"({operands}) {{linattn.domain = "{domain}",
      linattn.version = {version} : i64, linattn.node = "test"{attrs}}}
    : ({", ".join(torch_type(s) for s in inputs)}) -> ({", ".join(torch_type(s) for s in outputs)})
  return {returned} : {types}
}}"""


def lowered(
    domain: str,
    op_type: str,
    version: int,
    inputs: Sequence[TensorSpec | None],
    attributes: Mapping[str, Any],
    num_outputs: int,
    target: str = "cpu",
    options: LoweringOptions = DEFAULTS,
    context: ir.Context | None = None,
    used: Sequence[bool] | None = None,
) -> ir.Module:
    """The module after the patterns, still with torch types at its edges."""
    node = node_for(domain, op_type, version, inputs, attributes, num_outputs, used)
    return lowered_all([node], target, options, context)


def lowered_all(
    nodes: Sequence[Node],
    target: str = "cpu",
    options: LoweringOptions = DEFAULTS,
    context: ir.Context | None = None,
) -> ir.Module:
    """The same for many operators, each in a function of its own: ``main``, ``main1``, ``main2`` and so on."""
    texts: list[str] = []
    for i, node in enumerate(nodes):
        entry = find_op(node.domain, node.op_type, node.version)
        assert entry is not None, f"no pattern for {node.domain}.{node.op_type} {node.version}"
        outputs = list(entry.output_types(entry.parse(node)))
        if not all(node.used_outputs):
            outputs = [o if u else None for o, u in zip(outputs, node.used_outputs, strict=True)]
        what = (node.domain, node.op_type, node.version, node.inputs, outputs, node.attributes)
        texts.append(module_text(*what, name=f"main{i or ''}"))
    context = context or ir.Context()
    load_dialects(context)
    with context, ir.Location.unknown():
        module = ir.Module.parse("\n".join(texts))
        assert lower_operators(module, LoweringContext(Builder(), TARGETS[target], options)) == len(nodes)
        set_device(module, target)
        module.operation.verify()
        return module


def compile_for_cuda(domain: str, op_type: str, version: int, inputs: Sequence[TensorSpec | None]) -> bytes:
    """A module of one operator for sm_80: what can be looked at, not run."""
    session = Session()
    session.set_flags("--iree-hal-target-device=cuda", "--iree-cuda-target=sm_80", "--iree-input-type=none")
    module = lowered(domain, op_type, version, inputs, {}, 1, "cuda", context=session.context)
    return compile_module(module, session, "cuda")


def set_device(module: ir.Module, target: str) -> None:
    """Describe the device in the module, for targets that flags do not describe."""
    if target in DEVICE_ATTRIBUTES:
        attribute = ir.Attribute.parse(DEVICE_ATTRIBUTES[target], module.context)
        module.operation.attributes["hal.device.targets"] = attribute


def device_config(target: str) -> rt.Config:
    """The runtime's own device: opened by IREE alone, lavapipe's would spin on both cores from then on."""
    return rt.Config(device=open_device(DRIVERS[target]).hal_device)


def _host(device: Any, array: Any) -> np.ndarray:
    """Through a staging buffer: lavapipe cannot import host memory."""
    view = array._buffer_view
    dtype = np.dtype(np.uint16) if "bfloat" in str(array.dtype) else np.dtype(array.dtype)
    if 0 in view.shape:
        return np.zeros(view.shape, dtype)
    source = view.get_buffer()
    staging = device.allocator.allocate_buffer(
        memory_type=int(rt.MemoryType.HOST_LOCAL | rt.MemoryType.DEVICE_VISIBLE),
        allowed_usage=int(rt.BufferUsage.TRANSFER_TARGET | rt.BufferUsage.MAPPING_SCOPED),
        allocation_size=source.byte_length(),
    )
    semaphore = device.create_semaphore(0)
    done = rt.HalFence.create_at(semaphore, 1)
    device.queue_copy(source, staging, wait_semaphores=rt.HalFence.create_at(semaphore, 0), signal_semaphores=done)
    done.wait()
    return staging.map().asarray(view.shape, dtype).copy()


def compile_module(module: ir.Module, session: Session, target: str) -> bytes:
    """As the compiler does: kernels are out of the module where IREE would only walk through them."""
    from iree.compiler.passmanager import PassManager

    with session.context, ir.Location.unknown():
        bodies = KernelBodies(module.operation)
        PassManager.parse("builtin.module(func.func(convert-torch-onnx-to-torch),torch-to-iree)").run(module.operation)
        bodies.put_back(module.operation)
    invocation = Invocation(session)
    invocation.enable_console_diagnostics()
    invocation.import_module(module.operation)
    verify_between_passes(invocation, False)
    assert execute(invocation, "ToPhase", "global-optimization"), "IREE failed"
    with session.context, ir.Location.unknown():
        bodies = KernelBodies(module.operation)
    assert execute(invocation, "FromPhase", "global-optimization", "ToPhase", "executable-sources"), "IREE failed"
    with session.context, ir.Location.unknown():
        bodies.put_back(module.operation)
    assert execute(invocation, "FromPhase", "executable-sources", "ToPhase", "executable-targets"), "IREE failed"
    with session.context, ir.Location.unknown():
        keep_roundings(module.operation)
    assert execute(invocation, "FromPhase", "executable-targets", "ToPhase", "end"), "IREE failed"
    module.operation.verify()
    output = Output.open_membuffer()
    invocation.output_vm_bytecode(output)
    return bytes(output.map_memory())


def run_op(
    op_type: str,
    inputs: Sequence[np.ndarray | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    domain: str = "",
    version: int = 24,
    num_outputs: int = 1,
    target: str = "cpu",
    open_dims: bool = False,
    open_axes: Mapping[int, Sequence[int]] | None = None,
    options: LoweringOptions = DEFAULTS,
    used: Sequence[bool] | None = None,
) -> list[np.ndarray]:
    """Lower, compile and run one operator; the outputs that ``used`` marks (default all) as numpy arrays.

    ``open_dims`` opens every dimension of every input, ``open_axes`` the given ones (input index -> axes).

    bfloat16 inputs are ml_dtypes arrays; bfloat16 outputs come back as ml_dtypes too.
    """
    from together import function

    specs = [opened(spec(a, open_dims), (open_axes or {}).get(i, ())) for i, a in enumerate(inputs)]
    node = node_for(domain, op_type, version, specs, attributes or {}, num_outputs, used)
    main = function(node, target, options)
    skip_unless_it_runs(target)
    config = device_config(target)
    arrays = []
    for array in inputs:
        if array is None:
            continue
        if array.dtype.name == "bfloat16":
            # asdevicearray drops its element_type (IREE 3.13)
            view = config.device.allocator.allocate_buffer_copy(
                memory_type=rt.MemoryType.DEVICE_LOCAL,
                allowed_usage=rt.BufferUsage.DEFAULT,
                device=config.device,
                buffer=np.ascontiguousarray(array).view(np.uint16),
                element_type=rt.HalElementType.BFLOAT_16,
            )
            arrays.append(rt.DeviceArray(config.device, view, override_dtype=np.dtype(np.uint16)))
        else:
            arrays.append(rt.asdevicearray(config.device, np.asarray(array, order="C")))
    results = main(*arrays)
    results = results if isinstance(results, tuple | list) else [results]
    host = [_host(config.device, r) for r in results]
    bf16 = [
        "bf16" in str(r._buffer_view.element_type)
        or "BFLOAT" in str(rt.HalElementType(r._buffer_view.element_type)).upper()
        for r in results
    ]
    if any(bf16):
        import ml_dtypes

        host = [
            h.view(np.uint16).view(ml_dtypes.bfloat16) if is_bf16 else h for h, is_bf16 in zip(host, bf16, strict=True)
        ]
    return host
