"""Reductions of signed integers for CUDA, whose warps IREE begins with the neutral numbers of unsigned ones."""

from __future__ import annotations

import re

import iree.runtime as rt
import numpy as np
import onnx
import pytest
from iree.compiler import ir
from iree.compiler.tools import compile_str
from linattn.dialect_patterns.unsigned_reductions import make_reductions_unsigned
from linattn.frontend.compile import CompileOptions, compile_model
from onnx import TensorProto, helper

REDUCTION = """
func.func @main(%x: tensor<4x96xTYPE>) -> tensor<4xTYPE> {
  %first = arith.constant START : TYPE
  %empty = tensor.empty() : tensor<4xTYPE>
  %init = linalg.fill ins(%first : TYPE) outs(%empty : tensor<4xTYPE>) -> tensor<4xTYPE>
  %y = linalg.generic {indexing_maps = [affine_map<(d0, d1) -> (d0, d1)>, affine_map<(d0, d1) -> (d0)>],
      iterator_types = ["parallel", "reduction"]} ins(%x : tensor<4x96xTYPE>) outs(%init : tensor<4xTYPE>) {
  ^bb0(%in: TYPE, %acc: TYPE):
    %m = arith.OP %in, %acc : TYPE
    linalg.yield %m : TYPE
  } -> tensor<4xTYPE>
  return %y : tensor<4xTYPE>
}
"""


@pytest.mark.parametrize("dtype", ["i32", "i64"])
@pytest.mark.parametrize("op", ["maxsi", "minsi"])
def test_the_same_numbers(op: str, dtype: str) -> None:
    bits = int(dtype[1:])
    start = -(1 << bits - 1) if op == "maxsi" else (1 << bits - 1) - 1
    text = REDUCTION.replace("TYPE", dtype).replace("OP", op).replace("START", str(start))
    with ir.Context() as context, ir.Location.unknown():
        context.load_all_available_dialects()
        module = ir.Module.parse(text)
        assert make_reductions_unsigned(module) == 1
        module.operation.verify()
        changed = str(module)
    assert "maxsi" not in changed
    assert "minsi" not in changed
    code = compile_str(changed, target_backends=["llvm-cpu"], extra_args=["--iree-llvmcpu-target-cpu=host"])
    numbers = np.random.default_rng(0).integers(-(1 << 30), 1 << 30, (4, 96)).astype(f"int{bits}")
    numbers[0], numbers[1], numbers[2, 5] = -np.abs(numbers[0]) - 1, np.abs(numbers[1]) + 1, np.iinfo(f"int{bits}").min
    found = rt.load_vm_flatbuffer(code, driver="local-sync").main(numbers).to_host()
    np.testing.assert_array_equal(found, numbers.max(1) if op == "maxsi" else numbers.min(1))


@pytest.mark.parametrize("op", ["ReduceMax", "ReduceMin"])
def test_a_model_for_cuda(op: str) -> None:
    x, y = (helper.make_tensor_value_info(n, TensorProto.INT32, s) for n, s in (("x", [4, 96]), ("y", [4, 1])))
    axes = onnx.numpy_helper.from_array(np.array([1], np.int64), "axes")
    graph = helper.make_graph([helper.make_node(op, ["x", "axes"], ["y"])], "g", [x], [y], [axes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    code = compile_model(model, CompileOptions(target="cuda")).module
    assert not re.search(rb"(max|min)\.s(32|64)", code)
