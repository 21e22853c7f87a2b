"""How much older than the code each measured table of the pages is: `python docs/ages.py`; CI: with `--check`.

A table is measured if its cells have figures with a unit of time, memory or speed, or its head has such a unit. It
stands in a section that says at which commit, when and on what machine its figures were made; what has changed since in
the code is counted here.
`--check` ends with 1 where a table does not say that, names a commit that is not in this one's history, or is older by
more commits of the code than `OLDEST`: such a table is measured again, or goes. Of a section the newest commit counts
(it may compare that with older ones), of tables that are made between marks every one. What a section does not say, the
one above it does. Sizes of other people's packages, which README's Install has, are checked where they are installed
(tests/docs/from_nothing.py).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = ("frontend", "dialect_patterns", "runtime/*.py", "runtime/generation", "runtime/text")
OLDEST = 100
"""Some two days of work on the code."""
OF_OTHERS = ("README.md", "Install")
_FIGURE = re.compile(r"\d (?:us|ms|s|KB|MB|GB)\b|\d/s\b|\d{3} / \d|\d / \d+\.\d|\d,\d{3} \(\d")
_UNIT = re.compile(r"(?:^|[ |,])(?:us|ms|tokens/s|[GT]B/s|[GT]FLOP/s)(?: |,|$)")
_COMMIT = re.compile(r"(?<=`)[0-9a-f]{7}(?=[`:])|\b(?=[a-f]*\d)(?=\d*[a-f])[0-9a-f]{7}\b")
_MADE = re.compile(r"(?s)<!-- (\w+) -->\n.*?<!-- /\1 -->")
_DAY = re.compile(r"\b\d{4}-\d\d-\d\d\b|\b[A-Z][a-z]+ 20\d\d\b")
_MACHINE = re.compile(r"H100|H200|Xeon|Sapphire Rapids|Zen \d|EPYC|sm_\d+")
_FENCE = re.compile(r"^```.*?^```$", re.M | re.S)


@dataclass(frozen=True)
class Measured:
    """A section with a measured table.

    Attributes:
        page: The file, relative to the repository.
        heading: Of the section.
        text: Of it, without the sections below it.
        above: Of the section above.
    """

    page: str
    heading: str
    text: str
    above: str = ""

    @property
    def commits(self) -> list[str]:
        """Those that it names, or the section above."""
        return list(dict.fromkeys(_COMMIT.findall(self.text) or _COMMIT.findall(self.above)))

    @property
    def made(self) -> list[str]:
        """Those in its tables between marks."""
        return list(dict.fromkeys(_COMMIT.findall("".join(match[0] for match in _MADE.finditer(self.text)))))

    @property
    def lacks(self) -> list[str]:
        """What it should say of its figures and does not."""
        text = self.text + self.above
        found = {"commit": self.commits, "day": _DAY.search(text), "machine": _MACHINE.search(text)}
        return [name for name, there in found.items() if not there]


def measured(page: str, text: str) -> Iterator[Measured]:
    """The sections of a page with measured tables.

    Args:
        page: The file's name.
        text: What is in it.
    """
    parts = re.split(r"^(#{1,3} .+)$", _FENCE.sub("", text), flags=re.M)
    above = ""
    for heading, body in zip(["", *parts[1::2]], parts[::2], strict=True):
        lines = body.splitlines()
        heads = [line for line, rule in itertools.pairwise(lines) if rule.startswith("|---")]
        rows = [line for line in lines if line.startswith("|")]
        if any(map(_FIGURE.search, rows)) or any(map(_UNIT.search, heads)):
            yield Measured(page, heading.lstrip("# "), body, above if heading.startswith("###") else "")
        above = above if heading.startswith("###") else body


def commits_since(commit: str) -> int | None:
    """How many commits since then changed the code; None where it is none of HEAD's history."""
    git = ["git", "-C", str(ROOT)]
    count = [*git, "rev-list", "--count", f"{commit}..HEAD", "--", *CODE]
    try:
        subprocess.run([*git, "merge-base", "--is-ancestor", commit, "HEAD"], capture_output=True, check=True)
        return int(subprocess.run(count, capture_output=True, text=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError):
        return None


def is_shallow() -> bool:
    """Whether git has not all of the history."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--is-shallow-repository"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() != "false"


def age(section: Measured) -> str:
    """A line: by how many commits of the code its figures are older than it."""
    counts = ((commit, commits_since(commit)) for commit in section.commits)
    told = (f"{commit} {'not in the history' if n is None else f'{n} commits'}" for commit, n in counts)
    return f"{section.page}: {section.heading}: {', '.join(told)}"


def faults(section: Measured) -> list[str]:
    """Why a table may not stay as it is."""
    lacks = [f"does not say its {name}" for name in section.lacks]
    counts = {commit: commits_since(commit) for commit in section.commits}
    unknown = [f"{commit} is not in the history" for commit, count in counts.items() if count is None]
    known = sorted((n, commit) for commit, n in counts.items() if n is not None)
    judged = [(n, commit) for n, commit in known if commit in section.made] + known[:1]
    old = [f"{n} commits of the code since {commit}" for n, commit in dict.fromkeys(judged) if n > OLDEST]
    return [f"{section.page}: {section.heading}: {fault}" for fault in (*lacks, *unknown, *old)]


def main() -> None:
    """Shows the ages of all pages' tables, or what is wrong with them."""
    pages = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("runtime/**/*.md")})
    sections = [section for page in pages for section in measured(page.relative_to(ROOT).as_posix(), page.read_text())]
    sections = [section for section in sections if (section.page, section.heading) != OF_OTHERS]
    lines = ["Measured tables, and how many commits have changed the code since:", *map(age, sections)]
    if sys.argv[1:] == ["--check"]:
        if is_shallow():
            sys.exit("docs/ages.py: git has not all of the history here")
        lines = [fault for section in sections for fault in faults(section)]
    with contextlib.suppress(BrokenPipeError):
        print(*lines, sep="\n", flush=True)
        sys.exit(bool(lines) and sys.argv[1:] == ["--check"])
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends


if __name__ == "__main__":
    main()
