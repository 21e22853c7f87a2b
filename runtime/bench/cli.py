"""`linattn-bench`: operators and whole models, measured beside their peers."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from linattn.runtime.command import run_command
from linattn.runtime.errors import InputError
from linattn.runtime.outputs import check_outputs, new_file

from .arguments import OPS, make_parser
from .cases import RULES, AttentionCase, Case, ConvCase, dtype_name
from .export import to_csv, to_markdown
from .model_bench import run_model
from .op_bench import FORMAT, run_op
from .op_models import DOMAINS, strategy_names
from .options import DEFAULT, ModelOptions, OpOptions
from .report import write_page
from .state_bench import measure_states, states_text
from .subjects import Note, files_of, parse_targets, split
from .table import to_text


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; None: those of the process.

    Returns:
        Exit status: 0; 1 if a subject of linattn gave a wrong result; 2 after an error (one line on stderr);
        130 after Ctrl-C; 141 where nobody reads on.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    return run_command("linattn-bench", lambda: _run(make_parser().parse_args(argv), given), argv)


def _run(arguments: argparse.Namespace, given: Sequence[str]) -> int:
    if arguments.command == "plot":
        _plot(arguments)
        return 0
    if arguments.command == "report":
        check_outputs({"-o": arguments.output}, arguments.results)
        write_page(_read(arguments.results), arguments.results, Path(arguments.output))
        return 0
    if arguments.command == "states":
        a = arguments
        rows = measure_states(Path(a.module), a.device, a.prompt, a.forks, a.steps)
        print(json.dumps(rows, indent=1) if a.json else states_text(rows))
        return 0
    _check_files(arguments)
    result = _run_op(arguments) if arguments.command == "op" else _run_model(arguments)
    result["command"] = ["linattn-bench", *given]
    _write(arguments, result)
    return int(any(row["status"] != "ok" and row["kind"] == "linattn" for row in result["rows"]))


def _run_op(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.op not in OPS:
        raise InputError("unknown operator", where="--op", got=repr(arguments.op), expected=" | ".join(OPS))
    if arguments.domain not in DOMAINS:
        raise InputError("unknown domain", where="--domain", got=repr(arguments.domain), expected=" | ".join(DOMAINS))
    for option in ("batch", "heads", "kv_heads", "dim", "value_dim", "channels", "taps", "rounds", "warmup", "threads"):
        _positive(getattr(arguments, option), option)
    _positive(arguments.seconds, "seconds")
    every = [DEFAULT, *strategy_names(OPS[arguments.op])] if arguments.strategies == "all" else None
    options = OpOptions(
        cases=_cases(arguments),
        domain=arguments.domain,
        targets=parse_targets(arguments.targets),
        strategies=every or split(arguments.strategies, "--strategies"),
        peers=_peers(arguments.peers),
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        warmup=arguments.warmup,
        chain=arguments.chain,
        threads=arguments.threads,
        ceilings=not arguments.no_ceilings,
    )
    return run_op(options, _progress(arguments.quiet))


def _cases(arguments: argparse.Namespace) -> list[Case]:
    if arguments.rule not in RULES:
        raise InputError("unknown rule", where="--rule", got=repr(arguments.rule), expected=" | ".join(RULES))
    dtypes = [dtype_name(short) for short in split(arguments.dtype, "--dtype")]
    tokens = [_whole(part, "--tokens") for part in split(arguments.tokens, "--tokens")]
    if arguments.op == "causal_conv":
        shape = (arguments.batch, arguments.channels, arguments.taps, arguments.seed)
        return [ConvCase(count, dtype, *shape) for dtype in dtypes for count in tokens]
    state = arguments.state_dtype
    return [
        AttentionCase(
            tokens=count,
            dtype=dtype,
            rule=arguments.rule,
            batch=arguments.batch,
            heads=arguments.heads,
            kv_heads=arguments.kv_heads or arguments.heads,
            dk=arguments.dim,
            dv=arguments.value_dim or arguments.dim,
            state_dtype=dtype_name(state) if state else dtype,
            key_decay=arguments.key_decay,
            seed=arguments.seed,
        )
        for dtype in dtypes
        for count in tokens
    ]


def _run_model(arguments: argparse.Namespace) -> dict[str, Any]:
    for option in ("decode", "repeats", "warmup", "threads"):
        _positive(getattr(arguments, option), option)
    options = ModelOptions(
        models=[Path(model) for model in arguments.models],
        prefill=sorted({_whole(part, "--prefill") for part in split(arguments.prefill, "--prefill")}),
        decode=arguments.decode,
        repeats=arguments.repeats,
        warmup=arguments.warmup,
        targets=parse_targets(arguments.targets),
        strategies=split(arguments.strategies, "--strategies"),
        peers=_peers(arguments.peers),
        threads=arguments.threads,
        seed=arguments.seed,
        ceilings=not arguments.no_ceilings,
        all_logits=arguments.all_logits,
        profile=arguments.profile,
    )
    return run_model(options, _progress(arguments.quiet))


def _write(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    written: dict[str, Callable[[dict[str, Any]], str]] = {
        "json": lambda found: json.dumps(_finite(found), indent=2, allow_nan=False) + "\n",
        "markdown": to_markdown,
        "csv": to_csv,
    }
    asked = {name: getattr(arguments, name) for name in written if getattr(arguments, name)}
    if "-" not in asked.values():
        print(to_text(result))
    for name, path in asked.items():
        text = written[name](result)
        if path == "-":
            sys.stdout.write(text)
            continue
        with new_file(path) as partial:
            partial.write_text(text)
    if arguments.plot and result["kind"] != "profile":
        from .plot import draw

        draw([result], Path(arguments.plot))


def _plot(arguments: argparse.Namespace) -> None:
    from .plot import check, draw

    check(Path(arguments.output))
    check_outputs({"-o": arguments.output}, arguments.results)
    draw(_read(arguments.results), Path(arguments.output))


def _read(paths: Sequence[str]) -> list[dict[str, Any]]:
    """Results that were written with --json."""
    results: list[dict[str, Any]] = []
    for path in paths:
        try:
            results.append(json.loads(Path(path).read_text()))
            missing = [key for key in ("kind", "method", "rows") if key not in results[-1]]
        except (ValueError, TypeError) as error:
            raise InputError("not a result of linattn-bench", where=path, got=str(error)) from error
        if missing:
            raise InputError("not a result of linattn-bench", where=path, hint=f"it has no {missing[0]!r}")
        if results[-1].get("format") != FORMAT:
            hint = "measure again with this version"
            got = results[-1].get("format")
            raise InputError("a result of another version", where=path, got=got, expected=FORMAT, hint=hint)
    return results


def _finite(value: Any) -> Any:
    """JSON has no infinity: an infinite error becomes null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in cast(Mapping[str, Any], value).items()}
    if isinstance(value, list):
        return [_finite(item) for item in cast(list[Any], value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_files(arguments: argparse.Namespace) -> None:
    """Finds out before the measuring what would fail after it."""
    asked = {f"--{name}": getattr(arguments, name) for name in ("json", "markdown", "csv", "plot")}
    if list(asked.values()).count("-") > 1:
        got = ", ".join(option for option, path in asked.items() if path == "-")
        raise InputError("standard output takes one of them", got=got)
    asked = {option: path for option, path in asked.items() if path not in (None, "-")}
    if asked:
        models = [Path(path) for path in getattr(arguments, "models", [])]
        inputs = [file for model in models for file in files_of(model)]
        check_outputs(asked, inputs)
    if arguments.plot:
        from .plot import check

        check(Path(arguments.plot))


def _peers(text: str) -> list[str]:
    return [] if text == "none" else split(text, "--peers")


def _whole(text: str, option: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1 << 31:
        raise InputError("not a positive number", where=option, got=repr(text))
    return int(text)


def _positive(value: float | None, option: str) -> None:
    if value is not None and not value > 0:
        raise InputError("not a positive number", where=f"--{option.replace('_', '-')}", got=value)


def _progress(quiet: bool) -> Note:
    return lambda text: None if quiet else print(f"linattn-bench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
