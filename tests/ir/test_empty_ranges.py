"""What IREE makes for GPUs once tensors may have no elements: no empty memory, and no launch of no workgroups."""

from __future__ import annotations

import re

import pytest
from harness import FLAGS, set_device
from iree.compiler import ir
from iree.compiler.api import Invocation, Session
from linattn.frontend.lower.empty_ranges import fill_empty_ranges
from linattn.frontend.lower.iree import execute

CUDA = ["--iree-hal-target-device=cuda", "--iree-cuda-target=sm_80"]
SUM = """
func.func @main(%a: tensor<TYPE>) -> tensor<TYPE> {
  %0 = arith.addf %a, %a : tensor<TYPE>
  return %0 : tensor<TYPE>
}
"""


@pytest.mark.parametrize("target", ["cuda", "lavapipe"])
@pytest.mark.parametrize(("shape", "computed"), [("4x8xf32", False), ("?x8xf32", True), ("?x?xf32", True)])
def test_launches_and_memory(shape: str, computed: bool, target: str) -> None:
    session = Session()
    session.set_flags(*FLAGS.get(target, CUDA), "--iree-input-type=none")
    session.context.load_all_available_dialects()
    with session.context, ir.Location.unknown():
        module = ir.Module.parse(SUM.replace("TYPE", shape))
        set_device(module, target)
        invocation = Invocation(session)
        invocation.import_module(module.operation)
        assert execute(invocation, "ToPhase", "hal")
        before = str(module)
        fill_empty_ranges(module.operation)
        module.operation.verify()
        after = str(module)
        assert execute(invocation, "FromPhase", "hal", "ToPhase", "end")
    assert "hal.command_buffer.dispatch" in after
    if not computed:
        assert after == before
        return
    # The launch is the whole of a branch, on a condition that its own workgroups were multiplied for.
    branch = re.search(r"scf\.if (%\S+) \{\s+hal\.command_buffer\.dispatch<[^{}]+\}", after)
    assert branch, after
    assert re.search(rf"{branch[1]} = arith\.cmpi sgt, %\S+, %", after)
    assert after.count("arith.maxui") > before.count("arith.maxui")
