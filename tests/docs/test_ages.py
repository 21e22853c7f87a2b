"""Measured tables say of what commit, day and machine they are; how old they are is told, and fails nothing."""

from __future__ import annotations

import importlib.util
import sys
import warnings

import pytest
from pages import PAGES, ROOT

SPEC = importlib.util.spec_from_file_location("ages", ROOT / "docs" / "ages.py")
assert SPEC is not None
assert SPEC.loader is not None
ages = importlib.util.module_from_spec(SPEC)
sys.modules["ages"] = ages  # its dataclass looks itself up
SPEC.loader.exec_module(ages)

SECTIONS = [section for page in PAGES for section in ages.measured(page, (ROOT / page).read_text())]
OF_OTHERS = {("README.md", "Install")}
"""Sizes of packages that are not ours."""
TABLE = "## Speed\nMade on 26 November 2026 at `abc1234`, on an H100.\n\n| a | 3.1 ms |\n"


def test_measured_tables_say_what_they_are_of() -> None:
    assert len(SECTIONS) >= 10
    lacking = {(s.page, s.heading): s.lacks for s in SECTIONS if s.lacks}
    assert set(lacking) <= OF_OTHERS, lacking


def test_their_commits_are_known() -> None:
    """A table whose code changed since is no failure: whoever measures next is told here which those are."""
    if ages.commits_since("HEAD") is None or ages.is_shallow():
        pytest.skip("no checkout with its history")
    counts = {commit: ages.commits_since(commit) for section in SECTIONS for commit in section.commits}
    assert not [commit for commit, count in counts.items() if count is None]
    old = [ages.age(section) for section in SECTIONS if any(counts[commit] for commit in section.commits)]
    if old:
        warnings.warn(f"{len(old)} measured tables are older than the code; docs/ages.py says which", stacklevel=1)


@pytest.mark.parametrize(
    ("change", "lacks"),
    [
        (("", ""), []),
        (("`abc1234`", "some commit"), ["commit"]),
        (("`abc1234`", f"a time ({ages.UNKNOWN})"), []),
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


@pytest.mark.parametrize("cell", ["head 128 x 128", "2e-7", "3.11 to 3.14", "N, 4096"])
def test_other_tables_are_none(cell: str) -> None:
    assert not [*ages.measured("page.md", TABLE.replace("3.1 ms", cell))]
