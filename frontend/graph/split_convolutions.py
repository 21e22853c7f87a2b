"""A convolution whose output is cut into queries, keys and values becomes one node with the Split, for prompts on CPUs.

What stands between and behind goes too: the transposes, and the norms of queries and keys with their factor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
from linattn.dialect_patterns.causal_conv import op
from linattn.dialect_patterns.causal_conv.contract import CausalConv
from linattn.dialect_patterns.causal_conv.fused_simd import takes_parts
from linattn.dialect_patterns.causal_conv.parts import CAUSAL_CONV_PARTS, parts_of
from linattn.dialect_patterns.causal_conv.simd_channels import Part
from linattn.dialect_patterns.op import INTERNAL, LoweringOptions
from linattn.dialect_patterns.target import Target

from .drop_unused import drop_unused
from .schema import attributes_of, check_contracts, domain_of
from .specialize import SpecializedGraph
from .split_columns import Chains, PartNorm, columns_of

_SWAPPED = [0, 2, 1]


def split_convolutions(
    graph: SpecializedGraph, versions: Mapping[str, int], target: Target, options: LoweringOptions
) -> SpecializedGraph:
    """The graph with such nodes.

    Args:
        graph: An entry point's graph; not changed.
        versions: Domain -> opset version.
        target: The machine; on one without such a kernel nothing changes.
        options: What the user asked of the lowering.
    """
    if target.is_gpu:
        return graph
    model = graph.copied()
    contracts = check_contracts(model.graph, graph.types, versions)
    made_by = {name: node for node in model.graph.node for name in node.output if name}
    chains = Chains(model.graph, graph.types)
    gone: set[str] = set()
    for node in model.graph.node:
        sizes = columns_of(node, graph.types)
        convolution = _convolution(node, made_by, chains) if sizes else None
        contract = None if convolution is None else contracts.get(convolution.name)
        if convolution is None or not isinstance(contract, CausalConv):
            continue
        if op.choose(contract, target, options).strategy != "fused_simd":
            continue
        norms: list[PartNorm | None] = [chains.norm(name) for name in node.output]
        if not takes_parts(contract, _parts(sizes, norms), target):
            norms = [None] * len(sizes)
        if not takes_parts(contract, _parts(sizes, norms), target):
            continue
        gone.update(name for norm in norms if norm is not None for name in norm.nodes)
        gone.add(node.name)
        _join(convolution, node, made_by[convolution.input[0]].input[0], sizes, norms)
    kept = [node for node in model.graph.node if node.name not in gone]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    drop_unused(model.graph)
    return SpecializedGraph(model, graph.types)


def _parts(sizes: list[int], norms: list[PartNorm | None]) -> tuple[Part, ...]:
    heads = [0 if norm is None else norm.head for norm in norms]
    return parts_of(sizes, heads, [1.0 if norm is None else norm.factor for norm in norms])


def _join(
    convolution: onnx.NodeProto, split: onnx.NodeProto, rows: str, sizes: list[int], norms: list[PartNorm | None]
) -> None:
    """Changes the convolution in place; what it was read by is left behind."""
    parts = _parts(sizes, norms)
    attributes: dict[str, Any] = attributes_of(convolution) | {
        "sizes": sizes, "heads": [part.head for part in parts], "factors": [part.factor for part in parts],
    }  # fmt: skip
    outputs = [name if norm is None else norm.result for name, norm in zip(split.output, norms, strict=True)]
    inputs = [rows, *convolution.input[1:]]
    outputs += convolution.output[1:]
    convolution.CopyFrom(
        onnx.helper.make_node(CAUSAL_CONV_PARTS, inputs, outputs, convolution.name, domain=INTERNAL, **attributes)
    )


def _convolution(split: onnx.NodeProto, made_by: Mapping[str, onnx.NodeProto], chains: Chains) -> onnx.NodeProto | None:
    """The node whose output a Split alone cuts, where transposes stand around it."""
    back = made_by.get(split.input[0])
    if back is None or not _swaps(back):
        return None
    found = made_by.get(back.input[0])
    before = None if found is None else made_by.get(found.input[0])
    if found is None or before is None or not _swaps(before) or len(found.output) != 2 or not all(found.output):
        return None
    alone = chains.reader(back.input[0], "Transpose") is not None and chains.reader(split.input[0], "Split") is not None
    return found if alone and found.output[0] == back.input[0] else None


def _swaps(node: onnx.NodeProto) -> bool:
    """Whether a node swaps tokens and channels."""
    return node.op_type == "Transpose" and domain_of(node) == "" and attributes_of(node).get("perm") == _SWAPPED
