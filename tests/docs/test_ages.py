"""Measured tables say of what commit, day and machine they are, and none is much older than the code."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from pages import PAGES, ROOT

SPEC = importlib.util.spec_from_file_location("ages", ROOT / "docs" / "ages.py")
assert SPEC is not None
assert SPEC.loader is not None
ages = importlib.util.module_from_spec(SPEC)
sys.modules["ages"] = ages  # its dataclass looks itself up
SPEC.loader.exec_module(ages)

SECTIONS = [section for page in PAGES for section in ages.measured(page, (ROOT / page).read_text())]
TABLE = "## Speed\nMade on 26 November 2026 at `abc1234`, on an H100.\n\n| a | 3.1 ms |\n"


def test_measured_tables_say_what_they_are_of() -> None:
    assert len(SECTIONS) >= 5
    lacking = {(s.page, s.heading): s.lacks for s in SECTIONS if s.lacks}
    assert set(lacking) <= {ages.OF_OTHERS}, lacking


def test_what_is_too_old_or_unknown_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    (section,) = ages.measured("page.md", TABLE)
    for count, found in (
        (ages.OLDEST, []),
        (ages.OLDEST + 1, [f"{ages.OLDEST + 1} commits of the code since abc1234"]),
    ):
        monkeypatch.setattr(ages, "commits_since", lambda _, count=count: count)
        assert ages.faults(section) == [f"page.md: Speed: {fault}" for fault in found]
    monkeypatch.setattr(ages, "commits_since", lambda _: None)
    assert ages.faults(section) == ["page.md: Speed: abc1234 is not in the history"]


def test_the_newest_commit_of_a_section_counts_and_each_of_a_table_that_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sections compare with what was before; rows of several machines are each as old as they are."""
    counts = {"abc1234": 1, "abc1235": ages.OLDEST + 1}
    monkeypatch.setattr(ages, "commits_since", counts.__getitem__)
    text = TABLE.replace("3.1 ms |", "3.1 ms, abc1234 |\n| b | 4 ms, abc1235 |")
    (section,) = ages.measured("page.md", text)
    assert ages.faults(section) == []
    (section,) = ages.measured("page.md", text.replace("| a", "<!-- rows -->\n| a", 1) + "<!-- /rows -->\n")
    assert ages.faults(section) == [f"page.md: Speed: {ages.OLDEST + 1} commits of the code since abc1235"]


def test_a_commit_of_another_branch_is_not_in_the_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may lie in the checkout where it was made, and nowhere else."""
    monkeypatch.setattr(ages, "ROOT", tmp_path)
    (tmp_path / "frontend").mkdir()

    def git(*words: str) -> str:
        known = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.check_output(["git", "-C", str(tmp_path), *known, *words], text=True).strip()

    def commit(file: str) -> str:
        (tmp_path / file).write_text("")
        git("add", file)
        git("commit", "-qm", file)
        return git("rev-parse", "HEAD")

    git("init", "-q", "-b", "main")
    first = commit("frontend/a.py")
    git("checkout", "-qb", "other")
    other = commit("frontend/b.py")
    git("checkout", "-q", "main")
    commit("README.md")
    last = commit("frontend/c.py")
    assert [ages.commits_since(one) for one in (first, other, last)] == [1, None, 0]


def test_nobody_reads_to_the_end() -> None:
    command = f"{sys.executable} {ROOT}/docs/ages.py | true"
    assert subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stderr == ""


@pytest.mark.parametrize(
    ("change", "lacks"),
    [
        (("", ""), []),
        (("`abc1234`", "some commit"), ["commit"]),
        (("`abc1234`", "`1234567`"), []),
        (("`abc1234`", "1234567"), ["commit"]),
        (("26 November 2026", "some day"), ["day"]),
        (("an H100", "my machine"), ["machine"]),
    ],
)
def test_what_is_left_out_is_found(change: tuple[str, str], lacks: list[str]) -> None:
    (section,) = ages.measured("page.md", TABLE.replace(*change))
    assert (section.heading, section.lacks) == ("Speed", lacks)


@pytest.mark.parametrize("cell", ["14 us", "1.2 MB", "1500/s", "979 / 52.7", "4,297 (5,316)", "233,000 / 1,470"])
def test_figures_make_a_measured_table(cell: str) -> None:
    assert len([*ages.measured("page.md", TABLE.replace("3.1 ms", cell))]) == 1


@pytest.mark.parametrize("head", ["us", "CUDA, tokens/s", "module / host, us", "GB/s"])
def test_a_unit_in_the_head_makes_one(head: str) -> None:
    table = TABLE.replace("| a | 3.1 ms |", f"| | {head} |\n|---|---|\n| a | 150, then 77 |")
    assert len([*ages.measured("page.md", table)]) == 1


@pytest.mark.parametrize("cell", ["head 128 x 128", "2e-7", "3.11 to 3.14", "N, 4096"])
def test_other_tables_are_none(cell: str) -> None:
    assert not [*ages.measured("page.md", TABLE.replace("3.1 ms", cell))]
