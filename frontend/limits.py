"""What a model may ask for: memory of a call, values computed from constants alone, and the work of computing those.

IREE computes what depends on constants alone while it compiles; a few bytes of model can ask it for terabytes. The
sizes of all values are known here, before anything of that is done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx
from linattn.dialect_patterns.experts.contract import Experts
from linattn.runtime.errors import UnsupportedModelError
from linattn.runtime.sizes import size_text

from .graph.schema import spec_of_type
from .graph.specialize import SpecializedGraph
from .graph.validate import tensor_bytes

_CONSTANT_SHARE = 256
"""Values computed from constants may take this part of it (256 MiB), and ``_PER_WEIGHT`` times the weights."""
_PER_WEIGHT = 8

_MAX_WORK = 1 << 34
_WORK_PER_WEIGHT = 1024
"""Multiplications that products of constants may take: seconds, and for each weight what a low-rank update takes."""

MAX_PREFILL_BLOCKS = 32
"""Each size is a function of its own to compile."""

_EXPERTS = frozenset({"MoE", "QMoE"})
_PRODUCTS = _EXPERTS | {
    "MatMul", "Gemm", "Einsum", "Conv", "ConvTranspose", "ConvInteger", "MatMulInteger", "Attention"
}  # fmt: skip


def check_memory(graph: SpecializedGraph, contracts: Mapping[str, object], symbol: str, limit: int) -> int:
    """Refuse an entry point that needs more memory than ``limit``; sizes that are open count as 1.

    Args:
        graph: Its graph, with all types.
        contracts: Of its nodes, by name.
        symbol: Its name, for the error.
        limit: Bytes.

    Returns:
        Bytes that a call holds at most, weights not counted.

    Raises:
        UnsupportedModelError: for the largest value, the values computed from constants, or all of a call together.
    """
    sizes = {name: _bytes(proto) for name, proto in graph.types.items()}
    proto = graph.proto.graph
    weights = {t.name: tensor_bytes(t) for t in proto.initializer}
    elements = sum(math.prod(t.dims) for t in proto.initializer)
    constants = set(weights)
    constant_limit = limit // _CONSTANT_SHARE + _PER_WEIGHT * sum(weights.values())
    computed = work = 0
    for node in proto.node:
        for name in node.output:
            if sizes.get(name, 0) > limit:
                raise _too_much(
                    symbol, f"node '{node.name}' ({node.op_type})", f"its output '{name}'", sizes[name], limit
                )
        if all(name in constants for name in node.input if name):
            constants.update(node.output)
            computed += sum(sizes.get(name, 0) for name in node.output)
            work += _work(node, graph.types)
        if computed > constant_limit:
            where = f"node '{node.name}' ({node.op_type})"
            raise _too_much(symbol, where, "what is computed from constants alone", computed, constant_limit)
        if work > _MAX_WORK + _WORK_PER_WEIGHT * elements:
            raise UnsupportedModelError(
                f"products of constants take too long to compute for entry point '{symbol}'",
                where=f"node '{node.name}' ({node.op_type})", got=f"{work} multiplications",
                expected=f"up to {_MAX_WORK + _WORK_PER_WEIGHT * elements}", hint="compute them before the export",
            )  # fmt: skip
    scratch = {name: contract.scratch_bytes for name, contract in contracts.items() if isinstance(contract, Experts)}
    return _check_call(proto, sizes, scratch, constants, symbol, limit)


def _check_call(
    graph: onnx.GraphProto,
    sizes: Mapping[str, int],
    scratch: Mapping[str, int],
    constants: set[str],
    symbol: str,
    limit: int,
) -> int:
    """The memory of a call at its peak: what is there while each node runs, freed after its last reader."""
    last = {name: index for index, node in enumerate(graph.node) for name in node.input}
    kept = {v.name for v in (*graph.input, *graph.output)}
    live = sum(sizes.get(name, 0) for name in kept - constants)
    if live > limit:
        raise _too_much(symbol, "model", "a call's inputs, states and outputs", live, limit)
    most = live
    for index, node in enumerate(graph.node):
        live += sum(sizes.get(name, 0) for name in node.output if name not in kept and name not in constants)
        held = live + scratch.get(node.name, 0)
        if held > limit:
            raise _too_much(symbol, f"node '{node.name}' ({node.op_type})", "all that a call holds there", held, limit)
        most = max(most, held)
        done = {name for name in (*node.input, *node.output) if last.get(name, -1) <= index}
        live -= sum(sizes.get(name, 0) for name in done if name not in kept and name not in constants)
    return most


def _too_much(symbol: str, where: str, what: str, got: int, limit: int) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{what} takes too much memory for entry point '{symbol}'",
        where=where,
        got=size_text(got),
        expected=f"up to {size_text(limit)}",
        hint="compile for fewer rows, tokens or a shorter context, or raise --max-memory",
    )


def _bytes(proto: onnx.TypeProto) -> int:
    spec = spec_of_type(proto)
    if spec is None:
        return 0
    item = onnx.helper.tensor_dtype_to_np_dtype(proto.tensor_type.elem_type).itemsize
    return math.prod(1 if size is None else size for size in spec.shape) * item


def _work(node: onnx.NodeProto, types: Mapping[str, onnx.TypeProto]) -> int:
    """Multiplications of a product of constants, at most: each output sums over what an input has."""
    if node.op_type not in _PRODUCTS:
        return 0
    inputs = [spec for name in node.input if (spec := spec_of_type(types.get(name))) is not None]
    outputs = [spec for name in node.output if (spec := spec_of_type(types.get(name))) is not None]
    elements = max((math.prod(size or 1 for size in spec.shape) for spec in outputs), default=0)
    if node.op_type == "Attention":  # its scores are kept too: 64 times as dear, that they stay under a GiB
        return elements * 64 * max((math.prod(size or 1 for size in spec.shape[:-1]) for spec in inputs), default=0)
    if node.op_type == "MatMul":
        return elements * ((inputs[0].shape[-1] or 1) if inputs and inputs[0].rank else 1)
    return elements * math.isqrt(max((math.prod(size or 1 for size in spec.shape) for spec in inputs), default=0))
