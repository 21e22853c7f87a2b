"""``linattn-compile``: an ONNX model in, a self-describing IREE module out."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from linattn.runtime.command import run_command, version_line
from linattn.runtime.completion import add_completion
from linattn.runtime.errors import InputError

from .options import BUNDLE_SUFFIX, DEFAULT_MAX_MEMORY, GUARDS, SAMPLERS, CompileOptions, parse_size
from .plan.report import module_progress, stderr_progress
from .process.isolated import compile_bundle, compile_model
from .targets import TARGETS, TargetOptions
from .targets.lists import read_machines
from .targets.names import machine_name
from .text import BESIDE

OPEN = "open"


def _positive(text: str, option: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1 << 31:
        raise InputError("not a positive number", where=option, got=repr(text))
    return int(text)


def _batch(text: str) -> int | None:
    return None if text == OPEN else _positive(text, "--batch")


def _max_context(text: str | None) -> int | str | None:
    if text is None:
        return "default"
    return None if text == OPEN else _positive(text, "--max-context")


def _blocks(text: str | None) -> tuple[int, ...] | str | None:
    if text is None:
        return "default"
    if text == OPEN:
        return None
    return tuple(_positive(part, "--prefill-blocks") for part in text.split(","))


def _size(text: str | None) -> int:
    return DEFAULT_MAX_MEMORY if text is None else parse_size(text, "--max-memory")


def _dims(pairs: Sequence[str]) -> dict[str, int]:
    dims: dict[str, int] = {}
    for pair in pairs:
        name, equals, size = pair.partition("=")
        if not equals:
            raise InputError("not understood", where="--dim", got=repr(pair), expected="NAME=N")
        dims[name] = _positive(size, f"--dim {name}")
    return dims


def _states(pairs: Sequence[str]) -> dict[str, str]:
    states: dict[str, str] = {}
    for pair in pairs:
        past, equals, present = pair.partition("=")
        if not (past and equals and present) or past in states:
            raise InputError(
                "not understood", where="--state", got=repr(pair), expected="PAST=PRESENT, each input once"
            )
        states[past] = present
    return states


def make_parser() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(
        prog="linattn-compile",
        description="Compile an ONNX model with LinearAttention or CausalConvWithState with IREE.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="path of the .onnx file; its external data must lie beside it")
    add(
        "--target",
        default="cpu",
        metavar="|".join(TARGETS),
        help="machine to compile for (default: cpu); a list such as cpu,vulkan,cuda makes a bundle",
    )
    add(
        "-o",
        "--output",
        metavar="OUT",
        help="module or, named *.linattn, bundle to write (default: MODEL's name, the target, its GPU or CPU, .vmfb)",
    )
    add("--dim", action="append", default=[], metavar="NAME=N", help="bind a symbolic dim of the model; repeatable")
    add(
        "--cpu-features",
        metavar="host|portable|generic|...",
        help="a CPU's name or features such as +avx2,+fma,+f16c; portable: code for x86-64-v2, v3 and v4 in one "
        "module, which takes the best that a machine has (default: host)",
    )
    add(
        "--target-triple",
        metavar="TRIPLE",
        help="compile for another machine's CPU, such as aarch64-linux-gnu; then --cpu-features defaults to generic",
    )
    add(
        "--gpu-target",
        metavar="NAME",
        help="a GPU architecture, such as sm_89 or ada; CUDA: or several, sm_80,sm_90, with native code for each where "
        "ptxas is there; Vulkan: host, or a file of vulkaninfo --json; for two targets cuda:sm_89,vulkan:ada",
    )
    add("--batch", default="1", metavar="N|open", help="rows of a call (default: 1)")
    add("--max-context", metavar="N|open", help="tokens that the KV caches hold (default: the model's, at most 4096)")
    add("--prefill-blocks", metavar="N,N,...|open", help="sizes of the prefill entry points (default: by target)")
    add("--state", action="append", default=[], metavar="PAST=PRESENT", help="pair a state's input and output by hand")
    add("--no-state", action="append", default=[], metavar="NAME", help="an input that is no state; repeatable")
    add("--extra-output", action="append", default=[], metavar="NAME", help="a value inside the graph to hand back too")
    add("--chunk-size", metavar="N", help="tokens a chunk in strategies that go by chunks, a power of two")
    add("--strategy", metavar="NAME", help="force one strategy for the two operators; fails where it is not legal")
    add(
        "--math",
        default="strict",
        metavar="strict|fast",
        help="fast: products of f32 weights may be of terms of 16 bits, which lose 2^-16 of each, and activations of "
        "f16 and int4 models be rounded to bf16, where the machine's matrix units make that faster (default: strict)",
    )
    add("--parameters", metavar="FILE.irpa", help="write the weights to this file instead of into the module")
    add(
        "--tokenizer",
        default=BESIDE,
        metavar="DIR|FILE|none",
        help="put this tokenizer.json, and the chat template and configs beside it, into the module (default: the one "
        "beside MODEL)",
    )
    add(
        "--sampler",
        default="none",
        metavar="|".join(SAMPLERS),
        help="a step that returns the next token instead of all logits; greedy: the likeliest; draw: by temperature, "
        "top-k, top-p and min-p too; so that generation on a "
        "GPU submits the next step before the last is done (default: none)",
    )
    add(
        "--guard",
        default="none",
        metavar="|".join(GUARDS),
        help="nan: a function that tells whether states are finite, for sessions that are guarded (default: none)",
    )
    add("--plain-abi", action="store_true", help="functions that iree-run-module and C programs can call as they are")
    add("--max-memory", metavar="SIZE", help="memory that a call may need, such as 16GiB (default: 64GiB)")
    add("--dump-ir", metavar="DIR", help="keep the IR after each stage")
    add("--report", metavar="FILE.json", help="write what was found and chosen as JSON; - to standard output")
    add("--dry-run", action="store_true", help="do all but generate code and write: shows what would be chosen")
    add("--quiet", action="store_true", help="show neither progress nor the report")
    add_completion(parser)
    add("--version", action="version", version=version_line("iree-base-compiler", "onnx"))
    add("--debug", action="store_true", help="show a traceback with an error")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    chunk = arguments.chunk_size
    given = TargetOptions(arguments.cpu_features, arguments.gpu_target, arguments.target_triple)
    options = CompileOptions(
        dims=_dims(arguments.dim),
        batch=_batch(arguments.batch),
        max_context=_max_context(arguments.max_context),
        prefill_blocks=_blocks(arguments.prefill_blocks),
        chunk_size=_positive(chunk, "--chunk-size") if chunk else None,
        states=_states(arguments.state),
        no_states=frozenset(arguments.no_state),
        extra_outputs=tuple(arguments.extra_output),
        strategy=arguments.strategy,
        math=arguments.math,
        parameters=Path(arguments.parameters) if arguments.parameters else None,
        plain_abi=arguments.plain_abi,
        max_memory=_size(arguments.max_memory),
        sampler=arguments.sampler,
        guard=arguments.guard,
        tokenizer={BESIDE: BESIDE, "none": None}.get(arguments.tokenizer, Path(arguments.tokenizer)),
        dump_ir=Path(arguments.dump_ir) if arguments.dump_ir else None,
        report=Path(arguments.report) if arguments.report not in (None, "", "-") else None,
        dry_run=arguments.dry_run,
    )
    machines = [
        dataclasses.replace(options, target=name, **dataclasses.asdict(own))
        for name, own in read_machines(arguments.target, given)
    ]
    model = Path(arguments.model)
    stem = model.resolve().parent.name if model.stem == "model" else model.stem
    several = len(machines) > 1
    module = f"-{machine_name(machines[0].target, machines[0].machine)}.vmfb"
    output = Path(arguments.output or f"{stem}{BUNDLE_SUFFIX if several else module}")
    is_bundle = several or output.suffix == BUNDLE_SUFFIX
    if is_bundle and (options.parameters or output.suffix == ".vmfb"):
        got = f"--parameters {options.parameters}" if options.parameters else str(output)
        hint = f"it is a folder NAME{BUNDLE_SUFFIX} with its weights inside"
        raise InputError("does not go with a bundle", where="--target" if several else "-o", got=got, hint=hint)
    if is_bundle:
        report = compile_bundle(model, machines, output, None if arguments.quiet else module_progress)
    else:
        progress = None if arguments.quiet else stderr_progress(6)
        report = compile_model(model, machines[0], output=output, progress=progress).report
    if arguments.report == "-":
        print(json.dumps(report.to_dict(), indent=2))
    elif not arguments.quiet:
        print(report.to_text())
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or what :mod:`linattn.runtime.command` has for an error."""
    return run_command("linattn-compile", lambda: _run(make_parser().parse_args(argv)), argv)


if __name__ == "__main__":
    sys.exit(main())
