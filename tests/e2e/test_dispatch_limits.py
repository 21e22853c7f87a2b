"""No dispatch has more of anything than the driver takes; what would is refused by name before a module is written."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import onnx
import pytest
from linattn.frontend.compile import CompileOptions, compile_model
from linattn.frontend.lower.executables import type_bytes
from linattn.frontend.targets import TARGETS, CompileTarget, TargetOptions, cuda, vulkan
from linattn.runtime.errors import LoweringError
from onnx import TensorProto, helper, numpy_helper

WIDTH = 64
CUDA_BINDINGS = 16  # IREE 3.13, runtime/src/iree/hal/drivers/cuda/native_executable.h


def model(products: int, shape: tuple[int | str, ...] = (1, 1, WIDTH)) -> onnx.ModelProto:
    """Products of one value, as many experts or a block with many projections have them, and their sum."""
    value = helper.make_tensor_value_info
    weights = np.random.default_rng(1).standard_normal((products, WIDTH, WIDTH)).astype(np.float32)
    names = [f"y{i}" for i in range(products)]
    nodes = [helper.make_node("MatMul", ["x", f"w{i}"], [name], f"product{i}") for i, name in enumerate(names)]
    nodes.append(helper.make_node("Softmax", ["x"], ["p"], "softmax", axis=-1))
    nodes.append(helper.make_node("Sum", ["p", *names], ["y"], "sum"))
    initializers = [numpy_helper.from_array(weight, f"w{i}") for i, weight in enumerate(weights)]
    ends = [value("x", TensorProto.FLOAT, shape)], [value("y", TensorProto.FLOAT, shape)]
    graph = helper.make_graph(nodes, "products", *ends, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def kernel_bindings(module: bytes) -> dict[str, int]:
    """Kernel -> pointers among its parameters, read off the PTX in a module."""
    found = re.findall(rb"\.entry ([\w$]+)\((.*?)\)", module, re.DOTALL)
    return {name.decode(): parameters.count(b".u64") for name, parameters in found}


@pytest.mark.parametrize("products", [8, 17])
def test_products_of_one_value_fit_into_the_bindings_of_cuda(products: int) -> None:
    module = compile_model(model(products), CompileOptions(target="cuda")).module
    bindings = kernel_bindings(module)
    joined = [name for name in bindings if name.startswith("mat_mul_fused_simt") and "_of" in name]
    assert joined
    assert max(bindings.values()) <= CUDA_BINDINGS, bindings


REFUSED = {
    "bindings": (5, "bindings, got 9, expected at most 5"),
    "memory": (100, "bytes of shared memory, got"),
    "declared": (100, "declared bytes of shared memory, got"),
    "threads": (8, "threads of a workgroup, got"),
    "sizes": ((8, 1, 1), "threads of a workgroup along x, got"),
    "counts": ((1, 1, 1), "workgroups along x, got"),
}
OF_LAUNCH = ("cuda", "declared")  # all memory is the launch's


def stricter(target: CompileTarget, **limits: Any) -> CompileTarget:
    known = target.capabilities
    return dataclasses.replace(
        target,
        capabilities=dataclasses.replace(known, limits=dataclasses.replace(known.limits, **limits)),
    )


@pytest.mark.parametrize(
    ("name", "limit"), [(name, limit) for name in ("cuda", "vulkan") for limit in REFUSED if (name, limit) != OF_LAUNCH]
)
def test_what_breaks_a_limit_is_refused(name: str, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value, words = REFUSED[limit]
    module = {"cuda": cuda, "vulkan": vulkan}[name]
    monkeypatch.setitem(TARGETS, name, lambda options: stricter(module.resolve(options), **{limit: value}))
    if limit == "bindings":  # joined for another driver than the one that is checked
        monkeypatch.setattr("linattn.frontend.graph.join_products.most_products", lambda target: 4)
        monkeypatch.setattr("linattn.dialect_patterns.mat_mul.joined.most_products", lambda target: 4)
    with pytest.raises(LoweringError) as error:
        compile_model(model(4), CompileOptions(target=name))
    text = str(error.value)
    assert words in text
    assert re.match(r"node '(product\d(\.joined)?|softmax|sum)'", text), text
    assert "the dispatch " in text
    assert "\n" not in text


def test_push_constants_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "vulkan", lambda options: stricter(vulkan.resolve(options), constants=0))
    with pytest.raises(LoweringError, match=r"push constants, got \d+, expected at most 0"):
        compile_model(model(2, ("batch", "seq", WIDTH)), CompileOptions(target="vulkan"))


def test_the_limits_of_cuda_follow_the_architecture() -> None:
    for architecture, memory in cuda.KNOWN.items():
        known = cuda.resolve(TargetOptions(gpu_target=f"sm_{architecture}")).capabilities
        assert known.limits.memory == memory
        assert 2 * known.workgroup_memory <= memory  # two workgroups on an SM
        assert known.copy_memory <= memory


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("!spirv.struct<(!spirv.array<512 x f32>)>", 2048),
        ("!spirv.struct<(!spirv.array<24 x vector<4xf16>, stride=8>)>", 192),
        ("!llvm.array<0 x i8>", 0),
        ("!llvm.array<1 x array<3 x array<18 x f32>>>", 216),
        ("!llvm.array<8 x vector<4xbf16>>", 64),
        ("f64", 8),
        ("i1", 1),
    ],
)
def test_size_of_a_type(text: str, size: int) -> None:
    assert type_bytes(text) == size
