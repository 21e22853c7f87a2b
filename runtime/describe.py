"""What a compiled file says about itself, read without a device: `linattn-run --describe`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from .bundle import read_bundle
from .device import numpy_dtype
from .errors import TargetError
from .loading import read_manifest
from .manifest import InputSpec, Manifest, OutputSpec, StateSpec
from .module import Module
from .sizes import size_text
from .text.files import read_module

Described = dict[str, Any]


def describe(path: Path) -> Described:
    """A module, or a bundle with each of its modules; README.md has the keys.

    Args:
        path: The `.vmfb` file, or the folder of the bundle.

    Raises:
        TargetError: No such file, or none that linattn-compile wrote, or a damaged one.
    """
    if path.is_dir():
        bundle = read_bundle(path)
        modules = [describe(path / module.file) for module in bundle.modules]
        return {"bundle": str(path), "weight_bytes": bundle.weights.size, "modules": modules}
    if not path.is_file():
        raise TargetError("no such file", where=str(path))
    module = Module(path)
    m = read_manifest(module)
    text = read_module(path)
    beside = path.parent / m.parameters.file if m.parameters else None
    return {
        "file": str(path),
        "file_bytes": path.stat().st_size,
        "model": {"name": m.model_name, "sha256": m.model_sha256},
        "producer": dict(m.producer or {}),
        "target": dataclasses.asdict(m.target),
        "batch": m.batch,
        "max_context": m.max_context,
        "context_limit": m.context_limit,
        "entry_points": [dataclasses.asdict(entry) for entry in m.entry_points],
        "inputs": [dataclasses.asdict(spec) for spec in m.inputs],
        "outputs": [dataclasses.asdict(spec) for spec in m.outputs],
        "states": [dataclasses.asdict(spec) | {"bytes": _bytes(m, spec)} for spec in m.states],
        "strategies": _strategies(m.nodes),
        "text": sorted(text.contents) if text is not None else [],
        "memory": _memory(module, m, path, beside),
    }


def describe_text(described: Described) -> str:
    """The same for people."""
    if "bundle" in described:
        weights = size_text(described["weight_bytes"])
        first = f"bundle    {described['bundle']}  ({len(described['modules'])} modules, {weights} of weights)"
        return "\n\n".join([first, *(describe_text(module) for module in described["modules"])])
    model, target, memory = described["model"], described["target"], described["memory"]
    made = ", ".join(f"{name} {version}" for name, version in described["producer"].items())
    inside = "weights inside" if memory["weights_file"] is None else f"weights in {memory['weights_file']}"
    lines = [
        f"model     {model['name']}  ({model['sha256'][:12]}; {made})",
        f"file      {described['file']}  ({size_text(described['file_bytes'])}, {inside})",
        f"target    {target['name']}, {target['description']}; runs on {target['device']}",
        f"needs     {_needs(target)}",
        *([f"native    {', '.join(target['native'])}; other GPUs compile its PTX"] if target["native"] else []),
        f"batch     {described['batch'] or 'open'}; context of {_context(described)}",
    ]
    lines += _column("entries", [_entry_text(entry) for entry in described["entry_points"]])
    lines += _column("inputs", [_spec_text(spec) + _input_text(spec) for spec in described["inputs"]])
    lines += _column("outputs", [f"{_spec_text(spec)}  {spec['role']}" for spec in described["outputs"]])
    lines += _column("states", _state_lines(described["states"]))
    lines += _column("choices", [_strategy_text(row) for row in described["strategies"]])
    lines += _column("text", [", ".join(described["text"]) or "no tokenizer inside"])
    lines.append(f"memory    {_memory_text(memory)}")
    return "\n".join(lines)


def _bytes(manifest: Manifest, spec: InputSpec | OutputSpec | StateSpec) -> int | None:
    """Of one row with the whole capacity; of a context that is open for each token; None where another size is open."""
    known = {"batch": manifest.batch or 1, "past": manifest.max_context or 1}
    sizes = [dim if isinstance(dim, int) else known.get(manifest.dims[dim]) for dim in spec.shape]
    return math.prod(size for size in sizes if size) * numpy_dtype(spec.dtype).itemsize if all(sizes) else None


def _strategies(nodes: Sequence[Any]) -> list[dict[str, Any]]:
    """The strategies of the nodes that the compile report has, equal ones together, with how many they are."""
    found: dict[tuple[str, ...], int] = {}
    for node in nodes:
        row = cast(Mapping[str, object], node if isinstance(node, dict) else {})
        key = tuple(str(row.get(name, "")) for name in ("op", "rule", "heads", "dtypes", "strategy", "reason"))
        found[key] = found.get(key, 0) + 1
    names = "op", "rule", "heads", "dtypes", "strategy", "reason"
    return [{"count": count, **dict(zip(names, key, strict=True))} for key, count in found.items()]


def _memory(module: Module, m: Manifest, path: Path, beside: Path | None) -> dict[str, Any]:
    """Bytes on the device: of the program, and of each sequence."""
    symbols = [name for entry in m.entry_points for name in entry.symbols]
    working = [module.workspace_bytes(symbol) for symbol in symbols]
    results = [
        sum(math.prod(spec[1]) * numpy_dtype(spec[0]).itemsize for spec in specs[: len(m.outputs)] if spec is not None)
        for symbol in symbols
        if (specs := module.result_specs(symbol)) is not None
    ]
    states = [_bytes(m, spec) for spec in m.states]
    return {
        "module": path.stat().st_size,
        "weights_file": beside.name if beside else None,
        "weights": beside.stat().st_size if beside is not None and beside.is_file() else None,
        "workspace": max((size for size in working if size is not None), default=None),
        "outputs": sum(results) if results else None,
        "sequence": None if None in states else sum(size for size in states if size is not None),
        "grows": m.max_context is None and any(spec.kind == "kv_cache" for spec in m.states),
    }


def _memory_text(memory: Mapping[str, Any]) -> str:
    parts = [f"{size_text(memory['module'])} of module"]
    if memory["weights_file"] is not None:
        size = "missing" if memory["weights"] is None else size_text(memory["weights"])
        parts.append(f"{size} of weights")
    if memory["workspace"] is not None:
        parts.append(f"{size_text(memory['workspace'] + (memory['outputs'] or 0))} for outputs and what calls compute")
    if memory["sequence"] is not None:
        more = ", and more with each token" if memory["grows"] else ""
        parts.append(f"{size_text(memory['sequence'])} for each sequence{more}")
    return ", ".join(parts)


def _needs(target: Mapping[str, Any]) -> str:
    if target["levels"]:
        return f"{target['levels'][-1]['name']}; has code for {', '.join(level['name'] for level in target['levels'])}"
    if target["architecture"] is not None:
        return f"{target['architecture']} with {', '.join(target['instruction_sets']) or 'what every one has'}"
    needs = target["needs"]
    if needs is None:
        return "not told"
    parts = [f"workgroups of {needs['threads']} threads with {size_text(needs['shared_memory'])} shared"]
    parts.append(f"{needs['storage_buffers']} storage buffers, {needs['push_constants']} bytes of push constants")
    if target["subgroup_size"]:
        parts.append(f"subgroups of {target['subgroup_size']}")
    return "; ".join([*parts, *needs["features"]])


def _context(described: Described) -> str:
    most, limit = described["max_context"], described["context_limit"]
    text = "any number of tokens" if most is None else f"{most} tokens"
    return text if limit is None else f"{text} (the model's: {limit})"


def _entry_text(entry: Mapping[str, Any]) -> str:
    count = "any number of tokens" if entry["tokens"] is None else f"{entry['tokens']} tokens"
    count = "1 token" if entry["tokens"] == 1 else count
    last = f"; {entry['last']}: the last position's logits only" if entry["last"] else ""
    token = f"; {entry['token']}: the likeliest next token" if entry["token"] else ""
    draw = f"; {entry['draw']}: the next token, drawn" if entry["draw"] else ""
    steps = f"; {entry['steps']}: several steps of it" if entry["steps"] else ""
    packed = f"; {entry['packed']}: with its position in memory" if entry["packed"] else ""
    alone = "; small: by the calling thread" if entry["alone"] else ""
    return f"{entry['symbol']}  {count}{last}{token}{draw}{steps}{packed}{alone}"


def _spec_text(spec: Mapping[str, Any]) -> str:
    return f"{spec['name']}  {spec['dtype']} [{', '.join(map(str, spec['shape']))}]"


def _input_text(spec: Mapping[str, Any]) -> str:
    bounds = f", {spec['bounds'][0]} to {spec['bounds'][1]}" if spec["bounds"] else ""
    return f"  {spec['role']}{bounds}"


def _state_lines(states: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each kind with its sizes, and the first and last of its names: there may be a hundred."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for state in states:
        groups.setdefault((state["kind"], state["dtype"], tuple(state["shape"]), state["bytes"]), []).append(state)
    lines: list[str] = []
    for (kind, dtype, shape, size), same in groups.items():
        names = same[0]["name"] + (f" ... {same[-1]['name']}" if len(same) > 1 else "")
        each = f", {size_text(size)} each" if size is not None else ""
        lines.append(f"{len(same)} x {kind}  {dtype} [{', '.join(map(str, shape))}]{each}  {names}")
    return lines


def _strategy_text(row: Mapping[str, Any]) -> str:
    op = str(row["op"]).rpartition(".")[2]
    return f"{row['count']} x {op} {row['rule']}, {row['heads']}, {row['dtypes']}: {row['strategy']}, {row['reason']}"


def _column(title: str, rows: Sequence[str]) -> list[str]:
    return [f"{title if i == 0 else '':<9} {row}" for i, row in enumerate(rows)]
