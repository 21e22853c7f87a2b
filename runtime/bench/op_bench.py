"""`linattn-bench op`: one operator over token counts, our strategies and peers in turn, errors beside times."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from linattn.runtime.device import HostArray
from linattn.runtime.errors import InputError, LinattnError, TargetError

from .cases import Case, judge
from .device_times import tells_times
from .fla_runner import FORMS, missing_fla
from .machine import commit, describe_machine, versions
from .op_models import AI_ONNX, MICROSOFT, build_op, build_trivial, chain_feeds, digest, strategy_names, trivial_feeds
from .op_rows import compare, kernel_time, rate
from .options import DEFAULT, OP_PEERS, OpOptions
from .process import Subject
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
from .timing import summarize

FORMAT = 2
_LEAST_PROFILED, _MOST_PROFILED = 3, 200
"""Calls of a turn under the profiler."""
_WARM_SECONDS, _MOST_WARMING = 1.0, 20_000
"""Seconds and calls before them on GPUs."""


@dataclass
class _Entrant:
    """A subject with what a case needs to know of it."""

    subject: Subject
    kind: str
    target: str
    domain: str
    choice: TargetChoice | None = None
    strategy: str | None = None
    samples: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    facts: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def is_timed(self) -> bool:
        """Whether the device tells the times of the kernels."""
        return self.choice is not None and tells_times(self.choice.device or self.choice.name)

    @property
    def is_chained(self) -> bool:
        """Whether the kernel's time must be found from a chain of nodes."""
        return self.choice is not None and not self.is_timed


def run_op(options: OpOptions, note: Note) -> dict[str, Any]:
    """Measures.

    Args:
        options: What.
        note: Told what happens.

    Returns:
        The result, as README.md describes it.

    Raises:
        InputError: An unknown strategy, peer or domain.
        TargetError: Nothing could be measured; the message says why.
    """
    _check(options)
    absent = Absences()
    result: dict[str, Any] = {
        "format": FORMAT,
        "kind": "op",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "versions": versions(),
        "commit": commit(),
        "method": _method(options),
        "case": _case(options.cases[0]),
    }
    rows: list[dict[str, Any]] = []
    order: list[str] = []
    models: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="linattn-bench-") as name:
        folder = Path(name)
        devices = result["devices"] = open_targets(options.targets, folder, options.ceilings, absent, note)
        entrants = _enter(options, devices, absent, note)
        try:
            _prepare_trivial(entrants, folder, absent)
            for case in options.cases:
                rows += _run_case(case, options, entrants, folder, absent, order, models, note)
        finally:
            close_all([entrant.subject for entrant in entrants])
        if options.ceilings:
            raise_ceilings(options.targets, devices, folder, note)
    if not any(row["kind"] == "linattn" for row in rows):
        reasons = "; ".join(f"{row['name']}: {row['reason']}" for row in absent.rows)
        raise TargetError("nothing of linattn could be measured", hint=reasons)
    rate(rows, devices)
    compare(rows)
    return result | {"models": models, "rows": rows, "absent": absent.rows, "order": order}


def _check(options: OpOptions) -> None:
    known = [DEFAULT, *strategy_names(options.cases[0].op_type)]
    for given, allowed, option in ((options.strategies, known, "--strategies"), (options.peers, OP_PEERS, "--peers")):
        unknown = [name for name in given if name not in allowed]
        if unknown:
            raise InputError("unknown name", where=option, got=repr(unknown[0]), expected=" | ".join(allowed))


def _method(options: OpOptions) -> dict[str, Any]:
    return {
        "rounds": options.rounds,
        "seconds": options.seconds,
        "warmup": options.warmup,
        "chain": options.chain,
        "threads": options.threads,
        "domain": options.domain,
    }


def _case(case: Case) -> dict[str, Any]:
    """What all cases have in common."""
    shared = {key: value for key, value in asdict(case).items() if key not in ("tokens", "dtype", "state_dtype")}
    return {"op": case.op_type, **shared}


