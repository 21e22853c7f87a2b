"""Plans a module: which entry points, with which sizes bound, and what the manifest says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx
from linattn.dialect_patterns.node import TensorSpec
from linattn.dialect_patterns.op import MICROSOFT
from linattn.runtime.errors import UnsupportedModelError
from linattn.runtime.manifest import EntryPoint, InputSpec, OutputSpec, StateSpec

from ..graph.schema import domain_of, node_view
from ..graph.states import KV_LENGTH_AXIS, StatePair
from ..limits import MAX_PREFILL_BLOCKS
from ..lower.importer import Signature
from .dims import DimRoles, dim_names, evaluate

OPEN = "open"
DEFAULT_MAX_CONTEXT = 4096
_ROLES = {"input_ids": "tokens", "attention_mask": "attention_mask", "position_ids": "position_ids"}


@dataclass(frozen=True)
class ModuleOptions:
    """How the caller wants the sizes bound.

    Attributes:
        batch: Rows of a call, or None for open.
        max_context: Capacity of the KV caches in tokens, None for open; ``default`` decides by the model.
        prefill_blocks: Sizes of the prefill entry points in tokens; None for one with any number.
    """

    batch: int | None = 1
    max_context: int | str | None = "default"
    prefill_blocks: tuple[int, ...] | None = (512, 64, 8)


@dataclass(frozen=True)
class ModulePlan:
    """What the module will contain.

    Attributes:
        inputs: Graph inputs that are not states.
        outputs: Graph outputs that are not states.
        states: States.
        pairs: The same states, as found in the graph.
        entry_points: Functions to compile.
        batch: Compiled batch, None if open.
        max_context: Capacity of the KV caches, None if open or there are none.
        context_limit: Positions that the model supports, None if unknown.
        roles: Roles of symbols.
        state_types: Types of states' inputs and outputs, more precise than the model declares.
        notes: What the user should know.
    """

    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    states: tuple[StateSpec, ...]
    pairs: tuple[StatePair, ...]
    entry_points: tuple[EntryPoint, ...]
    batch: int | None
    max_context: int | None
    context_limit: int | None
    roles: DimRoles
    state_types: Mapping[str, onnx.TypeProto]
    notes: tuple[str, ...]

    @property
    def capacity_pairs(self) -> tuple[StatePair, ...]:
        """KV caches that are updated in place."""
        return tuple(p for p in self.pairs if p.kind == "kv_cache") if self.max_context is not None else ()

    def without_prefill(self, note: str) -> ModulePlan:
        """The same with ``decode`` alone, and why."""
        return replace(self, entry_points=self.entry_points[:1], notes=(*self.notes, note))

    def sizes(self, entry: EntryPoint) -> dict[str, int]:
        """Symbol -> size for one entry point."""
        past = self.max_context
        total = past + entry.tokens if past is not None and entry.tokens is not None else None
        if not self.pairs or all(p.kind != "kv_cache" for p in self.pairs):
            total = None  # without a KV cache the total length is whatever the caller's mask has
        sizes = {"batch": self.batch, "tokens": entry.tokens, "past": past, "total": total}
        return self.roles.bind(sizes)

    def signature(self) -> Signature:
        """Arguments and results, the same for every entry point."""
        tied = {p.present: p.past for p in self.capacity_pairs}
        return Signature(
            arguments=[*(i.name for i in self.inputs), *(s.name for s in self.states)],
            results=[*(o.name for o in self.outputs), *(s.output for s in self.states)],
            tied=tied,
            takes_position=bool(tied),
        )


def plan_module(
    graph: onnx.GraphProto,
    types: Mapping[str, onnx.TypeProto],
    versions: Mapping[str, int],
    pairs: Sequence[StatePair],
    roles: DimRoles,
    options: ModuleOptions,
) -> ModulePlan:
    """Decide sizes and entry points.

    Raises:
        UnsupportedModelError: if a KV cache cannot have a fixed capacity, or no block fits the context.
    """
    notes: list[str] = []
    kv = [p for p in pairs if p.kind == "kv_cache"]
    limit = context_limit(graph)
    max_context = _max_context(options, limit, kv, roles)
    moved = next((p for p in kv if not p.direct), None)
    if options.max_context == "default" and max_context is not None and moved is not None:
        max_context = None
        notes.append(
            f"open context: no attention operator reads and writes '{moved.past}', so every step copies the KV caches"
        )
    named = [f"{p.past} = {p.present}" for p in pairs if p.found_by == "name"]
    if named:
        notes.append(f"states paired by name alone, for the graph does not show it: {', '.join(named)}")
    for pair in kv if max_context is not None else ():
        if not pair.direct:
            raise UnsupportedModelError(
                f"the KV cache '{pair.past}' cannot be updated in place: no attention operator reads and writes it",
                where=f"node '{pair.node}'" if pair.node else None,
                got=", ".join(pair.between) or f"paired by {pair.found_by}",
                hint="compile with --max-context open",
            )
        readers = [n.name for n in graph.node if pair.past in n.input]
        if len(readers) != 1:  # the buffer is overwritten: nobody else may read what was in it
            raise UnsupportedModelError(
                f"the KV cache '{pair.past}' is read by other nodes too, so it cannot be updated in place",
                where=f"node '{pair.node}'",
                got=", ".join(readers),
                hint="compile with --max-context open",
            )
    entries, blocks_note = _entry_points(options, _rows(graph, pairs, max_context), roles, graph)
    notes += blocks_note
    state_types, states = _states(graph, types, versions, pairs, max_context is not None)
    values = {v.name: v for v in (*graph.input, *graph.output)}
    past_names, present_names = {p.past for p in pairs}, {p.present for p in pairs}
    initializers = {t.name for t in graph.initializer}
    # Symbols that only a state's declared shape had, and that its operator fixes, are open no more.
    fixed = {n for t in (dim_names(values[s]) for s in state_types) for n in t if isinstance(n, str)}
    kept = {n for t in state_types.values() for n in dim_names(t)}
    kept |= {n for name, v in values.items() if name not in state_types for n in dim_names(v)}
    names = {symbol: role for symbol, role in roles.roles.items() if symbol not in fixed or symbol in kept}
    inputs = tuple(
        InputSpec(v.name, _dtype(v.type), _shape(v, names), _ROLES.get(v.name, "other"))
        for v in graph.input
        if v.name not in past_names and v.name not in initializers
    )
    outputs = tuple(_output(v, names) for v in graph.output if v.name not in present_names)
    if not any(n.op_type in ("LinearAttention", "CausalConvWithState", "SelectiveScan") for n in graph.node):
        notes.append("the model has no LinearAttention or CausalConvWithState node: compiled as it is")
    if OPEN in names.values():
        left = ", ".join(s for s, r in names.items() if r == OPEN)
        notes.append(f"open dims: {left} (bind with --dim NAME=N for faster code)")
    return ModulePlan(
        inputs,
        outputs,
        tuple(states),
        tuple(pairs),
        entries,
        options.batch if roles.has("batch") else _static_batch(graph),
        max_context,
        limit,
        DimRoles(names),
        state_types,
        tuple(notes),
    )


def _max_context(options: ModuleOptions, limit: int | None, kv: Sequence[StatePair], roles: DimRoles) -> int | None:
    if not kv or not roles.has("past") or not roles.has("tokens") or options.max_context is None:
        return None
    if options.max_context == "default":
        return min(limit or DEFAULT_MAX_CONTEXT, DEFAULT_MAX_CONTEXT)
    assert isinstance(options.max_context, int)
    if limit is not None and options.max_context > limit:
        raise UnsupportedModelError(
            "longer than the model supports", where="--max-context", got=options.max_context, expected=f"up to {limit}"
        )
    return options.max_context


def _static_batch(graph: onnx.GraphProto) -> int | None:
    first = dim_names(graph.input[0])[0] if graph.input and dim_names(graph.input[0]) else None
    return first if isinstance(first, int) and first > 0 else None


def _rows(graph: onnx.GraphProto, pairs: Sequence[StatePair], max_context: int | None) -> int | None:
    """How many tokens the smallest cache holds: that of all, or one of fixed size that TensorScatter writes into."""
    rows = [max_context] if max_context is not None else []
    values, pasts = {v.name: v for v in graph.input}, {p.node: p.past for p in pairs}
    for node in graph.node:
        if node.op_type == "TensorScatter" and node.name in pasts:
            dims = dim_names(values[pasts[node.name]])
            axis = next((a.i for a in node.attribute if a.name == "axis"), -2)
            size = dims[axis] if -len(dims) <= axis < len(dims) else None
            rows += [size] if isinstance(size, int) else []
    return min(rows, default=None)


def _entry_points(
    options: ModuleOptions, max_context: int | None, roles: DimRoles, graph: onnx.GraphProto
) -> tuple[tuple[EntryPoint, ...], list[str]]:
    if not roles.has("tokens"):
        return (EntryPoint("main", "main", None),), []
    decode = EntryPoint("decode", "decode", 1)
    if options.prefill_blocks is None:
        return (decode, EntryPoint("prefill", "prefill", None)), []
    blocks = sorted({b for b in options.prefill_blocks if b > 1}, reverse=True)
    if len(blocks) > MAX_PREFILL_BLOCKS:
        raise UnsupportedModelError(
            "too many sizes", where="--prefill-blocks", got=len(blocks), expected=f"up to {MAX_PREFILL_BLOCKS}",
            hint="each is compiled by itself, and the runtime cuts prompts into them",
        )  # fmt: skip
    fitting = [b for b in blocks if max_context is None or b <= max_context]
    notes = [
        f"prefill block {b} left out: longer than the context of {max_context}" for b in blocks if b not in fitting
    ]
    return (decode, *(EntryPoint(f"prefill_{b}", "prefill", b) for b in fitting)), notes


def _states(
    graph: onnx.GraphProto,
    types: Mapping[str, onnx.TypeProto],
    versions: Mapping[str, int],
    pairs: Sequence[StatePair],
    capacity: bool,
) -> tuple[dict[str, onnx.TypeProto], list[StateSpec]]:
    nodes = {n.name: n for n in graph.node}
    values = {v.name: v for v in (*graph.input, *graph.output)}
    proto_types: dict[str, onnx.TypeProto] = {}
    specs: list[StateSpec] = []
    for pair in pairs:
        known = _known_sizes(nodes[pair.node], pair, types, versions) if pair.shaped_by_node else {}
        for name in (pair.past, pair.present):
            if len(dims := dim_names(values[name])) <= max(known, default=-1):
                raise UnsupportedModelError(
                    f"the state '{name}' has too few dimensions",
                    where=f"node '{pair.node}'",
                    got=dims,
                    expected=f"at least {max(known) + 1}",
                    hint="export the model again",
                )
        past = _state_type(values[pair.past].type, known)
        is_kv = pair.kind == "kv_cache"
        proto_types[pair.past] = past
        proto_types[pair.present] = _state_type(values[pair.present].type, known) if is_kv else past
        specs.append(
            StateSpec(
                pair.past,
                pair.present,
                pair.kind,
                _dtype(past),
                tuple(d if d is not None else f"{pair.past}:{i}" for i, d in enumerate(dim_names(past))),
                KV_LENGTH_AXIS if is_kv else None,
                is_kv and capacity,
            )
        )
    return proto_types, specs


def _known_sizes(
    node: onnx.NodeProto, pair: StatePair, types: Mapping[str, onnx.TypeProto], versions: Mapping[str, int]
) -> dict[int, int]:
    """The sizes of a state's axes (all but batch and length) that its operator fixes."""
    view = node_view(node, types, versions)
    if pair.kind == "kv_cache":
        if domain_of(node) == MICROSOFT:
            heads, value_heads = view.attr("kv_num_heads", 0), view.attr("kv_num_heads", 0)
            width = _last(view.input(1)) or 0
        else:
            heads = value_heads = view.attr("kv_num_heads", 0)
            spec = view.input(1 if pair.present_port == 1 else 2)
            if spec is not None and spec.rank == 4:
                return {a: s for a in (1, 3) if (s := spec.shape[a]) is not None}
            width = _last(spec) or 0
        return {1: value_heads, 3: width // heads} if heads and width else {}
    if pair.kind == "conv":
        weight = view.input(1)
        if weight is None or weight.rank != 3 or None in weight.shape:
            return {}
        channels, _, taps = weight.shape
        return {1: channels or 0, 2: ((taps or 1) - 1) * view.attr("dilation", 1)}
    declared = types[pair.past]
    return {i: d for i, d in enumerate(dim_names(declared)) if i and isinstance(d, int)}


def _state_type(spec_proto: onnx.TypeProto, known: Mapping[int, int]) -> onnx.TypeProto:
    """A state's declared type with the sizes that its operator fixes.

    Args:
        spec_proto: The declared type.
        known: Axis -> size.
    """
    result = onnx.TypeProto()
    result.CopyFrom(spec_proto)
    for axis, size in known.items():
        result.tensor_type.shape.dim[axis].dim_value = size
    return result


def _last(spec: TensorSpec | None) -> int | None:
    return spec.shape[-1] if spec is not None and spec.rank else None


def _dtype(proto: onnx.TypeProto) -> str:
    return onnx.helper.tensor_dtype_to_np_dtype(proto.tensor_type.elem_type).name


def _shape(value: onnx.ValueInfoProto, roles: dict[str, str]) -> tuple[int | str, ...]:
    dims: list[int | str] = []
    for axis, dim in enumerate(dim_names(value)):
        name = dim if dim is not None else f"{value.name}:{axis}"
        if isinstance(name, str):
            roles.setdefault(name, OPEN)
        dims.append(name)
    return tuple(dims)


def _output(value: onnx.ValueInfoProto, roles: dict[str, str]) -> OutputSpec:
    shape = _shape(value, roles)
    axes = [i for i, d in enumerate(shape) if isinstance(d, str) and roles[d] == "tokens"]
    role = "logits" if value.name == "logits" else "other"
    return OutputSpec(value.name, _dtype(value.type), shape, role, axes[0] if axes else None)


def context_limit(graph: onnx.GraphProto) -> int | None:
    """How many positions the rotary tables have: a gather from them, or the table itself, before a rotary operator."""
    producer = {name: node for node in graph.node for name in node.output if name}
    tables = {t.name: t for t in graph.initializer if len(t.dims) == 2}
    limits: list[int] = []
    for node in graph.node:
        port = {"MRotaryEmbedding": 2, "GroupQueryAttention": 7}.get(node.op_type)
        if node.op_type == "RotaryEmbedding":
            port = 2 if domain_of(node) == MICROSOFT else 1
        if port is None or port >= len(node.input) or not node.input[port]:
            continue
        pending, seen = [node.input[port]], set[str]()
        while pending and len(seen) < 64:
            name = pending.pop()
            if name in seen:
                continue
            seen.add(name)
            if name in tables:
                limits.append(tables[name].dims[0])
            elif name in producer and producer[name].op_type in ("Gather", "Where", "Cast", "Squeeze", "Mul", "Concat"):
                pending += [i for i in producer[name].input if i]
    return min(limits, default=None)


__all__ = ["ModuleOptions", "ModulePlan", "context_limit", "evaluate", "plan_module"]
