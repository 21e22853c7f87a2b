"""What a stranger does: the blocks of README, then of the tutorial and the how-tos, as they stand there, from nothing.

    python tests/docs/from_nothing.py              # make from-nothing
    python tests/docs/from_nothing.py README.md    # these pages only

Each group of pages runs in a copy of the checkout of its own, with an empty home and no environment but what its own
commands make. Where the system lets us (Linux, `unshare`), it also does not see the checkout, and has a /tmp of its
own. It is no container: Python, the system's packages and its drivers are this machine's.
Shell blocks run as they are, Python blocks by that environment's `python`; those that say why they cannot run do not,
and `make` neither: CI calls that by itself.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pages import ROOT, blocks

GROUPS = (
    ("README.md",),
    (
        "docs/tutorial.md",
        "docs/how-to/targets.md",
        "docs/how-to/device.md",
        "docs/how-to/c.md",
        "docs/how-to/compare.md",
    ),
)
IDS = re.compile(r"^\d+(?:[ ,]+\d+){15}[ ,]*$", re.M)
"""What `--generate 16` prints."""


def script(pages: tuple[str, ...]) -> str:
    """The pages as one shell script that stops at the first thing that fails."""
    return "\n".join(["set -euo pipefail", *(part for page in pages for part in steps(page))]) + "\n"


def steps(page: str) -> Iterator[str]:
    """A page's shell blocks as they are, and its Python blocks as one program, where the last of them stands."""
    runnable = [block for block in blocks(page) if block.language in ("sh", "python") and not block.not_run]
    program = [block for block in runnable if block.language == "python"]
    for block in runnable:
        if block.language == "sh":
            lines = [line for line in block.code.splitlines() if not line.startswith("make ")]
            yield "\n".join([f"echo -- {block.page}:{block.line}", *lines])
        elif block is program[-1]:
            code = "".join(block.code for block in program)
            yield f"echo -- {block.page}: python\n[ -e model.vmfb ] || cp *.vmfb model.vmfb"
            yield f"python - <<'BLOCK'\n{code}BLOCK"


def run(pages: tuple[str, ...], folder: Path) -> str:
    """Runs the pages in a copy of the checkout and returns what they print.

    Raises:
        SystemExit: A command failed; what was printed last names the block.
    """
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    own = {"VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME"}
    environment = {name: value for name, value in os.environ.items() if name not in own}
    places = [f"{sys.base_prefix}/bin", *os.environ["PATH"].split(":")]
    environment["PATH"] = ":".join(place for place in places if not place.startswith(str(ROOT)))
    environment = {name: value for name, value in environment.items() if not name.startswith("XDG_")}
    environment |= {"PIP_QUIET": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "HOME": str(folder / "home")}
    (folder / "home").mkdir()
    output: list[str] = []
    with subprocess.Popen(
        [*alone(folder), "bash", "-c", script(pages)],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(f"{pages[-1]}: {line}", end="", flush=True)
            output.append(line)
    if process.returncode:
        sys.exit(f"from nothing: {', '.join(pages)}: a command failed ({process.returncode})")
    return "".join(output)


def alone(folder: Path) -> list[str]:
    """What puts a command where there is no checkout and no /tmp but its own; nothing where the system has no such."""
    own = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
    # The copy lies in /tmp: it is kept at hand by a second name while an empty /tmp is put over the first.
    copy, checkout = shlex.quote(str(folder)), shlex.quote(str(ROOT))
    hide = f"""
        mount --bind {copy} /mnt && mount -t tmpfs none /tmp && mkdir -p {copy} {checkout} &&
        mount --move /mnt {copy} && mount -t tmpfs none {checkout} && cd {copy} && exec "$@" """
    command = [*own, "bash", "-c", hide, "alone"]
    try:
        done = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return []
    if done.returncode:
        print(f"from nothing: the checkout can be seen, for the system allows no mounts ({done.stderr.strip()})")
        return []
    return command


def check(pages: tuple[str, ...]) -> str:
    """Runs a group; the tokens of a module are the same here and on the device without a compiler."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tokens = IDS.findall(run(pages, Path(folder)))
    if "README.md" in pages and (len(tokens) != 2 or len(set(tokens)) != 1):
        sys.exit(f"from nothing: the compiler's environment and the device's give different tokens: {tokens}")
    return f"from nothing: {', '.join(pages)}: right, {time.perf_counter() - start:.0f} s"


def main() -> None:
    """Runs the groups side by side: most of their time they wait for packages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", metavar="PAGE", nargs="*", help="default: all")
    given = tuple(parser.parse_args().pages)
    with ThreadPoolExecutor() as threads:
        for line in threads.map(check, (given,) if given else GROUPS):
            print(line)


if __name__ == "__main__":
    main()
