"""Which modules get functions that load their kernels, and what those are; tests/e2e/test_kernel_loads.py runs them."""

from __future__ import annotations

import pytest
from iree.compiler import ir
from linattn.frontend.lower.kernel_loads import load_side_by_side

KERNEL = 'hal.executable private @{0} {{ hal.executable.binary public @b <format = "x", data = dense<1> : vector<{1}xi8>, mime_type = "y"> }}'  # noqa: E501
MODULE = """module {{
  util.global private @__device_0 : !hal.device
  {kernels}
  util.global private @__device_0_executable_0_a : !hal.executable
  util.global private @__device_0_executable_1_c : !hal.executable
  util.initializer {{
    %d = util.global.load @__device_0 : !hal.device
    %any = arith.constant -1 : i64
    %e = hal.executable.create device(%d : !hal.device) affinity(%any) target(@a::@b) : !hal.executable
    cf.br ^bb1(%e : !hal.executable)
  ^bb1(%x: !hal.executable):
    util.global.store %x, @__device_0_executable_0_a : !hal.executable
    {second}
    util.return
  }}
  {user} {{
    %0 = util.global.load immutable @__device_0_executable_0_a : !hal.executable
    util.optimization_barrier %0 : !hal.executable
    util.return
  }}
  util.func public @size() -> i32 {{
    %0 = arith.constant 3 : i32
    util.return %0 : i32
  }}
}}"""
SECOND = """
    %f = hal.executable.create device(%d : !hal.device) affinity(%any) target(@c::@b) : !hal.executable
    util.global.store %f, @__device_0_executable_1_c : !hal.executable"""


def changed(second: str = SECOND, user: str = "util.func public @run()") -> tuple[int, ir.Module]:
    """What becomes of a module with two kernels, of 8 and 16 bytes."""
    kernels = KERNEL.format("a", 8) + "\n" + KERNEL.format("c", 16)
    with ir.Context(), ir.Location.unknown():
        module = ir.Module.parse(MODULE.format(kernels=kernels, second=second, user=user))
        count = load_side_by_side(module.operation)
        assert module.operation.verify()
        return count, module


def test_each_kernel_has_a_function_the_largest_first() -> None:
    count, module = changed()
    text = str(module)
    assert count == 2
    assert "util.initializer" not in text
    first, second = (text.index(f"@load_kernel${number}() attributes") for number in range(2))
    assert first < text.index("target(@c::@b)") < second < text.index("target(@a::@b)")
    assert text.count("hal.executable.create") == 2


def test_what_runs_kernels_loads_those_that_are_missing() -> None:
    text = str(changed()[1])
    run, size = text.index("@run()"), text.index("@size()")
    assert text[run:size].split("\n")[1].strip() == "util.call @load_kernels$() : () -> ()"
    assert text.count("util.call @load_kernels$()") == 1
    assert "immutable" not in text
    assert text.count("util.global private mutable @__device_0_executable") == 2


@pytest.mark.parametrize("change", [{"second": ""}, {"user": "util.initializer"}])
def test_one_kernel_or_one_that_an_initializer_runs_stays(change: dict[str, str]) -> None:
    count, module = changed(**change)
    assert count == 0
    assert "load_kernel" not in str(module)
