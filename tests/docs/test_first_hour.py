"""What people do wrong in their first hour ends in one line that says what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from linattn.frontend import CompileOptions, compile_model
from linattn.frontend import cli as compile_cli
from linattn.runtime import LinattnError, Program, Sampling, Session, TextGenerator, generate, greedy
from linattn.runtime import cli as run_cli
from linattn.runtime.bench import cli as bench_cli

IDS = [72, 101]
LINES = {
    "a folder to compile": (compile_cli, "TINY", "TINY: a folder; give the .onnx file in it: model.onnx"),
    "a model that is not compiled": (run_cli, "TINY/model.onnx --prompt a", "an ONNX model, not a module; compile it"),
    "a model to describe": (run_cli, "TINY/model.onnx --describe", "an ONNX model, not a module; compile it"),
    "nothing to run": (run_cli, "MODULE", "no inputs; give --prompt TEXT, --ids 1,2,3 or --input NAME=FILE.npy"),
    "no array": (run_cli, "MODULE --input nowhere.npy", "nowhere.npy: no such file or directory"),
    "no result": (bench_cli, "report nowhere.json -o x.html", "nowhere.json: no such file or directory"),
    "text and ids": (run_cli, "MODULE --prompt a --ids 1", "--prompt --ids: not together"),
    "text and --generate": (run_cli, "MODULE --prompt a --generate 3", "not together; --max-tokens limits an answer"),
    "two kinds of text": (run_cli, "MODULE --chat --prompt a", "--prompt --chat: not together"),
    "ids and chat": (run_cli, "MODULE --chat --ids 1", "--chat --ids: not together"),
}
CALLS: dict[str, tuple[Callable[[Program], Any], str]] = {
    "text for ids": (lambda p: p.session().run({"input_ids": "Hello"}), "input_ids: .*TextGenerator takes text"),
    "bytes for ids": (lambda p: p.session().run({"input_ids": b"Hello"}), "input_ids: .*TextGenerator takes text"),
    "words for ids": (lambda p: p.session().run({"input_ids": [["Hello"]]}), "input_ids: .*TextGenerator takes text"),
    "a program generates": (lambda p: next(greedy(p, IDS, 3)), r"session: .*got Program, expected program.session\(\)"),
    "less than nothing": (lambda p: list(greedy(p.session(), IDS, -1)), "count: .*got -1"),
    "a count as text": (lambda p: list(generate(p.session(), IDS, "3")), "count: .*got str, expected a whole number"),
    "settings by name": (lambda p: list(generate(p.session(), IDS, 3, {"top_k": 1})), "sampling: .*Sampling"),
    "a path for text": (lambda _: TextGenerator("model.vmfb"), "program: .*got str, expected Program.load"),
    "a session for text": (lambda p: TextGenerator(p.session()), "program: .*got Session"),
    "ids for text": (lambda p: TextGenerator(p).generate(IDS), "prompt: .*got list, expected a text"),
    "tokens as text": (lambda p: TextGenerator(p).generate("a", max_tokens="3"), "max_tokens: .*got str"),
    "a dict draws": (lambda p: TextGenerator(p).generate("a", sampling={"seed": 1}), "sampling: .*got dict"),
    "text as messages": (lambda p: TextGenerator(p).chat("Hello"), "messages: .*got str, expected a list of"),
    "one message": (lambda p: TextGenerator(p).chat({"role": "user", "content": "a"}), "messages: .*got dict"),
    "texts as messages": (lambda p: TextGenerator(p).chat(["Hello"]), r"messages\[0\]: .*got str"),
    "settings as text": (lambda _: Sampling(temperature="0.7"), "temperature: .*got str, expected a number"),
    "half a token": (lambda _: Sampling(top_k=1.5), "top_k: .*got float, expected a whole number"),
    "a seed as text": (lambda _: Sampling(seed="1"), "seed: .*got str, expected a whole number"),
    "no file": (lambda _: Program.load(None), "source: .*got NoneType, expected a path"),
    "a number of a device": (lambda p: Program.load(p.file, 0), "device: .*got int, expected a name"),
    "a window as text": (lambda p: p.session(window="4"), "window: .*got str, expected a whole number"),
    "a batch as text": (lambda p: p.session(batch="4"), "batch: .*got str, expected a whole number"),
}


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "one block": ({"prefill_blocks": 8}, "--prefill-blocks: .*got int, expected a tuple of numbers, None or 'default'"),
    "blocks as text": ({"prefill_blocks": "64,8"}, "--prefill-blocks: .*got str"),
    "a block of less than nothing": ({"prefill_blocks": (8, -1)}, "--prefill-blocks: not a positive number, got -1"),
    "a context as text": ({"max_context": "512"}, "--max-context: .*got str, expected a whole number"),
    "half a context": ({"max_context": 0.5}, "--max-context: .*got float"),
    "no context": ({"max_context": 0}, "--max-context: not a positive number, got 0"),
    "a batch as text": ({"batch": "1"}, "--batch: .*got str"),
    "no batch": ({"batch": 0}, "--batch: not a positive number, got 0"),
    "targets in a list": ({"target": ["cpu"]}, "--target: .*got list, expected a text"),
    "a GPU by number": ({"target": "cuda", "gpu_target": 89}, "--gpu-target: .*got int, expected a text"),
    "a chunk as text": ({"chunk_size": "16"}, "--chunk-size: .*got str"),
    "memory as text": ({"max_memory": "4GiB"}, "--max-memory: .*got str"),
    "dims as text": ({"dims": "n=3"}, "--dim: .*got str, expected a dict"),
    "states in a list": ({"states": ["a"]}, "--state: .*got list, expected a dict"),
    "no state by its name": ({"no_states": "past"}, "--no-state: .*got str, expected a set of names"),
    "an output by its name": ({"extra_outputs": "y"}, "--extra-output: .*got str, expected a tuple of names"),
    "a report": ({"report": True}, "--report: .*got bool, expected a path"),
}


@pytest.mark.parametrize(("options", "said"), OPTIONS.values(), ids=OPTIONS)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(LinattnError, match=said):
        CompileOptions(**options)


@pytest.mark.parametrize(
    ("source", "rest", "said"),
    [
        ("m.onnx", ({"target": "cpu"},), "options: .*got dict, expected CompileOptions"),
        ("m.onnx", ("cpu",), "options: .*got str, expected CompileOptions"),
        (None, (), "source: .*got NoneType, expected a path or an onnx.ModelProto"),
        (b"m.onnx", (), "source: .*got bytes"),
    ],
)
def test_compiling(source: Any, rest: tuple[Any, ...], said: str) -> None:
    with pytest.raises(LinattnError, match=said):
        compile_model(source, *rest)
    with pytest.raises(LinattnError, match=r"output: .*got int, expected a path"):
        compile_model("m.onnx", output=5)


@pytest.mark.parametrize(("command", "line", "said"), LINES.values(), ids=LINES)
def test_commands(command: Any, line: str, said: str, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word.replace("MODULE", "TINY/model.vmfb").replace("TINY", str(tiny)) for word in line.split()]
    assert command.main(words) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert ": error: " in last
    assert said.replace("TINY", str(tiny)) in last


@pytest.fixture(scope="module")
def program(tiny: Path) -> Program:
    return Program.load(tiny / "model.vmfb")


@pytest.mark.parametrize(("call", "said"), CALLS.values(), ids=CALLS)
def test_calls(call: Callable[[Program], Any], said: str, program: Program) -> None:
    with pytest.raises(LinattnError, match=said) as caught:
        call(program)
    assert "\n" not in str(caught.value)


def test_what_was_generated_ends_before_the_error(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli.main([str(tiny / "model.vmfb"), "--ids", "1,2", "--generate", "300"]) == 2
    out, err = capsys.readouterr()
    assert len(out.split(",")) == 255
    assert out.endswith("\n")
    assert "context full" in err.splitlines()[-1]


def _ran(program: Program) -> Session:
    session = program.session()
    session.run({"input_ids": [[1]]})
    return session


WRONG: list[Any] = [None, 5, -1, 1.5, "x", b"x", [], {}, [1], ["a"], {"a": 1}, object(), np.ones(3, np.float32)]
TAKES: dict[str, Callable[[Program, Any], Any]] = {
    "run": lambda p, x: p.session().run(x),
    "run: ids": lambda p, x: p.session().run({"input_ids": x}),
    "run: outputs": lambda p, x: p.session().run({"input_ids": [[1]]}, outputs=x),
    "run: into": lambda p, x: p.session().run({"input_ids": [[1]]}, into=x),
    "submit": lambda p, x: p.session().submit(x).result(),
    "program.run": lambda p, x: p.run(x),
    "program.batch": lambda p, x: p.batch(x),
    "session": lambda p, x: p.session(x),
    "session: window": lambda p, x: p.session(window=x),
    "Session": lambda _, x: Session(x),
    "Session.load": lambda p, x: Session.load(p, x),
    "Session.load: program": lambda _, x: Session.load(x, "x.state"),
    "save": lambda p, x: None if isinstance(x, str) else _ran(p).save(x),
    "restore": lambda p, x: _ran(p).restore(x),
    "rollback": lambda p, x: _ran(p).rollback(x),
    "rows": lambda p, x: _ran(p).rows(x),
    "reset_rows": lambda p, x: _ran(p).reset_rows(x),
    "set_state": lambda p, x: _ran(p).set_state("past.0.conv", x),
    "generate": lambda p, x: list(generate(p.session(), x, 2)),
    "generate: stop": lambda p, x: list(generate(p.session(), [1], 2, stop=x)),
    "generate: seen": lambda p, x: list(generate(p.session(), [1], 2, seen=x)),
    "generate: prompt": lambda p, x: list(generate(p.session(), [1], 2, prompt=x)),
    "generate: draft": lambda p, x: list(generate(p.session(), [1], 2, draft=x)),
    "text": lambda p, x: "".join(TextGenerator(p).generate(x, max_tokens=2)),
    "text: stop": lambda p, x: "".join(TextGenerator(p).generate("a", max_tokens=2, stop=x)),
    "chat": lambda p, x: "".join(TextGenerator(p).chat(x, max_tokens=2)),
    "chat: message": lambda p, x: "".join(TextGenerator(p).chat([x], max_tokens=2)),
    "Program.load": lambda _, x: Program.load(x),
    "Program.load: device": lambda p, x: Program.load(p.file or "", x),
    "Program.load: parameters": lambda p, x: Program.load(p.file or "", parameters=x),
    "Program.load: threads": lambda p, x: Program.load(p.file or "", threads=x),
}


@pytest.mark.parametrize("call", TAKES.values(), ids=TAKES)
def test_of_another_kind(call: Callable[[Program, Any], Any], program: Program) -> None:
    """It is taken or refused in a line; nothing else is raised."""
    for value in WRONG:
        with contextlib.suppress(LinattnError):
            call(program, value)
