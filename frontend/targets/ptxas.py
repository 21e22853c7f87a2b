"""NVIDIA's assembler of PTX, where it is installed: the package of linattn's extra ``cuda``, or a CUDA toolkit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from linattn.runtime.errors import LoweringError

_PACKAGES = ("nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvcc")
"""CUDA 12's first: what its ptxas writes runs on drivers from 525 on, that of CUDA 13 from 580 on."""
_NAMES = ("ptxas", "ptxas.exe")


@dataclass(frozen=True)
class Assembler:
    """A ptxas.

    Attributes:
        path: The program.
        version: Such as ``12.9.86``.
        architectures: Numbers of the GPUs that it knows, such as 90.
    """

    path: Path
    version: str
    architectures: frozenset[int]

    def assemble(self, ptx: bytes, architecture: int) -> bytes:
        """The native code of a GPU: a cubin.

        Raises:
            LoweringError: if it does not take the text.
        """
        gpu = f"sm_{architecture}"
        with tempfile.TemporaryDirectory(prefix="linattn-") as folder:
            source, cubin = Path(folder) / "kernels.ptx", Path(folder) / "kernels.cubin"
            source.write_bytes(ptx)
            done = subprocess.run(
                [self.path, "-arch", gpu, source, "-o", cubin], capture_output=True, text=True, check=False
            )
            if done.returncode == 0 and cubin.is_file():
                return cubin.read_bytes()
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        said = next((line for line in lines if re.search(r"error|fatal", line)), lines[-1] if lines else "nothing")
        said = said.replace(str(source), source.name)[:300]
        hint = f"without {gpu} in --gpu-target, its driver compiles the PTX"
        raise LoweringError(
            f"ptxas {self.version} does not assemble the kernels for {gpu} (exit code {done.returncode})",
            where=str(self.path),
            got=said,
            hint=hint,
        )


def find_assembler() -> Assembler | None:
    """The assembler of the package, else that of ``CUDA_HOME``, else the one on the path; None where there is none."""
    found = _of_package() or _of_toolkit()
    return _ask(found) if found is not None else None


def _of_package() -> Path | None:
    for package in _PACKAGES:
        try:
            files = metadata.files(package) or []
        except metadata.PackageNotFoundError:
            continue
        for file in files:
            path = Path(str(file.locate()))
            if path.name in _NAMES and path.is_file():
                return path
    return None


def _of_toolkit() -> Path | None:
    home = os.environ.get("CUDA_HOME")
    places = [str(Path(home) / "bin"), None] if home else [None]
    found = (shutil.which("ptxas", path=place) for place in places)
    return next((Path(path) for path in found if path is not None), None)


@cache
def _ask(path: Path) -> Assembler | None:
    """What a program says of itself; None if it is no ptxas that runs here."""
    try:
        texts = [
            subprocess.run([path, option], capture_output=True, text=True, check=True).stdout
            for option in ("--version", "--help")
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    version = re.search(r"\bV(\d+\.\d+\.\d+)", texts[0])
    known = frozenset(int(number) for number in re.findall(r"'sm_(\d+)'", texts[1]))
    return Assembler(path, version[1], known) if version and known else None
