"""What the compile report says: the strategy of each node with the reasons, the states, the sizes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import onnx
from linattn.dialect_patterns.op import Choice, LoweringOptions
from linattn.dialect_patterns.registry import find_op

from ..graph.schema import check_contracts, domain_of
from ..graph.specialize import SpecializedGraph
from ..model import LoadedModel
from ..targets import CompileTarget
from .entry_points import ModulePlan
from .report import CompileReport, NodeRow

STATE_OPS = ("LinearAttention", "GatedLinearAttention", "ConvolvedLinearAttention", "CausalConvWithState")
REPORTED_OPS = (*STATE_OPS, "SelectiveScan", "Attention", "GroupQueryAttention", "AttentionStep")
"""Operators with a row a node; of the others there are too many."""


def describe_choices(
    model: LoadedModel,
    plan: ModulePlan,
    graphs: list[SpecializedGraph],
    versions: Mapping[str, int],
    options: LoweringOptions,
    target: CompileTarget,
) -> CompileReport:
    """The report: what was found and which strategy each node gets, and why.

    Args:
        model: The model.
        plan: Its entry points.
        graphs: A graph for each of them, sizes bound.
        versions: Domain -> opset version.
        options: What the user asked of the lowering.
        target: The machine.
    """
    report = CompileReport(model.name, f"{target.name}, {target.description}", weight_bytes=model.weight_bytes())
    report.notes = [*target.notes, *plan.notes]
    report.entry_points = [e.symbol for e in plan.entry_points]
    rows: dict[str, list[NodeRow]] = {}
    others: dict[str, dict[str, int]] = {}
    for entry, graph in zip(plan.entry_points, graphs, strict=True):
        contracts = check_contracts(graph.proto.graph, graph.types, versions)
        for node in graph.proto.graph.node:
            op = find_op(domain_of(node), node.op_type, versions.get(domain_of(node), 1))
            if op is None or op.choose is None:
                continue
            choice = op.choose(contracts[node.name], target.capabilities, options)
            if node.op_type not in REPORTED_OPS:
                counts = others.setdefault(f"{node.op_type}: {_why(choice)}", {})
                counts[entry.symbol] = counts.get(entry.symbol, 0) + 1
                continue
            label = f"{domain_of(node) or 'ai.onnx'}.{node.op_type}"
            row = NodeRow(
                node.name, label, choice.rule, choice.heads, _types(node, graph), choice.strategy, choice.reason,
                dict(choice.rejected),
            )  # fmt: skip
            rows.setdefault(node.name, []).append(row)
    report.nodes = [_merge(entry_rows, plan) for entry_rows in rows.values()]
    report.others = [
        f"{max(counts.values())} x {line}" + ("" if len(counts) == len(graphs) else f" ({', '.join(counts)})")
        for line, counts in others.items()
    ]
    for state, pair in zip(plan.states, plan.pairs, strict=True):
        grows = pair.kind == "kv_cache" and plan.max_context is None
        sizes = {"batch": plan.batch or 1, "past": plan.max_context or 1}
        dims = [d if isinstance(d, int) else sizes.get(plan.roles.roles.get(d, ""), 1) for d in state.shape]
        total = report.states.setdefault(pair.kind, {"count": 0, "bytes": 0, "token_bytes": 0})
        item = onnx.helper.tensor_dtype_to_np_dtype(plan.state_types[pair.past].tensor_type.elem_type).itemsize
        total["count"] += 1
        total["token_bytes" if grows else "bytes"] += math.prod(dims) * item
    return report


def _why(choice: Choice) -> str:
    return "; ".join([f"{choice.strategy}, {choice.reason}", *(f"not {s}: {r}" for s, r in choice.rejected.items())])


def _types(node: onnx.NodeProto, graph: SpecializedGraph) -> str:
    has_state = node.op_type in STATE_OPS and len(node.input) > 3 and node.input[3]
    names = [node.input[0]] + ([node.input[3]] if has_state else [])
    short = [onnx.TensorProto.DataType.Name(graph.types[n].tensor_type.elem_type).lower() for n in names]
    return short[0] if len(set(short)) == 1 else f"{short[0]}, state {short[1]}"


def _merge(rows: list[NodeRow], plan: ModulePlan) -> NodeRow:
    """One row a node: the strategies of all entry points where they differ."""
    if len({r.strategy for r in rows}) == 1:
        reasons = [rows[-1].reason] if len({r.op for r in rows}) == 1 else list(dict.fromkeys(r.reason for r in rows))
        return dataclasses.replace(rows[-1], reason="; ".join(reasons), rejected=rows[0].rejected | rows[-1].rejected)
    groups: dict[str, list[str]] = {}
    first: dict[str, str] = {}
    for row, entry in zip(rows, plan.entry_points, strict=True):
        groups.setdefault(row.strategy, []).append(entry.symbol)
        first.setdefault(row.strategy, row.reason)
    strategy = ", ".join(f"{s} ({', '.join(names)})" for s, names in groups.items())
    reason = "; ".join(f"{s}: {r}" for s, r in first.items())
    rejected: dict[str, str] = {}
    for row, entry in zip(rows, plan.entry_points, strict=True):
        rejected |= {f"{entry.symbol}: {s}": why for s, why in row.rejected.items()}
    return dataclasses.replace(rows[0], strategy=strategy, reason=reason, rejected=rejected)
