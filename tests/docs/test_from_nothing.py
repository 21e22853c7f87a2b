"""The journeys of from_nothing.py, which CI makes in containers, lead through all that README tells to type."""

from __future__ import annotations

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
    tmp_path: machines.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machines.debian(tmp_path / "none") is None
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("from nothing: folders in the place of containers, for ")
    assert not any((tmp_path / "none").iterdir())
