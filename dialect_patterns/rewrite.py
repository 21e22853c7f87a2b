"""The one adapter over ``iree.compiler.rewrite``: applies the operator modules to imported functions.

The importer leaves ``torch.operator "onnx.X"`` ops with the attributes ``linattn.domain``, ``linattn.version`` and
``linattn.node`` (see ``linattn.frontend.lower.importer``). For each one that an operator module claims, the pattern
parses the node into the module's contract, casts operands to builtin tensors, lets the module emit, and casts back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from iree.compiler import ir, rewrite

from .emit.torch_values import from_builtin, spec_from_torch, to_builtin
from .node import Node
from .op import IMPORTED, LoweringContext, weight_symbol
from .registry import find_op

DOMAIN, VERSION, NODE = "linattn.domain", "linattn.version", "linattn.node"
_ONNX_ATTRIBUTE = "torch.onnx."


def _attribute_value(attribute: ir.Attribute) -> object:
    if isinstance(attribute, ir.IntegerAttr | ir.FloatAttr | ir.StringAttr):
        return attribute.value
    if isinstance(attribute, ir.ArrayAttr):
        return [_attribute_value(element) for element in attribute]
    return attribute


def node_of(op: ir.Operation) -> Node:
    """The node view of an imported ``torch.operator``."""
    attributes = op.attributes
    onnx_attributes = {
        named.name.removeprefix(_ONNX_ATTRIBUTE): _attribute_value(named.attr)
        for named in (attributes[i] for i in range(len(attributes)))
        if named.name.startswith(_ONNX_ATTRIBUTE)
    }
    return Node(
        name=ir.StringAttr(attributes[NODE]).value,
        domain=ir.StringAttr(attributes[DOMAIN]).value,
        op_type=ir.StringAttr(attributes["name"]).value.removeprefix("onnx."),
        version=ir.IntegerAttr(attributes[VERSION]).value,
        inputs=tuple(spec_from_torch(operand.type) for operand in op.operands),
        num_outputs=len(op.results),
        attributes=onnx_attributes,
        used_outputs=tuple(str(result.type) != "!torch.none" for result in op.results),
        weights=frozenset(i for i, operand in enumerate(op.operands) if weight_symbol(operand) is not None),
    )


def lower_operators(module: ir.Module, context: LoweringContext) -> int:
    """Lower every operator of the registry in ``module``.

    Args:
        module: The imported module, changed in place.
        context: Target and options; its ``position`` is replaced for functions that have one.

    Returns:
        How many operators were lowered.
    """
    count = 0
    positions: dict[ir.Attribute, ir.Value | None] = {}

    def pattern(operation: Any, rewriter: Any) -> bool:
        nonlocal count
        op: ir.Operation = operation.operation
        if DOMAIN not in op.attributes:
            return True  # no match
        node = node_of(op)
        entry = find_op(node.domain, node.op_type, node.version)
        if entry is None:
            return True
        contract = entry.parse(node)
        if entry.choose and entry.choose(contract, context.target, context.options).strategy == IMPORTED:
            return True
        with rewriter.ip, op.location:
            operands = [to_builtin(operand) for operand in op.operands]
            try:
                results = entry.lower(replace(context, position=_position(op, positions)), contract, operands)
            except Exception as error:
                error.add_note(node.where)
                raise
            if results is None:  # the casts have no users and go
                return True
            rewriter.replace_op(op, _replacements(op, results))
        count += 1
        return False

    patterns = rewrite.RewritePatternSet(module.context)
    patterns.add("torch.operator", pattern)
    rewrite.walk_and_apply_patterns(module.operation, patterns.freeze())
    return count


def _replacements(op: ir.Operation, results: Sequence[ir.Value | None]) -> list[ir.Value]:
    values: list[ir.Value] = []
    for old, new in zip(op.results, results, strict=True):
        if str(old.type) == "!torch.none":
            values.append(ir.Operation.create("torch.constant.none", results=[old.type]).result)
        else:
            assert new is not None, f"no value for a wanted output of {op}"
            values.append(from_builtin(new, old.type))
    return values


def _position(op: ir.Operation, known: dict[ir.Attribute, ir.Value | None]) -> ir.Value | None:
    """The committed position of the entry point around ``op``, an index, where it takes one.

    Args:
        op: The operation that is lowered.
        known: Name of a function -> its argument, filled here: there are as many arguments as states.
    """
    function = op.parent
    while function is not None and function.name != "func.func":
        function = function.parent
    assert function is not None
    name = function.attributes["sym_name"]
    if name not in known:
        arguments = function.regions[0].blocks[0].arguments
        known[name] = next((a for a in arguments if str(a.type) == "!torch.int"), None)
    position = known[name]
    if position is None:
        return None
    i64 = ir.IntegerType.get_signless(64)
    value = ir.Operation.create("torch_c.to_i64", results=[i64], operands=[position]).result
    return ir.Operation.create("arith.index_cast", results=[ir.IndexType.get()], operands=[value]).result
