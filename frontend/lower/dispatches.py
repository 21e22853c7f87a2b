"""What the dispatches of a compiled module do: node, bytes and operations of each call, kept in the module itself.

Read off IREE's flow dialect, where a dispatch still has the types of its operands and the name of its ONNX node. The
table goes into the reflection attribute ``linattn.dispatches``, so that ``linattn-bench model --profile`` can name what
it measures in any module.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from iree.compiler import ir
from linattn.runtime.manifest import DISPATCHES_KEY

from .reflection import set_reflection

_NODE = re.compile(r'loc\("([^"]*)"')
_PRODUCT = re.compile(
    r"(?:mat_?mul|mmt4d|matvec)(?!_rows_|_amx_rows_|_n_bits_ro)\w*?_(?:(\d+(?:x\d+)+)|m(\d+)k(\d+)b\d+n(\d+))(?:_|$)"
)
"""Sizes in the name of a product's dispatch: rows, columns, depth (and a batch). Not of those that arrange its rows."""
_SHARED = re.compile(r"mat_mul\w*_fused_(mma|tiled)_|mat_mul_fused_simt_\w+_nx\d+x\d+_l")
_MATRICES = "mat_mul_fused_mma_"
_BY_ELEMENT = re.compile(r"_dispatch_\d+_(?:elementwise|transpose|slow_memcpy)(?:_|$)")
"""IREE's kernels that read of each operand no more elements than they write: of a table the rows that are looked up."""


def describe_dispatches(module: ir.Operation) -> dict[str, list[dict[str, Any]]]:
    """The dispatches of each entry point, in program order.

    Args:
        module: In the flow dialect.

    Returns:
        Function -> rows of ``key`` (the name at run time), ``node`` (of the ONNX graph; of a fused group the one that
        gave it its form), ``bytes`` (of all operands and results, as far as they can be read or written; None where
        a size is open), ``flop`` (None where the name does not tell) and ``dtype`` (of the largest operand).
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


def attach_dispatches(module: ir.Operation, table: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write the table into the reflection attributes of the function that carries the manifest."""
    set_reflection(module, DISPATCHES_KEY, json.dumps(table, separators=(",", ":")))


def dispatch_nodes(table: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[str]]:
    """Name of a dispatch -> the nodes that it came from."""
    nodes: dict[str, list[str]] = {}
    for row in (row for rows in table.values() for row in rows):
        known = nodes.setdefault(row["key"], [])
        if row["node"] and row["node"] not in known:
            known.append(row["node"])
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
    tensors = [t for value in op.operands if isinstance(t := value.type, ir.RankedTensorType)]
    largest = max(tensors, key=lambda t: _bytes(t) or 0, default=None)
    return {
        "key": key,
        "node": node[1] if node else "",
        "bytes": _moved(op, key),
        "flop": operations(key) or _operations_by_types(op, key, tensors),
        "dtype": str(largest.element_type) if largest is not None else None,
    }


def operations(key: str) -> int | None:
    """The operations of a product, by its dispatch's name; None where that does not tell, and of what is none."""
    found = _PRODUCT.search(key)
    if found is None:
        return None
    sizes = found[1].split("x") if found[1] else found.group(2, 3, 4)
    return 2 * math.prod(int(size) for size in sizes)


def _operations_by_types(op: ir.Operation, key: str, operands: Sequence[ir.RankedTensorType]) -> int | None:
    """Those of a product whose kernel serves many sizes: [M, K] times what makes it [M, N], or matrices [K, N]."""
    if key.startswith(_MATRICES) and all(t.has_static_shape for t in operands):
        return 2 * math.prod(operands[0].shape) * sum(t.shape[-1] for t in operands[1:])
    sizes = [t for t in (*operands[:1], *(value.type for value in op.results)) if isinstance(t, ir.RankedTensorType)]
    if not _SHARED.match(key) or not all(t.has_static_shape for t in sizes):
        return None
    return 2 * math.prod(sizes[1].shape) * sizes[0].shape[-1]


def _moved(op: ir.Operation, key: str) -> int | None:
    """Bytes that a dispatch reads and writes, at most; None where a size is open."""
    into = _written_into(op)  # caches, whose new rows are other operands
    read = [_bytes(value.type) for value in op.operands if value not in into]
    written = [_bytes(value.type) for value in op.results][: len(op.results) - len(into)]
    known = [size for size in (*read, *written) if size is not None]
    if len(known) < len(read) + len(written):
        return None
    if not _BY_ELEMENT.search(key):
        return sum(known)
    if any(value.type == result.type for value in op.operands for result in op.results) and "memcpy" in key:
        return 2 * min(size for size in known if size)  # into a part of an operand, which is the result
    most = max((_elements(value.type) for value in op.results), default=0)
    elements = [_elements(value.type) for value in (*op.operands, *op.results)]
    return sum(size if count <= most else size * most // count for size, count in zip(known, elements, strict=True))


def _written_into(op: ir.Operation) -> list[ir.Value]:
    """The operands that a kernel of ours writes into; their results are the last ones."""
    if "tied_operands" not in op.attributes or "_dispatch_" in str(op.attributes["entry_points"]):
        return []
    tied = [ir.IntegerAttr(index).value for index in ir.ArrayAttr(op.attributes["tied_operands"])]
    groups = next(i for i, value in enumerate(op.operands) if not isinstance(value.type, ir.IndexType))
    return [op.operands[groups + index] for index in tied if index >= 0]


def _elements(value_type: ir.Type) -> int:
    return math.prod(value_type.shape) if isinstance(value_type, ir.RankedTensorType) else 0


def _bytes(value_type: ir.Type) -> int | None:
    """Bytes of a tensor, 0 for a scalar, None where a size is open."""
    if not isinstance(value_type, ir.RankedTensorType):
        return 0
    if not value_type.has_static_shape:
        return None
    match = re.search(r"\d+", str(value_type.element_type))
    bits = int(match[0]) if match else 32
    return math.prod(value_type.shape) * -(-bits // 8)
