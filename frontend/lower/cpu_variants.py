"""Modules with code for several CPUs: which of its variants IREE's runtime loads.

IREE makes a variant of each of its own kernels for each machine in ``hal.device.targets``; ours are written as
variants (``linattn.dialect_patterns.machines``). Before IREE links them, each gets the condition under which it is
taken, the first one that holds:

    hal.executable.variant public @... target(...) {
      hal.executable.condition(%device: !hal.device) -> i1 {
        %ok, %has = hal.device.query<%device> key("hal.cpu" :: "avx2") : i1, i1 = false  ...  hal.return %all : i1 }

IREE 3.13's runtime finds out what the CPU has when a process loads its first code, and until then says that it has
nothing: the first module of a process would take the last variant. So the module loads that one, unused, before it asks
(a millisecond, and nothing that whoever runs it would have to know).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from iree.compiler import ir
from linattn.dialect_patterns.target import Target

_HOLDER = """
hal.executable private @holder {{ hal.executable.variant public @variant target({executable}) {{
  hal.executable.condition(%device: !hal.device) -> i1 {{
    %has_0 = arith.constant true
{queries}
    hal.return %has_{count} : i1
  }}
}} }}
"""
_QUERY = """
    %ok_{n}, %value_{n} = hal.device.query<%device : !hal.device> key("hal.cpu" :: "{feature}") : i1, i1 = false
    %has_{n} = arith.andi %has_{before}, %value_{n} : i1
"""


def add_conditions(module: ir.Operation, levels: Sequence[Target]) -> None:
    """Put its condition into each variant but the last of each executable.

    Args:
        module: After IREE's phase ``executable-targets``; nothing is linked yet.
        levels: The machines, best first, as in every executable.
    """
    added = [sorted(level.features - levels[-1].features) for level in levels]
    conditions = [_condition(level, features) for level, features in zip(levels[:-1], added[:-1], strict=True)]
    for executable in module.regions[0].blocks[0].operations:
        if executable.operation.name != "hal.executable":
            continue
        variants = [op for op in _body(executable) if op.operation.name == "hal.executable.variant"]
        assert len(variants) == len(levels), f"{executable.attributes['sym_name']} has {len(variants)} variants"
        for variant, condition in zip(variants, conditions, strict=False):
            condition.clone(ip=ir.InsertionPoint.at_block_begin(variant.regions[0].blocks[0]))


def _body(op: ir.OpView | ir.Operation) -> list[ir.OpView | ir.Operation]:
    return list(op.regions[0].blocks[0].operations)


def _condition(level: Target, features: Sequence[str]) -> ir.Operation:
    """That a CPU has some features; it stands nowhere, to be cloned."""
    queries = "".join(_QUERY.format(n=i, before=i - 1, feature=feature) for i, feature in enumerate(features, 1))
    holder = ir.Module.parse(_HOLDER.format(executable=level.executable, queries=queries, count=len(features)))
    (variant,) = _body(_body(holder.operation)[0])[:1]
    condition: Any = _body(variant)[0]
    return condition.detach_from_parent()


def load_before_asking(module: ir.Operation) -> None:
    """Load the last variant before the first question about the CPU.

    Args:
        module: After IREE's phase ``hal``.
    """
    question: ir.Operation | None = None
    last: ir.Operation | None = None

    def visit(op: ir.Operation) -> ir.WalkResult:
        nonlocal question, last
        if question is None and op.name == "hal.device.query" and "hal.cpu" in str(op.attributes["category"]):
            question = op
        if op.name == "hal.executable.create":
            last = op
        return ir.WalkResult.ADVANCE

    module.walk(visit)
    if question is None or last is None:  # the module has no code of its own
        return
    attributes = last.attributes
    with ir.InsertionPoint(question), question.location:
        i64 = ir.IntegerType.get_signless(64)
        anywhere = ir.Operation.create(
            "arith.constant", results=[i64], attributes={"value": ir.IntegerAttr.get(i64, -1)}
        ).result
        loaded = ir.Operation.create(
            "hal.executable.create",
            results=[last.results[0].type],
            operands=[question.operands[0], anywhere],
            attributes={named.name: named.attr for named in (attributes[i] for i in range(len(attributes)))},
        ).result
        ir.Operation.create("util.optimization_barrier", results=[loaded.type], operands=[loaded])
