"""linattn-run: run a compiled model from the shell."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import time
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np

from .arrays import token_ids
from .command import run_command, version_line
from .completion import add_completion
from .describe import describe, describe_text
from .device import HostArray
from .discover import FoundDevice, devices
from .errors import InputError
from .generation.feeding import token_input
from .generation.loop import chosen_where, generate, greedy_rows
from .generation.sampling import Sampling
from .loading import WAITING
from .outputs import check_outputs, new_file
from .program import Program
from .text.command import add_arguments, run_text

_EPILOG = """A .vmfb is code: run only what you trust.
Examples:
  linattn-run model.vmfb --prompt "Once upon a time" --max-tokens 100
  linattn-run model.vmfb --chat
  linattn-run model.vmfb --ids 1,2,3 --generate 32
  linattn-run model.vmfb --input ids.npy --output-dir out
  linattn-run model.vmfb --input q=q.npy k=k.npy v=v.npy past_state=state.npy
  linattn-run --describe model.vmfb
  linattn-run --list-devices"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; None: those of the process.

    Returns:
        Exit status: 0; 2 after an error (one line on stderr); 130 after Ctrl-C; 141 where nobody reads on.
    """
    return run_command("linattn-run", lambda: _run(_parse(argv)), argv)


def describe_devices(found: Sequence[FoundDevice]) -> list[str]:
    """A line a device: the one that is taken (`*`), then the others with their reasons."""
    lines: list[str] = []
    for row in found:
        about = "; ".join(part for part in (row.name, row.details) if part)
        parts = [f"{row.uri} ({about})" if row.uri else "", row.why_not or ""]
        lines.append(f"{' ' if row.why_not else '*'} {row.target:6}  {': '.join(part for part in parts if part)}")
    return lines


def read_inputs(program: Program, texts: Sequence[str], ids: str | None) -> dict[str, HostArray]:
    """Reads `NAME=FILE.npy` and `FILE.npy` (token ids) arguments and a comma list of ids, a row a line.

    Token ids may be [T] or [B, T] and of any integer dtype; everything else must fit as it is.

    Raises:
        InputError: A file that is not a plain .npy array, ids twice, or rows of different lengths.
    """
    tokens = [spec.name for spec in program.inputs if spec.role == "tokens"]
    inputs: dict[str, HostArray] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        if not equals:
            if len(tokens) != 1:
                raise InputError("which input is this", where=text, expected="NAME=FILE.npy")
            name, file = tokens[0], text
        if name in inputs:
            raise InputError("given twice", where=name)
        inputs[name] = _load(Path(file))
    if ids is not None:
        if len(tokens) != 1 or tokens[0] in inputs:
            raise InputError("no place for these ids", where="--ids", expected="one input of token ids, given once")
        inputs[tokens[0]] = _ids(ids)
    for spec in program.inputs:
        if spec.role == "tokens" and spec.name in inputs:
            inputs[spec.name] = token_ids(spec, inputs[spec.name])
    return inputs


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.model is None and not options.list_devices:
        parser.error("the following arguments are required: MODEL")
    return options


def make_parser() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(
        prog="linattn-run",
        description="Runs a model compiled by linattn-compile.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL.vmfb|MODEL.linattn", nargs="?", help="the compiled model, or a bundle")
    parser.add_argument(
        "--device",
        metavar="URI",
        help="cpu, cuda, vulkan or an IREE device URI (default: as compiled; of a bundle the best)",
    )
    parser.add_argument(
        "--input", metavar="NAME=FILE.npy", nargs="+", action="extend", default=[], help="inputs; FILE.npy: token ids"
    )
    parser.add_argument("--ids", metavar="1,2,3", help="token ids of one row; - reads standard input, a row a line")
    parser.add_argument(
        "--generate", metavar="N", type=int, help="generate N tokens greedily and print their ids, as --ids reads them"
    )
    parser.add_argument("--output-dir", metavar="DIR", help="save each output as DIR/NAME.npy")
    parser.add_argument("--threads", metavar="N", type=int, help="CPU worker threads (default: one for each core)")
    parser.add_argument("--parameters", metavar="FILE.irpa", help="weights, if not beside the model")
    parser.add_argument("--verify", action="store_true", help="check every byte of the files before they are used")
    parser.add_argument(
        "--list-devices", action="store_true", help="show the devices of this machine, best first, and do nothing else"
    )
    parser.add_argument("--describe", action="store_true", help="show what MODEL is, and do nothing else")
    parser.add_argument("--json", action="store_true", help="--describe and --list-devices: for machines")
    add_completion(parser)
    parser.add_argument("--version", action="version", version=version_line("iree-base-runtime", "numpy"))
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    add_arguments(parser)
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.json and not (options.list_devices or options.describe):
        raise InputError("--json shows what --describe or --list-devices found", got="neither")
    if options.list_devices:
        rows = devices()
        print(_json([dataclasses.asdict(row) for row in rows]) if options.json else "\n".join(describe_devices(rows)))
        return 0
    if options.describe:
        found = describe(Path(options.model))
        print(_json(found) if options.json else describe_text(found))
        return 0
    if options.generate is not None and options.generate < 1:
        raise InputError("nothing to generate", where="--generate", got=options.generate, expected="at least 1")
    wants_text = options.prompt is not None or options.chat
    modes = ("prompt", "chat", "generate", "ids", "input", "output_dir")
    given = [f"--{name.replace('_', '-')}" for name in modes if getattr(options, name) not in (None, False, [])]
    if wants_text and len(given) > 1:
        hint = "--max-tokens limits an answer" if options.generate else "--prompt and --chat go alone"
        raise InputError("not together", where=" ".join(given), hint=hint)
    start = time.perf_counter()
    with _showing_waits(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what they say of a bundle is shown here, with the rest
        program = Program.load(options.model, options.device, options.parameters, options.threads, options.verify)
    if program.choice is not None:
        for row in program.choice.passed:
            _note(f"not {row}")
        _note(f"took {program.choice.module} on {program.choice.device} ({program.device.description})")
    level = f" ({program.cpu_level})" if program.cpu_level else ""
    _note(f"loaded {options.model} on {program.device.uri}{level} in {time.perf_counter() - start:.2f} s")
    with program:
        if wants_text:
            run_text(program, options, _note)
            return 0
        inputs = read_inputs(program, options.input, sys.stdin.read() if options.ids == "-" else options.ids)
        if not inputs:
            hint = "give --prompt TEXT, --ids 1,2,3 or --input NAME=FILE.npy (--describe has the names)"
            raise InputError("no inputs", where=options.model, hint=hint)
        if options.generate is not None:
            _generate(program, inputs, options.generate)
        else:
            _call(program, inputs, options)
    return 0


def _json(found: object) -> str:
    return json.dumps(found, indent=2)


def _call(program: Program, inputs: Mapping[str, HostArray], options: argparse.Namespace) -> None:
    stateless = not program.states or any(state.name in inputs for state in program.states)
    names = [spec.name for spec in program.outputs]
    names += [state.output for state in program.states] if stateless else []
    files = _files(names, options) if options.output_dir is not None else {}
    start = time.perf_counter()
    outputs = program.run(inputs) if stateless else program.session().run(inputs)
    seconds = time.perf_counter() - start
    tokens = sum(inputs[spec.name].size for spec in program.inputs if spec.role == "tokens" and spec.name in inputs)
    rate = f", {tokens / seconds:.1f} tokens/s" if tokens else ""
    _note(f"ran in {seconds * 1e3:.1f} ms{rate}")
    _report(outputs, files)


def _generate(program: Program, inputs: Mapping[str, HostArray], count: int) -> None:
    session = program.session()
    name = token_input(session)
    if list(inputs) != [name]:
        raise InputError("--generate takes the token ids alone", got=", ".join(inputs) or "nothing", expected=name)
    start = last = time.perf_counter()
    first = 0.0
    one = inputs[name].shape[0] == 1
    rows: list[tuple[int, ...]] = []
    try:
        for token in (generate if one else greedy_rows)(session, inputs[name], count):
            if isinstance(token, int):
                print("," if first else "", token, sep="", end="", flush=True)
            else:
                rows.append(token)
            last = time.perf_counter()
            first = first or last - start
    finally:  # of a context that is full before the end, too
        if first:
            text = "\n".join(",".join(map(str, row)) for row in zip(*rows, strict=True))
            print(text, flush=True)  # before the note, where both go into one pipe
    batch, prompt = inputs[name].shape
    rate = f", then {(count - 1) * batch / (last - start - first):.1f} tokens/s" if count > 1 else ""
    where = f"; chosen {chosen_where(program, Sampling())}"
    _note(f"prompt of {prompt} tokens in {first * 1e3:.1f} ms ({prompt * batch / first:.1f} tokens/s){rate}{where}")


def _files(names: Sequence[str], options: argparse.Namespace) -> dict[str, Path]:
    """Output -> file, each of its own; none of them is a file that was read."""
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Path] = {}
    for name in names:
        safe = "".join(char if char.isalnum() or char in "._-" else "_" for char in name).lstrip(".") or "output"
        file, number = folder / f"{safe}.npy", 2
        while file in files.values():
            file, number = folder / f"{safe}_{number}.npy", number + 1
        files[name] = file
    given = [text.partition("=")[2] or text for text in options.input]
    read = [*given, options.model, *([options.parameters] if options.parameters else [])]
    check_outputs({f"--output-dir ('{name}')": file for name, file in files.items()}, read)
    return files


def _report(outputs: Mapping[str, HostArray], files: Mapping[str, Path]) -> None:
    for name, array in outputs.items():
        line = f"{name}: {list(array.shape)} {array.dtype}"
        if array.size and array.dtype.kind != "b":
            values = array.astype(np.float64)
            line += f" min {values.min():.6g} max {values.max():.6g} mean {values.mean():.6g}"
        if name in files:
            with new_file(files[name]) as partial, partial.open("wb") as file:
                np.save(file, array, allow_pickle=False)
            line += f" -> {files[name]}"
        print(line)


def _ids(text: str) -> HostArray:
    """Rows of token ids, [B, T]: a row a line, commas or spaces between."""
    rows = [line.replace(",", " ").split() for line in text.strip().splitlines()]
    if len({len(row) for row in rows}) > 1:
        got = ", ".join(str(len(row)) for row in rows[:8])
        raise InputError("rows of different lengths", where="--ids", got=got, hint="give them one by one")
    try:
        return np.array([[int(part) for part in row] for row in rows], np.int64).reshape(len(rows), -1)
    except (ValueError, OverflowError) as error:
        raise InputError("not token ids", where="--ids", got=repr(text[:40]), expected="1,2,3") from error


def _load(file: Path) -> HostArray:
    try:
        array = cast(object, np.load(file, allow_pickle=False))
    except (ValueError, EOFError) as error:
        raise InputError("not a .npy array", where=str(file), hint="numpy.save writes one") from error
    if not isinstance(array, np.ndarray):
        raise InputError("not a single .npy array", where=str(file))
    return cast(HostArray, array)


class _Waits(logging.Handler):
    """Shows of the log what a load waits for."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == WAITING:
            _note(record.getMessage())


@contextmanager
def _showing_waits() -> Generator[None]:
    log, waits = logging.getLogger("linattn.runtime"), _Waits()
    before = log.level
    log.addHandler(waits)
    log.setLevel(min(log.getEffectiveLevel(), logging.INFO))
    try:
        yield
    finally:
        log.setLevel(before)
        log.removeHandler(waits)


def _note(text: str) -> None:
    print(f"linattn-run: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
