"""`linattn-bench model`: prefill and decode of whole models, our targets and ONNX Runtime in turn."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from linattn.runtime.bundle import read_bundle
from linattn.runtime.device import HostArray
from linattn.runtime.errors import InputError, LinattnError, TargetError
from linattn.runtime.loading import read_manifest
from linattn.runtime.manifest import Manifest
from linattn.runtime.module import Module

from .cases import relative_error
from .lazy import compiler_side, need
from .machine import describe_machine, versions
from .model_runners import logits_output, vocabulary_of
from .op_bench import FORMAT
from .options import DEFAULT, MODEL_PEERS, ModelOptions
from .process import Subject
from .profile import profile_entry
from .subjects import Absences, Note, TargetChoice, close_all, compile_file, file_name, open_targets, start
from .timing import summarize

CHECKED_STEPS = 8
LOGIT_LIMITS = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 1e-1}
"""Relative error norm of logits against ONNX Runtime above which a subject counts as wrong."""
QUANTIZED_LIMIT = 1e-1
"""The same for quantized models: with accuracy_level 4 ONNX Runtime rounds activations to int8, which we do not."""


@dataclass
class _Entrant:
    name: str
    kind: str
    target: str
    manifest: Manifest
    path: Path
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    device: str | None = None
    subject: Subject | None = None
    logits: HostArray | None = None
    repeats: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def call(self, method: str, **arguments: Any) -> Any:
        assert self.subject is not None, "started first"
        return self.subject.call(method, **arguments)


def run_model(options: ModelOptions, note: Note) -> dict[str, Any]:
    """Measures.

    Args:
        options: What.
        note: Told what happens.

    Returns:
        The result, as README.md describes it.

    Raises:
        LinattnError: A model that does not compile or fit, an unknown peer, or nothing could be measured.
    """
    unknown = [peer for peer in options.peers if peer not in MODEL_PEERS]
    if unknown:
        raise InputError("unknown name", where="--peers", got=repr(unknown[0]), expected=" | ".join(MODEL_PEERS))
    options = dataclasses.replace(options, models=_unpacked(options.models))
    absent, order = Absences(), list[str]()
    result: dict[str, Any] = {
        "format": FORMAT,
        "kind": "model",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "versions": versions(),
        "method": {
            key: getattr(options, key) for key in ("prefill", "decode", "repeats", "threads", "seed", "all_logits")
        },
    }
    with tempfile.TemporaryDirectory(prefix="linattn-bench-") as name:
        folder = Path(name)
        modules = _check_modules(options)
        needed = [c for c in options.targets if any(path.suffix == ".onnx" for path in options.models)]
        needed += [TargetChoice(t) for t in dict.fromkeys(m.target.name for m in modules.values())]
        needed = list({choice.label: choice for choice in reversed(needed)}.values())[::-1]
        devices = open_targets(needed, folder, options.ceilings, absent, note)
        entrants = _compile_all(options, modules, devices, folder, absent, note)
        if options.profile:
            rows = _profile(entrants, options, folder, absent, note)
            return result | {"kind": "profile", "devices": devices, "rows": rows, "absent": absent.rows}
        try:
            entrants = _start_all(entrants, options, absent, note)
            entrants = _measure(entrants, options, absent, order, note)
        finally:
            close_all([entrant.subject for entrant in entrants if entrant.subject is not None])
    if not any(entrant.kind == "linattn" for entrant in entrants):
        reasons = "; ".join(f"{row['name']}: {row['reason']}" for row in absent.rows)
        raise TargetError("nothing of linattn could be measured", hint=reasons)
    peers = {entrant.manifest.model_sha256: entrant for entrant in entrants if entrant.kind != "linattn"}
    rows = [_row(entrant, peers.get(entrant.manifest.model_sha256), options) for entrant in entrants]
    result |= {"devices": devices, "models": _models(entrants)}
    return result | {"rows": rows, "absent": absent.rows, "order": order}


def _unpacked(models: Sequence[Path]) -> list[Path]:
    """The models, of a bundle all of its modules."""
    paths: list[Path] = []
    for path in models:
        paths += [path / module.file for module in read_bundle(path).modules] if path.is_dir() else [path]
    return paths


def _check_modules(options: ModelOptions) -> dict[Path, Manifest]:
    """Manifests of the `.vmfb` files; refuses other files, and contexts that are too short."""
    found: dict[Path, Manifest] = {}
    for path in options.models:
        if not path.is_file():
            raise TargetError("no such file", where=str(path))
        if path.suffix not in (".onnx", ".vmfb"):
            raise InputError("not a model", where=str(path), expected="a .onnx or a .vmfb file, or a bundle")
        if path.suffix == ".vmfb":
            manifest = found[path] = read_manifest(Module(path))
            needed, limit = options.prefill + options.decode, manifest.token_limit
            if limit is not None and limit < needed:
                hint = f"compile with --max-context {needed}, or ask for less"
                raise InputError(
                    "context too short", where=str(path), got=limit, expected=f"{needed} tokens", hint=hint
                )
    return found


def _compile_all(
    options: ModelOptions,
    modules: Mapping[Path, Manifest],
    devices: Mapping[str, Any],
    folder: Path,
    absent: Absences,
    note: Note,
) -> list[_Entrant]:
    entrants: list[_Entrant] = []
    several = len(options.models) > 1
    for path in options.models:
        if path in modules:
            manifest = modules[path]
            if manifest.target.name in devices:
                facts = {"compile_s": None, "strategy": _strategies(manifest)}
                entrants.append(_Entrant(path.stem, "linattn", manifest.target.name, manifest, path, facts))
            continue
        prefix = f"{path.parent.name if path.stem == 'model' else path.stem}:" if several else ""
        ours: list[_Entrant] = []
        for choice in options.targets:
            for strategy in options.strategies if choice.label in devices else ():
                name = f"{prefix}{choice.label}:{strategy}"
                note(f"compile {path.name} for {choice.label}" + (f", {strategy}" if strategy != DEFAULT else ""))
                try:
                    ours.append(_compile(name, path, options, choice, strategy, folder))
                except LinattnError as error:
                    absent.add(name, error)
        entrants += ours
        if ours and options.peers and not options.profile:
            facts = {"quantized": _is_quantized(path)}
            entrants.append(_Entrant(f"{prefix}onnxruntime", "onnxruntime", "cpu", ours[0].manifest, path, facts))
    if options.peers and not options.profile and not any(entrant.kind == "onnxruntime" for entrant in entrants):
        absent.add("onnxruntime", "it runs .onnx files, and none was given that compiled")
    return entrants


def _compile(
    name: str, path: Path, options: ModelOptions, choice: TargetChoice, strategy: str, folder: Path
) -> _Entrant:
    with compiler_side():
        from linattn.frontend.targets import TargetOptions, resolve_target
    blocks = resolve_target(choice.name, TargetOptions(gpu_target=choice.gpu)).prefill_blocks
    fitting = tuple(block for block in blocks if block <= options.prefill)
    output = folder / f"{path.parent.name}-{file_name(name)}.vmfb"
    begin = time.perf_counter()
    forced = None if strategy == DEFAULT else strategy
    settings = {"max_context": options.prefill + options.decode, "prefill_blocks": fitting}
    compiled = compile_file(path, output, choice, forced, **settings)
    facts = {"compile_s": time.perf_counter() - begin, "strategy": _strategies(compiled.manifest)}
    return _Entrant(name, "linattn", choice.label, compiled.manifest, output, facts, choice.device)


def _strategies(manifest: Manifest) -> str:
    """The strategies of the module's nodes, as its compile report has them; the commonest first."""
    found = [str(row.get("strategy", "")) for row in manifest.nodes if "LinearAttention" in str(row.get("op", ""))]
    return "; ".join(sorted(set(found), key=found.count, reverse=True))


