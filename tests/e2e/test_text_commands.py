"""From the command line: the tokenizer goes with the module, prompts are continued, conversations answered."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from linattn.frontend.cli import main as compile_
from linattn.runtime import Program, TextGenerator, greedy
from linattn.runtime.cli import main as run
from linattn.runtime.text.files import read_module

from samples import byte_tokenizer
from samples.tiny_hybrid import build

SMALL = ["--max-context", "64", "--prefill-blocks", "8", "--quiet"]
STEPS = ["--max-context", "64", "--prefill-blocks", "1", "--quiet"]  # half the time to compile


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer beside it, and the module compiled from them."""
    folder = byte_tokenizer.write(tmp_path_factory.mktemp("text"))
    onnx.save(build(), folder / "model.onnx")
    assert compile_([str(folder / "model.onnx"), "-o", str(folder / "m.vmfb"), *SMALL]) == 0
    return folder


@pytest.fixture
def say(capfdbinary: pytest.CaptureFixture[bytes]) -> Callable[..., tuple[int, str, str]]:
    """Runs linattn-run; exit code and what it printed."""

    def run_it(*arguments: object) -> tuple[int, str, str]:
        code = run([str(argument) for argument in arguments])
        out, err = capfdbinary.readouterr()
        return code, out.decode(), err.decode()

    return run_it


def answer(module: Path, prompt: bytes, count: int) -> str:
    """What the token ids say, by the session and the bytes alone."""
    return bytes(greedy(Program.load(module).session(), list(prompt), count)).decode(errors="replace")


def test_module_carries_its_tokenizer(folder: Path, tmp_path: Path, say: Callable[..., tuple[int, str, str]]) -> None:
    module = tmp_path / "elsewhere.vmfb"
    module.write_bytes((folder / "m.vmfb").read_bytes())
    code, out, err = say(module, "--prompt", "Hällo", "--max-tokens", 12, "--verify")
    assert code == 0
    assert out == answer(module, "Hällo".encode(), 12) + "\n"
    assert "linattn-run: tokens are chosen on the host\n" in err
    assert "prompt of 6 tokens in " in err
    assert err.rstrip().endswith("; length")


def test_a_draft(folder: Path, say: Callable[..., tuple[int, str, str]]) -> None:
    """A model that guesses, here the same one; a module that is none is an error."""
    code, out, err = say(folder / "m.vmfb", "--prompt", "abc", "--max-tokens", 30, "--draft", folder / "m.vmfb")
    assert (code, out) == (0, answer(folder / "m.vmfb", b"abc", 30) + "\n")
    assert "tokens are chosen on the host, which verifies guesses\n" in err
    assert say(folder / "m.vmfb", "--prompt", "abc", "--draft", folder / "model.onnx")[0] == 2


