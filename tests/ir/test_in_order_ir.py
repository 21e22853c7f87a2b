"""Which functions a queue takes in order by itself; tests/e2e/test_in_order.py runs such steps."""

from __future__ import annotations

import pytest
from iree.compiler import ir
from linattn.frontend.lower.in_order import mark_in_order
from linattn.runtime.manifest import IN_ORDER_KEY

CMD = "<%cmd : !hal.command_buffer>"
CREATE = "hal.command_buffer.create device(%d : !hal.device) mode(OneShot)"
BARRIER = (
    f'hal.command_buffer.execution_barrier{CMD} source("Dispatch|Transfer|CommandRetire") '
    'target("CommandIssue|Dispatch|Transfer") flags("None")'
)
EXECUTE = (
    "hal.device.queue.execute<%d : !hal.device> affinity(%any) wait(%before) signal(%after) commands(%cmd) "
    'flags("None")'
)
FILL = f'hal.command_buffer.fill_buffer{CMD} target(%a : !hal.buffer)[%zero, %four] pattern(%byte : i8) flags("None")'
FINALIZE = f"hal.command_buffer.finalize{CMD}"
GIVEN = "%a: !hal.buffer, %before: !hal.fence, %after: !hal.fence"
MODULE = f"""module {{
  util.global private @device : !hal.device
  util.func private @other() {{
    util.return
  }}
  util.func public @step$async({GIVEN}) attributes {{iree.reflection = {{known = "x"}}}} {{
    %d = util.global.load @device : !hal.device
    %any = arith.constant -1 : i64
    %zero = arith.constant 0 : index
    %four = arith.constant 4 : index
    %byte = arith.constant 0 : i8
    %cmd = {CREATE} categories("Transfer|Dispatch") affinity(%any) : !hal.command_buffer
    {BARRIER}
    {FILL}
    {BARRIER}
    {FINALIZE}
    {EXECUTE}
    util.return
  }}
}}"""
LAST = f"{BARRIER}\n    {FINALIZE}"
NARROW = LAST.replace('source("Dispatch|Transfer', 'source("Transfer')
OTHER_FENCE = "%own = util.null : !hal.fence\n    " + EXECUTE.replace("%before", "%own")
BRANCH = f"cf.br ^next\n  ^next:\n    {EXECUTE}"


def marked(text: str) -> tuple[list[str], str]:
    """The functions that are marked, and the module then."""
    with ir.Context(), ir.Location.unknown():
        module = ir.Module.parse(text)
        names = mark_in_order(module.operation)
        assert module.operation.verify()
        return names, str(module)


@pytest.mark.parametrize("reflection", [' attributes {iree.reflection = {known = "x"}}', ""])
def test_one_submission_with_a_barrier_at_its_end(reflection: str) -> None:
    text = MODULE.replace(' attributes {iree.reflection = {known = "x"}}', reflection)
    names, after = marked(text)
    assert names == ["step$async"]
    assert f'{IN_ORDER_KEY} = "true"' in after
    assert ('known = "x"' in after) == bool(reflection)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (LAST, FINALIZE),  # what comes later would begin beside it
        (LAST, NARROW),
        (LAST, f"{BARRIER}\n    {FILL}\n    {FINALIZE}"),
        ("Transfer|Dispatch", "Transfer"),  # goes to another queue, where there is one
        (EXECUTE, f"{EXECUTE}\n    {EXECUTE}"),
        (EXECUTE, BRANCH),
        (EXECUTE, OTHER_FENCE),
        (EXECUTE, f"{EXECUTE}\n    util.call @other() : () -> ()"),
        ("@step$async", "@step"),
    ],
)
def test_others_wait_as_before(old: str, new: str) -> None:
    assert MODULE.count(old) == 1
    text = MODULE.replace(old, new)
    names, after = marked(text)
    assert names == []
    assert IN_ORDER_KEY not in after
