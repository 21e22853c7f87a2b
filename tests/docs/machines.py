"""Machines that have nothing, for what a stranger does: a container each, or what the system allows instead.

A container is a copy of a small Debian with Python and nothing else, and sees the network, but no file of this machine
and none of its processes. It is made with `mmdebstrap` and `unshare`: where those are missing, or the system lets
nobody mount, a machine is a folder with an empty home, and it is said what it can see.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from pages import ROOT

DEBIAN = "trixie"
PACKAGES = ("python3", "python3-venv", "ca-certificates")
"""What README says that it takes, and what pip needs to trust a registry."""
_NETWORK = ("PIP_CERT", "PIP_DEFAULT_TIMEOUT", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "PIP_TRUSTED_HOST")
_NETWORK += ("SSL_CERT_FILE", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
"""Variables that say how this machine reaches one."""
_FILES = ("/etc/resolv.conf", "/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt")
_ENTER = """
    mount --bind "$1" "$1" && mount -t proc proc "$1/proc" && mount --rbind /dev "$1/dev" &&
    mount -t tmpfs none "$1/tmp" && exec chroot "$1" sh -c 'cd "$0" && exec "$@"' "${@:2}" """


@dataclass(frozen=True)
class Machine:
    """Where commands run.

    Attributes:
        folder: The working directory, as this machine sees it.
        prefix: What stands before a command.
        environment: All that it knows.
    """

    folder: Path
    prefix: tuple[str, ...]
    environment: dict[str, str]


def debian(folder: Path) -> Path | None:
    """The small Debian in a folder, made there if it is not yet; None, and a line that says why, where none can be.

    Args:
        folder: Where it is kept.
    """
    system = folder / DEBIAN
    if not system.exists():
        making = folder / f"{DEBIAN}.{os.getpid()}"
        command = ["mmdebstrap", "--quiet", "--variant=apt", "--format=directory", *_without("doc", "locale", "man")]
        command += [f"--include={','.join(PACKAGES)}", DEBIAN, str(making), "http://deb.debian.org/debian"]
        folder.mkdir(parents=True, exist_ok=True)
        why = "only root makes containers here" if os.geteuid() else _failure(command)
        if why:
            shutil.rmtree(making, ignore_errors=True)
            return _no_containers(why)
        making.rename(system)
    why = _failure([*_prefix(system, "/"), "true"])
    return _no_containers(why) if why else system


def container(system: Path, folder: Path) -> Machine:
    """A container with an empty working directory.

    Args:
        system: What `debian` returned.
        folder: What becomes its root.
    """
    subprocess.run(["cp", "-a", f"{system}/.", str(folder)], check=True)
    for file in map(Path, _FILES):
        if file.exists():
            copy = folder / file.relative_to("/")
            copy.unlink(missing_ok=True)
            shutil.copy(file, copy)
    work = folder / "root" / "linattn"
    work.mkdir()
    environment = {name: os.environ[name] for name in _NETWORK if name in os.environ}
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    environment |= {"HOME": "/root", "PATH": path, "LANG": "C.UTF-8", "PIP_QUIET": "1"}
    return Machine(work, _prefix(folder, "/root/linattn"), environment)


def room(folder: Path) -> Machine:
    """A folder with an empty home, where there are no containers: Python, packages and drivers are this machine's.

    Where the system lets us (Linux, `unshare`), it does not see the checkout and has a /tmp of its own.

    Args:
        folder: An empty one.
    """
    work = folder / "linattn"
    (work / "home").mkdir(parents=True)
    own = {"VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME"}
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment = {name: value for name, value in environment.items() if not name.startswith("XDG_")}
    places = [f"{sys.base_prefix}/bin", *os.environ["PATH"].split(":")]
    environment["PATH"] = ":".join(place for place in places if not place.startswith(str(ROOT)))
    environment |= {"PIP_QUIET": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "HOME": str(work / "home")}
    return Machine(work, _alone(work), environment)


def _prefix(system: Path, folder: str) -> tuple[str, ...]:
    spaces = ("unshare", "--mount", "--pid", "--fork", "--ipc", "--uts", "--kill-child")
    return (*spaces, "bash", "-c", _ENTER, "enter", str(system), folder)


def _without(*kinds: str) -> list[str]:
    return [f"--dpkgopt=path-exclude=/usr/share/{kind}/*" for kind in kinds]


def _failure(command: list[str]) -> str:
    """Why a command fails, in a line; "" where it does not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except FileNotFoundError:
        return f"{command[0]} is not installed"
    lines = done.stderr.strip().splitlines() or [f"{command[0]} ended with {done.returncode}"]
    return lines[-1] if done.returncode else ""


def _no_containers(why: str) -> None:
    print(f"from nothing: folders in the place of containers, for {why}", flush=True)


def _alone(work: Path) -> tuple[str, ...]:
    """What puts a command where there is no checkout and no /tmp but its own; nothing where the system has no such."""
    own = ("unshare", "--mount", *(("--map-root-user",) if os.geteuid() else ()))
    # The copy lies in /tmp: it is kept at hand by a second name while an empty /tmp is put over the first.
    copy, checkout = shlex.quote(str(work)), shlex.quote(str(ROOT))
    hide = f"""
        mount --bind {copy} /mnt && mount -t tmpfs none /tmp && mkdir -p {copy} {checkout} &&
        mount --move /mnt {copy} && mount -t tmpfs none {checkout} && cd {copy} && exec "$@" """
    command = (*own, "bash", "-c", hide, "alone")
    why = _failure([*command, "true"])
    if why:
        print(f"from nothing: the checkout can be seen, for the system allows no mounts ({why})", flush=True)
    return () if why else command