def _is_quantized(path: Path) -> bool:
    """Whether the ONNX model has quantized products, which ONNX Runtime computes with rounded activations."""
    onnx = need("onnx", "compile")
    nodes = onnx.load_model(str(path), load_external_data=False).graph.node
    return any(node.op_type in ("MatMulNBits", "MatMulInteger", "QLinearMatMul") for node in nodes)


def _start_all(entrants: list[_Entrant], options: ModelOptions, absent: Absences, note: Note) -> list[_Entrant]:
    """Loads each in its process, one after the other; those that do not load are absent."""
    started: list[_Entrant] = []
    for entrant in entrants:
        note(f"load {entrant.name}")
        arguments: dict[str, Any] = {"threads": options.threads}
        if entrant.kind == "linattn":
            factory, arguments["module"] = "model_runners:IreeModel", str(entrant.path)
            arguments |= {"device": entrant.device, "all_logits": options.all_logits}
        else:
            bare = dataclasses.replace(entrant.manifest, nodes=())
            factory, arguments["model"], arguments["manifest"] = (
                "model_runners:OrtModel",
                str(entrant.path),
                bare.to_json(),
            )
        try:
            entrant.subject = start(entrant.name, factory, arguments)
            entrant.facts |= entrant.call("describe")
            started.append(entrant)
        except LinattnError as error:
            absent.add(entrant.name, error)
    return started


