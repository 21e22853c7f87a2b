"""Every sample says what it takes, runs, and does what it says."""

from __future__ import annotations

import io
import itertools
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from linattn.runtime import Program, TextGenerator
from pages import ROOT, links

from tests.tolerances import BENIGN

SAMPLES = ROOT / "samples"
Run = Callable[..., str]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a sample as a script and returns what it prints."""

    def run_it(name: str, *arguments: object, typed: str = "") -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        monkeypatch.syspath_prepend(SAMPLES)
        capfd.readouterr()
        runpy.run_path(str(SAMPLES / name), run_name="__main__")
        return capfd.readouterr().out

    return run_it


@pytest.fixture
def module(tiny: Path) -> Path:
    return tiny / "model.vmfb"


@pytest.mark.parametrize("name", [path.name for path in sorted(SAMPLES.glob("*.py"))])
def test_help(name: str, run: Run) -> None:
    """Its first line is what the sample is for, and the README of the samples has it."""
    with pytest.raises(SystemExit) as end:
        run(name, "--help")
    assert end.value.code == 0
    assert name in links("samples/README.md")


def test_shell_samples_help() -> None:
    for path in SAMPLES.glob("*.sh"):
        done = subprocess.run([path, "--help"], capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.count(path.name) == 1
        assert path.name in links("samples/README.md")


def ends(program: Path, text: str, count: int) -> str:
    """What follows a text, by the generator alone."""
    return "".join(TextGenerator(Program.load(program)).generate(text, max_tokens=count))


def test_chat(module: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second question comes with the first and its answer; after /reset it starts anew."""
    asked: list[list[str]] = []

    def answer(self: TextGenerator, messages: list[dict[str, str]], **_: object) -> Iterator[str]:
        asked.append([f"{message['role']}: {message['content']}" for message in messages])
        return iter(("to ", messages[-1]["content"]))

    printed = run("chat.py", module, "--temperature", 0, "--max-tokens", 6, typed="Hi\n")
    assert printed == f"> {ends(module, '[user]Hi[assistant]', 6)}\n> "
    monkeypatch.setattr(TextGenerator, "chat", answer)
    assert run("chat.py", module, typed="Hi\nYou\n/reset\nHi\n") == "> to Hi\n> to You\n> > to Hi\n> "
    assert asked == [["user: Hi"], ["user: Hi", "assistant: to Hi", "user: You"], ["user: Hi"]]


def test_threads(module: Path, run: Run) -> None:
    lines = run("threads.py", module, "One", "Two", "--max-tokens", 6).splitlines()
    assert lines == [f"{prompt!r} -> {ends(module, prompt, 6)!r}" for prompt in ("One", "Two")]


def test_prefixes(module: Path, run: Run) -> None:
    first, *answers = run("prefixes.py", module, "--text", "A text. ", "What?", "Who?", "--max-tokens", 6).splitlines()
    assert first.startswith("read 8 tokens in ")
    for question, line in zip(("What?", "Who?"), answers, strict=True):
        assert line.startswith(f"{question!r} -> {ends(module, f'A text. {question}', 6)!r} in ")


def test_resume(module: Path, run: Run, tmp_path: Path) -> None:
    """Two halves in two runs are the whole in one."""
    run("resume.py", module, tmp_path / "x.state", "--text", "Once upon")
    known, following, _ = run(
        "resume.py", module, tmp_path / "x.state", "--text", " a time", "--generate", 6
    ).splitlines()
    assert (known, following) == ("9 tokens known", repr(ends(module, "Once upon a time", 6)))


def test_score(module: Path, run: Run) -> None:
    """The sum of what each token had before it, a token a call; the likelier text comes first."""

    def score(text: str) -> float:
        session, total = Program.load(module).session(), 0.0
        ids = list(b"The sky is" + text.encode())
        for i, (token, following) in enumerate(itertools.pairwise(ids)):
            logits = session.run({"input_ids": [[token]]})["logits"][0, 0].astype(np.float64)
            if i >= len("The sky is") - 1:
                total += logits[following] - np.log(np.exp(logits).sum())
        return total

    lines = run("score.py", module, "--prompt", "The sky is", " blue", " square").splitlines()
    found = {line[12:]: float(line[:10]) for line in lines}
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert found == pytest.approx({repr(text): score(text) for text in (" blue", " square")}, abs=2e-4)


def test_stream_sensor(run: Run) -> None:
    first, second = run("stream_sensor.py", "--samples", 70).splitlines()
    assert first.startswith("70 samples, ")
    assert first.endswith("position 70")
    assert float(second.split()[-1]) < BENIGN["float32"]


def test_compare_targets(tiny: Path, run: Run) -> None:
    _, row = run("compare_targets.py", tiny / "model.onnx", "--targets", "cpu", "--tokens", 16).splitlines()
    assert re.fullmatch(r"cpu( +[\d.]+){4} +0.0e\+00", row)


def test_half_precision(tiny: Path, run: Run, tmp_path: Path) -> None:
    run("half_precision.py", tiny / "model.onnx", tmp_path / "half" / "model.onnx")
    half = onnx.load(tmp_path / "half" / "model.onnx")
    kinds = {tensor.data_type for tensor in half.graph.initializer}
    assert onnx.TensorProto.FLOAT not in kinds
    assert onnx.TensorProto.FLOAT16 in kinds


def test_tiny_hybrid(run: Run, tmp_path: Path) -> None:
    run("tiny_hybrid.py", tmp_path / "new" / "model.onnx")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "generation_config.json",
        "model.onnx",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
