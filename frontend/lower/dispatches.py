"""What the dispatches of a compiled module do: node, bytes and operations of each call, kept in the module itself.

Read off IREE's flow dialect, where a dispatch still has the types of its operands and the name of its ONNX node. The
table goes into the reflection attribute ``linattn.dispatches``, so that ``linattn-bench model --profile`` can name what
it measures in any module.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from iree.compiler import ir
from linattn.runtime.manifest import DISPATCHES_KEY

from .reflection import set_reflection

_NODE = re.compile(r'loc\("([^"]*)"')
_PRODUCT = re.compile(
    r"(?:mat_?mul|mmt4d|matvec)(?!_rows_|_amx_rows_|_n_bits_ro)\w*?_(?:(\d+(?:x\d+)+)|m(\d+)k(\d+)b\d+n(\d+))(?:_|$)"
)
"""Sizes in the name of a product's dispatch: rows, columns, depth (and a batch). Not of those that arrange its rows."""


def describe_dispatches(module: ir.Operation) -> dict[str, list[dict[str, Any]]]:
    """The dispatches of each entry point, in program order.

    Args:
        module: In the flow dialect.

    Returns:
        Function -> rows of ``key`` (the name at run time), ``node`` (of the ONNX graph; of a fused group the one that
        gave it its form), ``bytes`` (of all operands and results; None where a size is open), ``flop`` (None where
        the name does not tell) and ``dtype`` (of the largest operand).
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for operation in module.regions[0].blocks[0].operations:
        if operation.operation.name == "util.func" and "iree.reflection" in operation.attributes:
            name = ir.StringAttr(operation.attributes["sym_name"]).value
            rows: list[dict[str, Any]] = []
            _collect(operation.operation, rows)
            if rows:
                found[name.removesuffix("$async")] = rows
    return found


def attach_dispatches(module: ir.Operation) -> dict[str, list[str]]:
    """Write the table into the reflection attributes of the function that carries the manifest.

    Returns:
        Name of a dispatch -> the nodes that it came from.
    """
    table = describe_dispatches(module)
    nodes: dict[str, list[str]] = {}
    for row in (row for rows in table.values() for row in rows):
        known = nodes.setdefault(row["key"], [])
        if row["node"] and row["node"] not in known:
            known.append(row["node"])
    set_reflection(module, DISPATCHES_KEY, json.dumps(table, separators=(",", ":")))
    return nodes


def _collect(operation: ir.Operation, rows: list[dict[str, Any]]) -> None:
    def visit(op: ir.Operation) -> ir.WalkResult:
        if op.name == "flow.dispatch":
            rows.append(_row(op))
        return ir.WalkResult.ADVANCE

    operation.walk(visit)


def _row(op: ir.Operation) -> dict[str, Any]:
    key = str(ir.ArrayAttr(op.attributes["entry_points"])[0]).rpartition("::@")[2].strip('"')
    node = _NODE.search(str(op.location))
    sizes = [_bytes(value.type) for value in (*op.operands, *op.results)]
    tensors = [t for value in op.operands if isinstance(t := value.type, ir.RankedTensorType)]
    largest = max(tensors, key=lambda t: _bytes(t) or 0, default=None)
    return {
        "key": key,
        "node": node[1] if node else "",
        "bytes": None if None in sizes else sum(size for size in sizes if size is not None),
        "flop": operations(key),
        "dtype": str(largest.element_type) if largest is not None else None,
    }


def operations(key: str) -> int | None:
    """The operations of a product, by its dispatch's name; None where that does not tell, and of what is none."""
    found = _PRODUCT.search(key)
    if found is None:
        return None
    sizes = found[1].split("x") if found[1] else found.group(2, 3, 4)
    return 2 * math.prod(int(size) for size in sizes)


def _bytes(value_type: ir.Type) -> int | None:
    """Bytes of a tensor, 0 for a scalar, None where a size is open."""
    if not isinstance(value_type, ir.RankedTensorType):
        return 0
    if not value_type.has_static_shape:
        return None
    match = re.search(r"\d+", str(value_type.element_type))
    bits = int(match[0]) if match else 32
    return math.prod(value_type.shape) * -(-bits // 8)
