"""The journeys of from_nothing.py, which CI makes in containers, lead through all that README tells to type."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import from_nothing
import machines
import pytest
from pages import blocks

README = [block for block in blocks("README.md") if block.language in ("sh", "python") and not block.not_run]
OF_README = (from_nothing.TEXT, from_nothing.DEVICE, from_nothing.REPORT)


def test_every_command_of_readme_is_on_a_journey() -> None:
    on_one = {section for journey in OF_README for section in journey.sections}
    assert on_one <= {block.section for block in README}, "a heading has another name"
    left = [block for block in README if block.section not in on_one]
    assert all(line.startswith("make ") for block in left for line in block.code.splitlines()), left


def test_a_script_has_the_commands_of_its_sections_alone() -> None:
    text, device, report = map(from_nothing.script, OF_README)
    assert ["linattn-compile" in one for one in (text, device, report)] == [True, False, True]
    assert ["linattn-bench report" in one for one in (text, device, report)] == [False, False, True]
    assert text.count("--generate 16") == device.count("--generate 16") == 1


def test_readme_says_how_large_each_extra_is() -> None:
    said = dict(from_nothing.SIZE.findall((from_nothing.ROOT / "README.md").read_text()))
    assert {name for journey in OF_README for name in journey.extras} <= set(said)


def test_without_containers_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machines.debian(tmp_path / "none") is None
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("from nothing: folders in the place of containers, for ")
    assert not any((tmp_path / "none").iterdir())


def test_ids_and_words_have_lines_of_their_own_in_one_pipe(tiny: Path) -> None:
    """A container has no PYTHONUNBUFFERED, and what is compared there are lines."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}

    def said(*options: str) -> str:
        command = [sys.executable, "-m", "linattn", "run", str(tiny / "model.vmfb"), *options]
        both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(command, check=True, text=True, errors="replace", env=environment, **both)
        return done.stdout

    assert len(from_nothing.IDS.findall(said("--ids", "72,101", "--generate", "16"))) == 1
    assert "\nlinattn-run: prompt of" in said("--prompt", "Hello", "--max-tokens", "4", "--seed", "1")