def _enter(options: OpOptions, devices: Mapping[str, Any], absent: Absences, note: Note) -> list[_Entrant]:
    """Starts every subject that can run here."""
    entrants: list[_Entrant] = []

    def enter(name: str, factory: str, arguments: dict[str, Any], *facts: Any) -> None:
        try:
            entrants.append(_Entrant(start(name, factory, arguments), *facts))
        except LinattnError as error:
            absent.add(name, error)

    note("start the subjects")
    for choice in options.targets:
        for strategy in options.strategies if choice.label in devices else ():
            arguments = {"device": choice.device or choice.name, "threads": options.threads}
            facts = ("linattn", choice.label, options.domain, choice, strategy)
            enter(f"{choice.label}:{strategy}", "op_runners:IreeRunner", arguments, *facts)
    for peer in options.peers:
        if peer == "fla":
            reason = missing_fla() or (
                None if options.cases[0].op_type == "LinearAttention" else "has no such operator"
            )
            if reason is not None:
                absent.add(peer, reason)
                continue
            for form in FORMS:
                enter(f"fla-{form}", "fla_runner:FlaRunner", {"form": form}, "fla", "cuda", "")
        else:
            domain = AI_ONNX if peer == "onnxruntime-std" else MICROSOFT
            enter(peer, "op_runners:OrtRunner", {"threads": options.threads}, "onnxruntime", "cpu", domain)
    return entrants


def _prepare_trivial(entrants: list[_Entrant], folder: Path, absent: Absences) -> None:
    model = folder / "trivial.onnx"
    model.write_bytes(build_trivial())
    for entrant in list(entrants):
        if entrant.kind == "fla":
            continue
        path = model
        try:
            if entrant.choice is not None:
                path = folder / f"trivial-{file_name(entrant.target)}.vmfb"
                if not path.exists():
                    compile_file(model, path, entrant.choice, None)
            entrant.subject.call("prepare", key="overhead", model=str(path), feeds=trivial_feeds())
        except LinattnError as error:
            absent.add(entrant.subject.name, error)
            entrant.subject.close()
            entrants.remove(entrant)


def _run_case(
    case: Case,
    options: OpOptions,
    entrants: Sequence[_Entrant],
    folder: Path,
    absent: Absences,
    order: list[str],
    models: list[dict[str, Any]],
    note: Note,
) -> list[dict[str, Any]]:
    label = f"{case.op_type} T={case.tokens} {case.dtype}"
    inputs = case.inputs()
    for domain in dict.fromkeys(entrant.domain for entrant in entrants if entrant.domain):
        models.append(_describe_model(case, domain, build_op(case, inputs, domain)))
    note(f"{label}: compile, compute the float64 reference")
    reference = case.reference(inputs)
    ready: list[_Entrant] = []
    for entrant in entrants:
        entrant.samples, entrant.facts = {"call": [], "overhead": [], "chain": [], "kernel": []}, {}
        try:
            _prepare(case, inputs, entrant, options, folder)
            ready.append(entrant)
        except LinattnError as error:
            absent.add(entrant.subject.name, error, tokens=case.tokens, dtype=case.dtype)
    for turn in range(options.rounds):
        note(f"{label}: round {turn + 1} of {options.rounds}")
        for entrant in list(ready):
            order.append(entrant.subject.name)
            try:
                _take_turn(entrant, options, turn == 0)
            except LinattnError as error:
                absent.add(entrant.subject.name, error, tokens=case.tokens, dtype=case.dtype)
                ready.remove(entrant)
    return [row for entrant in ready if (row := _row(case, entrant, reference, absent, options)) is not None]


def _describe_model(case: Case, domain: str, model: bytes) -> dict[str, Any]:
    return {"op": case.op_type, "tokens": case.tokens, "dtype": case.dtype, "domain": domain, "sha256": digest(model)}


