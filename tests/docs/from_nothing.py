"""What a stranger does: the blocks of README, tutorial and how-tos, as they stand there, on machines that have nothing.

    python tests/docs/from_nothing.py            # make from-nothing
    python tests/docs/from_nothing.py text       # this journey only; device goes on from text

README alone leads from nothing to generated text, to a module on a second machine that has no compiler, and to a
comparison, each in a container of its own (machines.py); tutorial and how-tos are followed in another one.
Shell blocks run as they are, Python blocks by that environment's `python`; those that say why they cannot run do not,
and `make` neither: CI calls that by itself.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from machines import Machine, container, debian, room
from pages import ROOT, blocks

IDS = re.compile(r"^\d+(?:[ ,]+\d+){15}[ ,]*$", re.M)
"""What `--generate 16` prints."""
SIZE = re.compile(r"^\| (?:none|`(\w+)`) \|[^|]*\| ([\d.]+) MB", re.M)
"""A row of README's table of what the extras take."""
VENV = ("pip", "setuptools", "pkg_resources", "_distutils_hack")
"""What a new environment has by itself."""
SHIPPED = ("dist", "model.vmfb")
"""What README says to copy to the other machine."""


@dataclass(frozen=True)
class Journey:
    """What somebody wants, and what they read for it.

    Attributes:
        name: Of it.
        pages: What is read.
        sections: Of README: these only.
        shipped: Whether it starts with what another machine made, in the place of a checkout.
        extras: What its `env` then has, where README says how large that is.
    """

    name: str
    pages: tuple[str, ...]
    sections: tuple[str, ...] = ()
    shipped: bool = False
    extras: tuple[str, ...] = ()


TEXT = Journey(
    "text",
    ("README.md",),
    ("Install", "Compile", "Generate text", "Keep a conversation"),
    extras=("", "compile", "text", "state"),
)
DEVICE = Journey("device", ("README.md",), ("Run it on another machine",), shipped=True, extras=("",))
REPORT = Journey("report", ("README.md",), ("Install", "Compile", "Compare targets"))
HOW_TOS = ("targets", "device", "c", "compare")
PAGES = Journey("pages", ("docs/tutorial.md", *(f"docs/how-to/{name}.md" for name in HOW_TOS)))


def script(journey: Journey) -> str:
    """The blocks as one shell script that stops at the first thing that fails."""
    parts = (part for page in journey.pages for part in steps(page, journey.sections))
    return "\n".join(["set -euo pipefail", *parts]) + "\n"


def steps(page: str, sections: Sequence[str]) -> Iterator[str]:
    """A page's shell blocks as they are, and its Python blocks as one program, where the last of them stands."""
    runnable = [block for block in blocks(page) if block.language in ("sh", "python") and not block.not_run]
    runnable = [block for block in runnable if not sections or block.section in sections]
    program = [block for block in runnable if block.language == "python"]
    for block in runnable:
        if block.language == "sh":
            lines = [line for line in block.code.splitlines() if not line.startswith("make ")]
            yield "\n".join([f"echo -- {block.page}:{block.line}", *lines])
        elif block is program[-1]:
            code = "".join(block.code for block in program)
            yield f"echo -- {block.page}: python\n[ -e model.vmfb ] || cp *.vmfb model.vmfb"
            yield f"python - <<'BLOCK'\n{code}BLOCK"


def check_out(folder: Path) -> None:
    """A checkout of what git knows, with what is not committed yet."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def ship(sender: Path, receiver: Path) -> None:
    """Copies to another machine what it needs there."""
    for name in SHIPPED:
        (shutil.copytree if (sender / name).is_dir() else shutil.copy2)(sender / name, receiver / name)


def check_size(journey: Journey, folder: Path) -> None:
    """README says how much the packages take, within a tenth.

    Raises:
        SystemExit: It does not.
    """
    said = {name: float(size) for name, size in SIZE.findall((ROOT / "README.md").read_text())}
    expected = sum(said[name] for name in journey.extras)
    files = (file for file in folder.glob("env/lib/python3*/site-packages/**/*") if file.is_file())
    size = sum(file.stat().st_size for file in files if not file.relative_to(folder).parts[4].startswith(VENV)) / 1e6
    told = f"from nothing: {journey.name}: packages take {size:.0f} MB, README says {expected:.0f}"
    print(told, flush=True)
    if abs(size - expected) > expected / 10:
        sys.exit(told)


def follow(journey: Journey, machine: Machine) -> str:
    """Does on a machine what the pages say and returns what that prints.

    Raises:
        SystemExit: A command failed; what was printed last names the block.
    """
    start = time.perf_counter()
    output: list[str] = []
    with subprocess.Popen(
        [*machine.prefix, "bash", "-c", script(journey)],
        cwd=machine.folder,
        env=machine.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(f"{journey.name}: {line}", end="", flush=True)
            output.append(line)
    if process.returncode:
        sys.exit(f"from nothing: {journey.name}: a command failed ({process.returncode})")
    print(f"from nothing: {journey.name}: right, {time.perf_counter() - start:.0f} s", flush=True)
    return "".join(output)


def travel(journeys: Sequence[Journey], system: Path | None) -> None:
    """Follows journeys, each on a machine of its own; the tokens of a module are the same on all of them."""
    tokens: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        last: Machine | None = None
        for journey in journeys:
            place = Path(folder, journey.name)
            place.mkdir()
            machine = container(system, place) if system else room(place)
            if journey.shipped and last is not None:
                ship(last.folder, machine.folder)
            else:
                check_out(machine.folder)
            tokens += IDS.findall(follow(journey, machine))
            if journey.extras:
                check_size(journey, machine.folder)
            last = machine
        if REPORT in journeys and last is not None and "<svg" not in (last.folder / "report.html").read_text():
            sys.exit("from nothing: the comparison has no picture")
    if DEVICE in journeys and (len(tokens) != 2 or len(set(tokens)) != 1):
        sys.exit(f"from nothing: the compiler's environment and the device's give different tokens: {tokens}")


def main() -> None:
    """Follows the journeys side by side: most of their time they wait for packages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("journeys", metavar="JOURNEY", nargs="*", help="text, report, pages; default: all")
    given = parser.parse_args().journeys
    ways = [way for way in ((TEXT, DEVICE), (REPORT,), (PAGES,)) if not given or way[0].name in given]
    system = debian(ROOT / "build" / "machines")
    with ThreadPoolExecutor() as threads:
        for _ in threads.map(lambda way: travel(way, system), ways):
            pass


if __name__ == "__main__":
    main()
