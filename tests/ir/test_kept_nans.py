"""NaN stays NaN on Vulkan, whatever a driver makes of exp(NaN); NVIDIA's made a number of it, on an H100."""

from __future__ import annotations

import iree.runtime as rt
import numpy as np
import onnx
import pytest
from iree.compiler import ir
from iree.compiler.tools import compile_str
from linattn.dialect_patterns.kept_nans import keep_nans
from linattn.frontend.compile import CompileOptions, compile_model
from onnx import TensorProto, helper

FUNCTIONS = ["erf", "exp", "exp2", "expm1", "log", "log1p", "log2", "tanh"]
ONE = """
func.func @main(%x: tensor<6xTYPE>) -> tensor<6xTYPE> {
  %empty = tensor.empty() : tensor<6xTYPE>
  %y = linalg.generic {indexing_maps = [affine_map<(d0) -> (d0)>, affine_map<(d0) -> (d0)>],
      iterator_types = ["parallel"]} ins(%x : tensor<6xTYPE>) outs(%empty : tensor<6xTYPE>) {
  ^bb0(%in: TYPE, %out: TYPE):
    %value = math.OP %in : TYPE
    linalg.yield %value : TYPE
  } -> tensor<6xTYPE>
  return %y : tensor<6xTYPE>
}
"""
VALUES = [0.5, np.nan, np.inf, -np.nan, 3.0, 0.0]


def kept(text: str) -> tuple[int, str]:
    with ir.Context() as context, ir.Location.unknown():
        context.load_all_available_dialects()
        module = ir.Module.parse(text)
        count = keep_nans(module)
        module.operation.verify()
        return count, str(module)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_same_numbers_and_nan_as_it_was(name: str) -> None:
    count, text = kept(ONE.replace("OP", name).replace("TYPE", "f32"))
    assert count == 1
    found, plain = (run(t, np.float32) for t in (text, ONE.replace("OP", name).replace("TYPE", "f32")))
    np.testing.assert_array_equal(found, plain)
    x = np.array(VALUES, np.float32)
    np.testing.assert_array_equal(found[[1, 3]].view(np.uint32), x[[1, 3]].view(np.uint32))


def run(text: str, dtype: type) -> np.ndarray:
    code = compile_str(text, target_backends=["llvm-cpu"], extra_args=["--iree-llvmcpu-target-cpu=host"])
    return rt.load_vm_flatbuffer(code, driver="local-sync").main(np.array(VALUES, dtype)).to_host()


def test_where_the_function_forgets_it() -> None:
    """As that driver does: the number that it makes is not taken where the argument is NaN."""
    _, text = kept(ONE.replace("OP", "exp").replace("TYPE", "f32"))
    forgets = "arith.constant 7.0 : f32"
    assert text.count("math.exp %in : f32") == 1
    np.testing.assert_array_equal(
        run(text.replace("math.exp %in : f32", forgets), np.float32), [7, np.nan, 7, np.nan, 7, 7]
    )


@pytest.mark.parametrize("dtype", ["f16", "bf16", "vector<4xf32>", "vector<2xf16>"])
def test_other_types(dtype: str) -> None:
    body = f"func.func @f(%x: {dtype}) -> {dtype} {{ %y = math.exp %x : {dtype}\n return %y : {dtype} }}"
    count, text = kept(body)
    assert count == 1
    assert "arith.select" in text
    assert "i16" not in text  # which not every Vulkan device has


def test_doubles_are_left() -> None:
    assert kept("func.func @f(%x: f64) -> f64 { %y = math.exp %x : f64\n return %y : f64 }")[0] == 0


@pytest.mark.parametrize(("target", "is_kept"), [("vulkan", True), ("cuda", False), ("cpu", False)])
def test_models(target: str, is_kept: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of the operators that IREE converts as of our own kernels."""
    folder = tmp_path_factory.mktemp("ir")
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, 8]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Sigmoid", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    compile_model(onnx.load_from_string(model.SerializeToString()), CompileOptions(target=target, dump_ir=folder))
    text = next(folder.glob("*-linalg.mlir")).read_text()
    assert "math.exp" in text
    assert ("2139095040" in text) == is_kept