def _prepare(case: Case, inputs: dict[str, HostArray], entrant: _Entrant, options: OpOptions, folder: Path) -> None:
    """Compiles where needed and loads the case, and for GPUs the chain, into the subject's process."""
    for key, nodes in (("call", 1), ("chain", options.chain if entrant.is_chained else 0)):
        if nodes < (2 if key == "chain" else 1):
            continue
        feeds = inputs if nodes == 1 else chain_feeds(inputs, nodes)
        model = folder / f"{case.dtype}-{case.tokens}-{entrant.domain}-{nodes}.onnx"
        path = model
        if entrant.domain:
            model.write_bytes(build_op(case, inputs, entrant.domain, nodes))
        if entrant.choice is not None:
            path = folder / f"{file_name(entrant.subject.name)}-{key}.vmfb"
            forced = None if entrant.strategy == DEFAULT else entrant.strategy
            compiled = compile_file(model, path, entrant.choice, forced)
            if key == "call":
                node = compiled.report.nodes[0]
                entrant.facts = {
                    "strategy": node.strategy,
                    "reason": node.reason,
                    "rejected": node.rejected,
                    "compiled_for": compiled.report.target,
                }
                if forced is not None and node.strategy != forced:
                    raise InputError("the strategy was not taken", got=node.strategy, expected=forced)
        entrant.subject.call("prepare", key=key, model=str(path), feeds=feeds, attributes=case.attributes)
        entrant.samples[key] = []


def _take_turn(entrant: _Entrant, options: OpOptions, first: bool) -> None:
    seconds = options.seconds / options.rounds
    warmup = options.warmup if first else 1
    subject, samples = entrant.subject, entrant.samples
    samples["call"] += subject.call("time", key="call", seconds=seconds, warmup=warmup)
    if entrant.kind == "fla":
        samples["kernel"] += subject.call("kernel", key="call")
        return
    samples["overhead"] += subject.call("time", key="overhead", seconds=min(seconds, 0.05), warmup=warmup)
    if entrant.is_timed:
        calls = min(max(int(seconds / min(samples["call"])), _LEAST_PROFILED), _MOST_PROFILED)
        # An idle GPU takes its time to raise its clocks for Vulkan, and each turn is a process of its own.
        is_gpu = entrant.choice is not None and entrant.choice.name != "cpu"
        warmup = min(int(_WARM_SECONDS / min(samples["call"])), _MOST_WARMING) if is_gpu else 0
        samples["kernel"] += subject.call("kernel", key="call", calls=calls, warmup=warmup)
    if entrant.is_chained and options.chain > 1:
        samples["chain"] += subject.call("time", key="chain", seconds=seconds, warmup=warmup)


def _row(
    case: Case, entrant: _Entrant, reference: Mapping[str, HostArray], absent: Absences, options: OpOptions
) -> dict[str, Any] | None:
    try:
        error = judge(case, entrant.subject.call("results", key="call"), reference)
        watched = entrant.subject.call("watched", key="call")
        for key in ("call", "chain"):
            entrant.subject.call("drop", key=key)
    except LinattnError as failure:
        absent.add(entrant.subject.name, failure, tokens=case.tokens, dtype=case.dtype)
        return None
    call, overhead = summarize(entrant.samples["call"]), entrant.samples["overhead"]
    return {
        "subject": entrant.subject.name,
        "kind": entrant.kind,
        "target": entrant.target,
        "domain": entrant.domain,
        "strategy": entrant.facts.get("strategy"),
        "strategy_reason": entrant.facts.get("reason"),
        "strategies_rejected": entrant.facts.get("rejected"),
        "compiled_for": entrant.facts.get("compiled_for"),
        "tokens": case.tokens,
        "dtype": case.dtype,
        "status": "ok" if error["ok"] else "wrong",
        "call": call,
        "load": watched,
        "overhead": summarize(overhead) if overhead else None,
        "kernel": kernel_time(entrant.kind, entrant.samples, options.chain),
        "bytes": case.bytes,
        "flop": case.flop,
        "error": error,
    }
