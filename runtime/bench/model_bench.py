"""`linattn-bench model`: prefill and decode of whole models, our targets and ONNX Runtime in turn."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from linattn.runtime.bundle import read_bundle
from linattn.runtime.errors import InputError, LinattnError, TargetError
from linattn.runtime.loading import read_manifest
from linattn.runtime.manifest import Manifest
from linattn.runtime.module import Module

from .lazy import compiler_side
from .machine import commit, core_count, describe_machine, versions
from .model_peers import peers_of, weights_of
from .model_rows import Entrant, row_of
from .model_runners import vocabulary_of
from .op_bench import FORMAT
from .options import DEFAULT, MODEL_PEERS, ModelOptions
from .process import Subject
from .profile import profile_entry
from .subjects import (
    Absences,
    Note,
    TargetChoice,
    close_all,
    compile_file,
    file_name,
    open_targets,
    raise_ceilings,
    start,
)
from .units import HOW, add_units

CHECKED_STEPS = 8
_METHOD = ("prefill", "decode", "repeats", "warmup", "threads", "seed", "all_logits")


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
        "commit": commit(),
        "method": {key: getattr(options, key) for key in _METHOD},
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
            if options.ceilings:
                raise_ceilings(needed, devices, folder, note)
            _add_units(rows, entrants, devices, options.threads)
            result |= {"kind": "profile", "method": result["method"] | {"unit_rates": HOW}}
            return result | {"devices": devices, "rows": rows, "absent": absent.rows}
        try:
            entrants = _start_all(entrants, options, absent, note)
            prompts, forced = _prompts(entrants, options)
            entrants = _measure(entrants, prompts, forced, options, absent, order, note)
            peers = {e.manifest.model_sha256: e for e in entrants if e.kind == "onnxruntime"}
            warmup = {"prompts": options.warmup, "steps": options.warmup * len(forced)}
            rows = [
                row_of(entrant, peers.get(entrant.manifest.model_sha256), prompt, warmup)
                for prompt in prompts
                for entrant in entrants
            ]
        finally:
            close_all([entrant.subject for entrant in entrants if entrant.subject is not None])
    if not any(entrant.kind == "linattn" for entrant in entrants):
        reasons = "; ".join(f"{row['name']}: {row['reason']}" for row in absent.rows)
        raise TargetError("nothing of linattn could be measured", hint=reasons)
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
            needed, limit = options.longest + options.decode, manifest.token_limit
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
) -> list[Entrant]:
    entrants: list[Entrant] = []
    several = len(options.models) > 1
    for path in options.models:
        if path in modules:
            manifest = modules[path]
            if manifest.target.name in devices:
                facts = {"compile_s": None, "strategy": _strategies(manifest)}
                entrants.append(Entrant(path.stem, "linattn", manifest.target.name, manifest, path, facts))
            continue
        prefix = f"{path.parent.name if path.stem == 'model' else path.stem}:" if several else ""
        ours: list[Entrant] = []
        for choice in options.targets:
            for strategy in options.strategies if choice.label in devices else ():
                name = f"{prefix}{choice.label}:{strategy}"
                note(f"compile {path.name} for {choice.label}" + (f", {strategy}" if strategy != DEFAULT else ""))
                try:
                    ours.append(_compile(name, path, options, choice, strategy, folder))
                except LinattnError as error:
                    absent.add(name, error)
        weights, rounds = weights_of(path) if ours else ("", False)
        for entrant in ours:
            entrant.facts["weights"] = weights
        entrants += ours
        if ours and not options.profile:
            entrants += peers_of(options, prefix, path, ours, {"quantized": rounds, "weights": weights})
    for peer in () if options.profile else options.peers:
        if not any(entrant.kind == peer for entrant in entrants):
            runs = "the .gguf beside an .onnx file" if peer == "llama.cpp" else ".onnx files"
            absent.add(peer, f"it runs {runs}, and none was given that compiled")
    return entrants


def _compile(
    name: str, path: Path, options: ModelOptions, choice: TargetChoice, strategy: str, folder: Path
) -> Entrant:
    with compiler_side():
        from linattn.frontend.targets import TargetOptions, resolve_target
    blocks = resolve_target(choice.name, TargetOptions(gpu_target=choice.gpu)).prefill_blocks
    fitting = tuple(block for block in blocks if block <= options.longest)
    output = folder / f"{path.parent.name}-{file_name(name)}.vmfb"
    begin = time.perf_counter()
    forced = None if strategy == DEFAULT else strategy
    settings: dict[str, Any] = {"max_context": options.longest + options.decode, "prefill_blocks": fitting}
    if choice.name == "cpu":  # what `generate` takes beyond its calls is measured too
        settings["sampler"] = "greedy"
    compiled = compile_file(path, output, choice, forced, **settings)
    facts = {"compile_s": time.perf_counter() - begin, "strategy": _strategies(compiled.manifest)}
    return Entrant(name, "linattn", choice.label, compiled.manifest, output, facts, choice.device)


def _strategies(manifest: Manifest) -> str:
    """The strategies of the module's nodes, as its compile report has them; the commonest first."""
    found = [str(row.get("strategy", "")) for row in manifest.nodes if "LinearAttention" in str(row.get("op", ""))]
    return "; ".join(sorted(set(found), key=found.count, reverse=True))


def _start_all(entrants: list[Entrant], options: ModelOptions, absent: Absences, note: Note) -> list[Entrant]:
    """Loads each in its process, one after the other; those that do not load are absent."""
    started: list[Entrant] = []
    for entrant in entrants:
        note(f"load {entrant.name}")
        try:
            entrant.subject = _start(entrant, options)
            entrant.facts |= entrant.call("describe")
            started.append(entrant)
        except LinattnError as error:
            absent.add(entrant.name, error)
    return started


