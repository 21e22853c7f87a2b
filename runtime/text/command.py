"""The part of `linattn-run` that speaks text: `--prompt`, `--chat` and how tokens are drawn."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from linattn.install import install_hint

from ..errors import InputError
from ..generation.loop import chosen_where
from ..generation.sampling import Sampling
from ..program import Program
from .generator import DEFAULT_MAX_TOKENS, TextGenerator, TextStream

Note = Callable[[str], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of text to a parser."""
    group = parser.add_argument_group("text", f"needs the packages tokenizers and jinja2: {install_hint('text')}")
    add = group.add_argument
    add("--prompt", metavar="TEXT", help="continue a text; - reads it from standard input")
    add("--chat", action="store_true", help="a conversation, an answer a line; /reset forgets it, Ctrl-D ends")
    add("--tokenizer", metavar="DIR|FILE", help="the tokenizer.json (default: inside the model, or beside it)")
    add("--max-tokens", metavar="N", type=int, default=DEFAULT_MAX_TOKENS, help="default: %(default)s")
    add("--stop", metavar="TEXT", action="append", default=[], help="end the answer before this text; repeatable")
    add("--temperature", metavar="T", type=float, help="0 takes the likeliest token (default: the model's files)")
    add("--top-k", metavar="K", type=int, help="draw from the K likeliest tokens; 0: from all")
    add("--top-p", metavar="P", type=float, help="and from the likeliest that make up this probability")
    add("--min-p", metavar="P", type=float, help="and from those at least this likely beside the likeliest")
    add("--repeat-penalty", metavar="R", type=float, help="divide the logits of tokens that were there; 1: do not")
    add(
        "--draft",
        metavar="MODULE",
        help="a smaller model of the same vocabulary, on the same device: it guesses tokens",
    )
    add("--seed", metavar="N", type=int, help="of the random numbers; equal seeds give equal texts")


def run_text(program: Program, options: argparse.Namespace, note: Note) -> None:
    """Continues a prompt or holds a conversation.

    Args:
        program: The model.
        options: The parsed arguments.
        note: Prints a remark to standard error.

    Raises:
        InputError: A setting out of range, no tokenizer, an empty prompt.
    """
    with ExitStack() as stack:
        draft = None
        if options.draft is not None:
            draft = stack.enter_context(Program.load(options.draft, options.device, threads=options.threads))
        generator = TextGenerator(program, options.tokenizer, draft=draft)
        settings = _settings(options, generator.sampling)
        where = chosen_where(program, settings["sampling"]) if draft is None else "on the host, which verifies guesses"
        note(f"tokens are chosen {where}")
        if options.chat:
            _chat(generator, settings, note)
        else:
            text = sys.stdin.read() if options.prompt == "-" else options.prompt
            _show(generator.generate(text, **settings), note)


def _settings(options: argparse.Namespace, sampling: Sampling) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(Sampling)]
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if "temperature" not in given and not sampling.temperature and given.keys() & {"top_k", "top_p", "min_p", "seed"}:
        given["temperature"] = 1.0  # who asks for a draw gets one
    try:
        chosen = dataclasses.replace(sampling, **given)
    except InputError as error:
        where = f"--{str(error.where).replace('_', '-')}"
        raise InputError(error.message, where=where, got=error.got, expected=error.expected) from error
    if options.max_tokens < 1:
        raise InputError("nothing to generate", where="--max-tokens", got=options.max_tokens, expected="at least 1")
    return {"max_tokens": options.max_tokens, "stop": options.stop, "sampling": chosen}


def _chat(generator: TextGenerator, settings: dict[str, Any], note: Note) -> None:
    messages: list[dict[str, str]] = []
    if not generator.can_chat:
        generator.chat(messages)  # says so
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip() == "/reset":
            messages.clear()
            generator.reset()
        elif line.strip():
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": _show(generator.chat(messages, **settings), note)})


def _show(stream: TextStream, note: Note) -> str:
    pieces: list[str] = []
    for piece in stream:
        print(piece, end="", flush=True)
        pieces.append(piece)
    print(flush=True)
    fed = stream.prompt_tokens - stream.reused_tokens
    reused = f" ({stream.reused_tokens} more reused)" if stream.reused_tokens else ""
    steps = len(stream.ids) - 1
    rate = f", then {steps / stream.answer_seconds:.1f} tokens/s" if steps and stream.answer_seconds else ""
    speed = f"{fed / stream.prompt_seconds:.1f} tokens/s" if stream.prompt_seconds else ""
    took = f"{stream.prompt_seconds * 1e3:.1f} ms ({speed})"
    note(f"prompt of {fed} tokens{reused} in {took}{rate}; {stream.finish_reason}")
    return "".join(pieces)