def _profile(
    entrants: Sequence[_Entrant], options: ModelOptions, folder: Path, absent: Absences, note: Note
) -> list[dict[str, Any]]:
    """Profiles every entry point of every module; what cannot be profiled is absent."""
    rows: list[dict[str, Any]] = []
    for entrant in entrants:
        if entrant.kind != "linattn":
            continue
        for entry in entrant.manifest.entry_points:
            note(f"profile {entry.symbol} of {entrant.name}")
            device = entrant.device or entrant.manifest.target.device
            start = options.prefill if entry.kind == "decode" else 0
            try:
                profile = profile_entry(entrant.path, entrant.manifest, entry, start, device, options.threads, folder)
            except LinattnError as error:
                absent.add(entrant.name, error)
                continue
            facts = {"subject": entrant.name, "kind": "linattn", "target": entrant.target, "status": "ok"}
            rows.append(facts | profile)
    if not rows:
        raise TargetError("nothing could be profiled", hint="; ".join(row["reason"] for row in absent.rows))
    return rows


def _measure(
    entrants: list[_Entrant], options: ModelOptions, absent: Absences, order: list[str], note: Note
) -> list[_Entrant]:
    """Warms up and collects logits, then lets the subjects take turns; those that fail become absent."""
    if not entrants:
        return entrants
    vocabulary = vocabulary_of(entrants[0].manifest)
    random = np.random.default_rng(options.seed)
    prompt = [int(token) for token in random.integers(0, vocabulary, options.prefill)]
    forced = [int(token) for token in random.integers(0, vocabulary, min(CHECKED_STEPS, options.decode))]
    for turn in range(options.repeats + 1):
        note("warm up and compare logits" if not turn else f"repeat {turn} of {options.repeats}")
        for entrant in list(entrants):
            try:
                if not turn:
                    entrant.logits = entrant.call("check", prompt=prompt, forced=forced)
                    continue
                order.append(entrant.name)
                entrant.repeats.append(entrant.call("repeat", prompt=prompt, count=options.decode))
            except LinattnError as error:
                absent.add(entrant.name, error)
                close_all([entrant.subject] if entrant.subject else [])
                entrants.remove(entrant)
    return entrants


def _row(entrant: _Entrant, reference: _Entrant | None, options: ModelOptions) -> dict[str, Any]:
    prefill = summarize([repeat["prefill_s"] for repeat in entrant.repeats])
    steps = summarize([step for repeat in entrant.repeats for step in repeat["steps_s"]])
    overheads = [seconds for repeat in entrant.repeats for seconds in repeat["overheads_s"]]
    decode = summarize([sum(repeat["steps_s"]) for repeat in entrant.repeats])
    row: dict[str, Any] = {
        "subject": entrant.name,
        "kind": entrant.kind,
        "target": entrant.target,
        "model_sha256": entrant.manifest.model_sha256,
        "strategy": entrant.facts.get("strategy"),
        "compile_s": entrant.facts.get("compile_s"),
        "load_s": entrant.facts["load_s"],
        "memory_bytes": {"loaded": entrant.facts["memory_bytes"]["now"], **entrant.repeats[-1]["memory_bytes"]},
        "first_token_s": prefill,
        "prefill": {"tokens_per_s": options.prefill / prefill["median"], "total": prefill},
        "decode": {"tokens_per_s": options.decode / decode["median"], "total": decode, "step": steps},
        "overhead": summarize(overheads) if overheads else None,
        "error": None,
        "greedy": None,
        "status": "ok",
        "reference": None,
    }
    if reference is None or reference is entrant:
        return row
    assert entrant.logits is not None
    assert reference.logits is not None
    dtypes = {logits_output(e.manifest).dtype for e in (entrant, reference)} | {
        s.dtype for s in entrant.manifest.states
    }
    limit = max(LOGIT_LIMITS.get(dtype, 0.0) for dtype in dtypes)
    limit = max(limit, QUANTIZED_LIMIT) if reference.facts.get("quantized") else limit
    error = relative_error(entrant.logits, reference.logits)
    ours, theirs = entrant.repeats[0]["tokens"], reference.repeats[0]["tokens"]
    first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
    row["error"] = {"logits": error, "limit": limit, "ok": error <= limit, "positions": len(entrant.logits)}
    row["greedy"] = {"equal": first if first is not None else len(ours), "of": len(ours)}
    row["status"] = "ok" if error <= limit else "wrong"
    row["reference"] = reference.name
    return row


def _models(entrants: Sequence[_Entrant]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for entrant in entrants:
        m = entrant.manifest
        found.setdefault(m.model_sha256, {"name": m.model_name, "sha256": m.model_sha256})
    return list(found.values())