def test_prompt_from_standard_input(
    folder: Path, say: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc"))
    assert say(folder / "m.vmfb", "--prompt", "-", "--max-tokens", 5)[1] == answer(folder / "m.vmfb", b"abc", 5) + "\n"


def test_chat_reads_only_what_is_new(
    folder: Path, say: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n\nYou?\n/reset\nHi\n"))
    code, out, err = say(folder / "m.vmfb", "--chat", "--max-tokens", 4, "--stop", "]")
    lines = out.split("\n")
    first = answer(folder / "m.vmfb", b"[user]Hi[assistant]", 4).partition("]")[0]
    assert code == 0
    assert (lines[0], lines[2]) == (first, first)
    notes = [line for line in err.splitlines() if "prompt of" in line]
    assert ["reused" in note for note in notes] == [False, True, False]


def test_seeds_and_settings(folder: Path, say: Callable[..., tuple[int, str, str]]) -> None:
    texts = [
        say(folder / "m.vmfb", "--prompt", "abc", "--max-tokens", 20, "--temperature", 3, "--seed", seed)[1]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    plain = say(folder / "m.vmfb", "--prompt", "abc", "--max-tokens", 20)[1]
    assert say(folder / "m.vmfb", "--prompt", "abc", "--max-tokens", 20, "--top-k", 1)[1] == plain
    assert say(folder / "m.vmfb", "--prompt", "abc", "--max-tokens", 20, "--top-k", 90, "--seed", 1)[1] != plain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the prompt must have tokens"),
        (["--prompt", "a", "--chat"], "--prompt --chat: not together"),
        (["--prompt", "a", "--ids", "1"], "--prompt --ids: not together"),
        (["--prompt", "a", "--top-p", "2"], "--top-p: out of range, got 2.0, expected 0 to 1"),
        (["--prompt", "a", "--max-tokens", "0"], "--max-tokens: nothing to generate, got 0"),
        (["--prompt", "a", "--tokenizer", "/nowhere"], "/nowhere: no tokenizer; give its folder"),
        (["--prompt", "a" * 65], "context full"),
    ],
)
def test_errors(folder: Path, say: Callable[..., tuple[int, str, str]], arguments: list[str], message: str) -> None:
    code, _, err = say(folder / "m.vmfb", *arguments)
    assert code == 2
    assert "Traceback" not in err
    assert message in err.splitlines()[-1]


def test_without_a_tokenizer(folder: Path, tmp_path: Path, say: Callable[..., tuple[int, str, str]]) -> None:
    module = tmp_path / "m.vmfb"
    assert compile_([str(folder / "model.onnx"), "--tokenizer", "none", "-o", str(module), *STEPS]) == 0
    assert read_module(module) is None
    assert "no tokenizer" in say(module, "--prompt", "a")[2]
    code, out, _ = say(module, "--prompt", "a", "--tokenizer", folder, "--max-tokens", 3)
    assert (code, out) == (0, answer(module, b"a", 3) + "\n")
    byte_tokenizer.write(tmp_path)
    assert say(module, "--prompt", "a", "--max-tokens", 3)[1] == out


def test_tokenizers_that_cannot_go_with_a_module(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes((folder / "model.onnx").read_bytes())
    for content, message in (("[1]", "got other JSON"), ("{", "got Expecting"), ("{}", "got other JSON")):
        (tmp_path / "tokenizer.json").write_text(content)
        assert compile_([str(model), "-o", str(tmp_path / "m.vmfb"), *SMALL]) == 2
        err = capsys.readouterr().err
        assert "tokenizer.json: not a tokenizer" in err
        assert message in err


def test_files_of_text_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither those beside the model nor those that --tokenizer names."""
    onnx.save(build(), byte_tokenizer.write(tmp_path) / "model.onnx")
    other = byte_tokenizer.write(tmp_path / "other")
    for options, file in (
        (["-o", "tokenizer.json"], "tokenizer.json"),
        (["--report", "generation_config.json"], "generation_config.json"),
        (["--tokenizer", other, "-o", other / "tokenizer.json"], "other/tokenizer.json"),
    ):
        before = (tmp_path / file).read_bytes()
        given = [str(tmp_path / option) if i % 2 else str(option) for i, option in enumerate(options)]
        extra = [] if "-o" in given else ["-o", str(tmp_path / "m.vmfb")]
        assert compile_([str(tmp_path / "model.onnx"), *given, *extra, *SMALL]) == 2
        assert "would overwrite an input" in capsys.readouterr().err
        assert (tmp_path / file).read_bytes() == before


def test_words_of_an_exported_model(shared_models: Path, tmp_path: Path) -> None:
    """The real tokenizer beside a real export, around the tokens that ONNX Runtime computed."""
    source = shared_models / "genai-fp32-cpu"
    module = tmp_path / "m.vmfb"
    assert compile_([str(source / "model.onnx"), "-o", str(module), *STEPS]) == 0
    prompt = np.load(shared_models / "transformers_expected.npz")["ids_5"].ravel().tolist()
    tokens = np.load(source / "ort_expected.npz")["greedy_5"].ravel()[:16].tolist()

    class Given:
        """The library's tokenizer, but prompts are the reference's ids (its words have no letters to encode)."""

        def __init__(self) -> None:
            self.inner = TextGenerator(Program.load(module)).tokenizer
            self.decode, self.stream, self.token_id = self.inner.decode, self.inner.stream, self.inner.token_id

        def encode(self, text: str, special: bool = True) -> list[int]:
            return prompt

    stream = TextGenerator(Program.load(module), Given()).generate("", max_tokens=16)
    assert "".join(stream) == "".join(f"w{token}" for token in tokens if token > 3)
    assert stream.ids == tokens