def _start(entrant: Entrant, options: ModelOptions, *, exact: bool = False) -> Subject:
    """A process with the model of a subject; `exact`: in ONNX Runtime without rounded activations."""
    arguments: dict[str, Any] = {"threads": options.threads}
    if entrant.kind == "linattn":
        arguments |= {"module": str(entrant.path), "device": entrant.device, "all_logits": options.all_logits}
        return start(entrant.name, "model_runners:IreeModel", arguments)
    if entrant.kind == "llama.cpp":
        arguments |= {"model": str(entrant.path), "target": entrant.target}
        return start(entrant.name, "llama_runner:LlamaCpp", arguments)
    bare = dataclasses.replace(entrant.manifest, nodes=())
    arguments |= {"model": str(entrant.path), "manifest": bare.to_json(), "exact": exact}
    return start(entrant.name, "model_runners:OrtModel", arguments)


def _profile(
    entrants: Sequence[Entrant], options: ModelOptions, folder: Path, absent: Absences, note: Note
) -> list[dict[str, Any]]:
    """Profiles every entry point of every module; what cannot be profiled is absent."""
    rows: list[dict[str, Any]] = []
    for entrant in entrants:
        if entrant.kind != "linattn":
            continue
        for entry in entrant.manifest.entry_points:
            note(f"profile {entry.symbol} of {entrant.name}")
            start = options.longest if entry.kind == "decode" else 0
            alone = "local-sync" if start < entry.alone else None
            device = entrant.device or alone or entrant.manifest.target.device
            try:
                profile = profile_entry(entrant.path, entrant.manifest, entry, start, device, options.threads, folder)
            except LinattnError as error:
                absent.add(entrant.name, error)
                continue
            facts = {"subject": entrant.name, "kind": "linattn", "target": entrant.target, "status": "ok"}
            rows.append(facts | {"device": device} | profile)
    if not rows:
        raise TargetError("nothing could be profiled", hint="; ".join(row["reason"] for row in absent.rows))
    return rows


def _add_units(
    profiles: Sequence[Mapping[str, Any]],
    entrants: Sequence[Entrant],
    devices: Mapping[str, Mapping[str, Any]],
    threads: int | None,
) -> None:
    """Names what each product of the profiles ran on, and its part of that unit's rate."""
    named = {entrant.name: entrant for entrant in entrants}
    for profile in profiles:
        entrant = named[profile["subject"]]
        target = entrant.manifest.target
        ceilings = devices.get(entrant.target, {}).get("ceilings")
        add_units(profile["rows"], target, ceilings, _part_of_cores(profile["device"], threads))


def _part_of_cores(device: str, threads: int | None) -> float:
    """How many of the machine's cores a device computes on, of those whose rate was measured."""
    cores = core_count()
    working = {"local-sync": 1, "local-task": min(threads or cores, cores)}.get(device.partition("://")[0], cores)
    return working / cores


def _prompts(entrants: Sequence[Entrant], options: ModelOptions) -> tuple[list[list[int]], list[int]]:
    """A prompt for each length, the shorter ones beginnings of the longest, and tokens to give after it."""
    vocabulary = vocabulary_of(entrants[0].manifest) if entrants else 1
    random = np.random.default_rng(options.seed)
    longest = [int(token) for token in random.integers(0, vocabulary, options.longest)]
    forced = [int(token) for token in random.integers(0, vocabulary, min(CHECKED_STEPS, options.decode))]
    return [longest[:length] for length in options.prefill], forced


def _measure(
    entrants: list[Entrant],
    prompts: Sequence[Sequence[int]],
    forced: Sequence[int],
    options: ModelOptions,
    absent: Absences,
    order: list[str],
    note: Note,
) -> list[Entrant]:
    """Warms up and collects logits, then lets the subjects take turns; those that fail become absent."""
    for turn in range(options.repeats + 1):
        note("warm up and compare logits" if not turn else f"repeat {turn} of {options.repeats}")
        for prompt in prompts:
            for entrant in list(entrants):
                try:
                    if not turn:
                        _warm_up(entrant, prompt, forced, options)
                        continue
                    order.append(entrant.name)
                    found = entrant.call("repeat", prompt=prompt, count=options.decode)
                    entrant.repeats.setdefault(len(prompt), []).append(found)
                except LinattnError as error:
                    absent.add(entrant.name, error)
                    close_all([entrant.subject] if entrant.subject else [])
                    entrants.remove(entrant)
    return entrants


def _warm_up(entrant: Entrant, prompt: Sequence[int], forced: Sequence[int], options: ModelOptions) -> None:
    """The untimed turns; their logits are compared. Of a quantised model ONNX Runtime tells its noise, too."""
    length = len(prompt)
    if entrant.kind == "llama.cpp":  # which warms up itself and shows no logits
        return
    for _ in range(options.warmup):
        entrant.logits[length] = entrant.call("check", prompt=prompt, forced=forced)
    if not entrant.facts.get("quantized"):
        return
    exact = _start(entrant, options, exact=True)
    try:
        entrant.exact[length] = exact.call("check", prompt=prompt, forced=forced)
    finally:
        close_all([exact])


def _models(entrants: Sequence[Entrant]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for entrant in entrants:
        m = entrant.manifest
        found.setdefault(m.model_sha256, {"name": m.model_name, "sha256": m.model_sha256})
    return list(found.values())
