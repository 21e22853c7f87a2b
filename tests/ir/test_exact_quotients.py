"""Quotients are right where a division is off by some units in the last place, as Vulkan's may be and NVIDIA's is."""

from __future__ import annotations

import re
from pathlib import Path

import iree.runtime as rt
import numpy as np
import pytest
from iree.compiler import ir
from iree.compiler.tools import compile_str
from linattn.dialect_patterns.exact_quotients import correct_quotients
from linattn.frontend.compile import CompileOptions, compile_model
from onnx import TensorProto, helper

ONE = """
func.func @main(%a: tensor<NxTYPE>, %b: tensor<NxTYPE>) -> tensor<NxTYPE> {
  %empty = tensor.empty() : tensor<NxTYPE>
  %y = linalg.generic {indexing_maps = [affine_map<(d0) -> (d0)>, affine_map<(d0) -> (d0)>, affine_map<(d0) -> (d0)>],
      iterator_types = ["parallel"]} ins(%a, %b : tensor<NxTYPE>, tensor<NxTYPE>) outs(%empty : tensor<NxTYPE>) {
  ^bb0(%x: TYPE, %z: TYPE, %out: TYPE):
    %value = arith.divf %x, %z : TYPE
    linalg.yield %value : TYPE
  } -> tensor<NxTYPE>
  return %y : tensor<NxTYPE>
}
"""
OFF = [1 - 2.0**-23, 1 + 2.0**-23, 1 - 2.0**-22, 1 + 2.0**-22]
ODD = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -3e38, 1e-35, 1.0, 7.0], np.float32)


def corrected(text: str) -> tuple[int, str]:
    with ir.Context() as context, ir.Location.unknown():
        context.load_all_available_dialects()
        module = ir.Module.parse(text)
        count = correct_quotients(module)
        module.operation.verify()
        return count, str(module)


def run(text: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    code = compile_str(text, target_backends=["llvm-cpu"], extra_args=["--iree-llvmcpu-target-cpu=host"])
    return rt.load_vm_flatbuffer(code, driver="local-sync").main(a, b).to_host()


def data() -> tuple[np.ndarray, np.ndarray]:
    """Whole quotients, any quotients, and every pair of odd numbers."""
    rng = np.random.default_rng(0)
    b = rng.integers(1, 4000, 4000).astype(np.float32)
    whole = b * rng.integers(-4000, 4000, 4000).astype(np.float32)
    any_a, any_b = (np.exp(rng.uniform(-30, 30, 4000)).astype(np.float32) for _ in "ab")
    odd = np.array(np.meshgrid(ODD, ODD), np.float32).reshape(2, -1)
    return np.concatenate([whole, any_a, odd[0]]), np.concatenate([b, any_b, odd[1]])


@pytest.mark.parametrize("off", [1.0, *OFF])
def test_what_a_division_is_off_by(off: float) -> None:
    a, b = data()
    count, text = corrected(ONE.replace("TYPE", "f32").replace("N", str(a.size)))
    assert count == 1
    factor = np.float32(off).view(np.uint32)
    text = re.sub(  # both divisions, the quotient's and the correction's
        r"(%\d+) = arith.divf (.*) : f32",
        lambda found: (
            f"%exact{found[1][1:]} = arith.divf {found[2]} : f32\n"
            f"%off{found[1][1:]} = arith.constant {factor:#x} : f32\n"
            f"{found[1]} = arith.mulf %exact{found[1][1:]}, %off{found[1][1:]} : f32"
        ),
        text,
    )
    with np.errstate(all="ignore"):
        got, want = run(text, a, b), a / b
    n = len(ODD) ** 2
    np.testing.assert_array_equal(got[:-n], want[:-n])
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(got[-n:], (want * np.float32(off))[-n:], rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_narrow_types(dtype: str) -> None:
    count, text = corrected(ONE.replace("TYPE", dtype).replace("N", "4"))
    assert count == 1
    assert re.findall(r"arith.divf .* : (\w+)", text) == ["f32"]


@pytest.mark.parametrize(
    "body",
    [
        "%y = arith.divf %x, %x : f64\n return %y : f64",
        "%c = arith.constant 1.0 : f32\n %y = arith.divf %c, %x : f32\n return %y : f32",
        "%c = arith.constant -0.25 : f32\n %y = arith.divf %x, %c : f32\n return %y : f32",
    ],
)
def test_what_is_left(body: str) -> None:
    dtype = body.rpartition(" : ")[2]
    assert corrected(f"func.func @f(%x: {dtype}) -> {dtype} {{ {body} }}")[0] == 0


@pytest.mark.parametrize(("target", "divisions"), [("vulkan", 2), ("cuda", 1), ("cpu", 1)])
def test_models(target: str, divisions: int, tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [8]) for name in "abc"]
    graph = helper.make_graph([helper.make_node("Div", ["a", "b"], ["c"])], "g", values[:2], values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    compile_model(model, CompileOptions(target=target, dump_ir=tmp_path, dry_run=True))
    assert next(tmp_path.glob("*-linalg.mlir")).read_text().count("arith.divf") == divisions
