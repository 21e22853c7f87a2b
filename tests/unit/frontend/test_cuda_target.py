"""What the CUDA target makes of ``--gpu-target``, and where it looks for ptxas."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from linattn.frontend.targets import CompileTarget, TargetOptions, cuda, ptxas, vulkan
from linattn.frontend.targets.math import with_math
from linattn.runtime import LinattnError, TargetError

ASSEMBLER = ptxas.Assembler(Path("ptxas"), "12.9.86", frozenset({75, 80, 89, 90, 120}))
PROGRAM = f"""#!{sys.executable}
import sys
print("Cuda compilation tools, release 12.9, V12.9.86" if "--version" in sys.argv else "'sm_80','sm_90','sm_90a'")
"""


def resolve(names: str | None, monkeypatch: pytest.MonkeyPatch, assembler: ptxas.Assembler | None) -> CompileTarget:
    monkeypatch.setattr(cuda, "find_assembler", lambda: assembler)
    return cuda.resolve(TargetOptions(gpu_target=names))


@pytest.mark.parametrize(
    ("names", "ptx", "native"),
    [
        ("sm_80", 80, ("sm_80",)),
        ("sm_90", 89, ("sm_90",)),
        ("SM_90a", 89, ("sm_90",)),
        ("h100,a100,ada", 80, ("sm_80", "sm_89", "sm_90")),
        ("sm_120,sm_90,sm_120", 89, ("sm_90", "sm_120")),
        ("sm_89,sm_75", 75, ("sm_75", "sm_89")),
    ],
)
def test_native_code_is_for_what_is_named(
    names: str, ptx: int, native: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the PTX, like the kernels, for the oldest that is named."""
    target = resolve(names, monkeypatch, ASSEMBLER)
    assert target.native is not None
    assert (target.native.names, target.native.ptx_architecture) == (native, ptx)
    assert target.description == f"sm_{ptx}"
    assert f"--iree-cuda-target=sm_{ptx}" in target.flags
    assert target.notes == (
        f"native code for {', '.join(native)}, by ptxas 12.9.86; other GPUs compile PTX for sm_{ptx}",
    )


def test_what_nobody_named_gets_no_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    target = resolve(None, monkeypatch, ASSEMBLER)
    assert target.native is None
    (note,) = target.notes
    assert "PTX only" in note
    assert "--gpu-target" in note


@pytest.mark.parametrize("names", ["sm_80", "sm_80,sm_90"])
def test_without_ptxas_the_report_says_what_to_install(names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = resolve(names, monkeypatch, None)
    assert target.native is None
    assert "PTX only" in target.notes[-1]
    mapped = "IREE 3.13 has no target sm_90: compiled for sm_80, whose PTX the driver of a newer GPU runs"
    assert (mapped in target.notes) is ("sm_90" in names)
    assert 'pip install "nvidia-cuda-nvcc-cu12==' in target.notes[-1]


def test_what_this_ptxas_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs PTX as without a ptxas, and the report says so."""
    target = resolve("sm_80,sm_110", monkeypatch, ASSEMBLER)
    assert target.native is not None
    assert target.native.names == ("sm_80",)
    assert "no native code for sm_110, which ptxas 12.9.86 does not know" in target.notes
    assert resolve("sm_110", monkeypatch, ASSEMBLER).native is None


@pytest.mark.parametrize(
    "names", ["sm_13", "sm_95", "sm_999", "sm_80,sm_91", "sm_80,,sm_90", "sm_80,", "sm_90;x", "ada2"]
)
def test_unknown_names_are_refused(names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Table 2 #36: with the choices (Vulkan's: `test_bad_option`)."""
    for assembler in (None, ASSEMBLER):
        with pytest.raises(TargetError, match=r"unknown GPU.* sm_60, .*, ada, l4, .*; nvidia-smi"):
            resolve(names, monkeypatch, assembler)


@pytest.mark.parametrize(
    ("resolve_gpu", "name", "changes"),
    [(cuda.resolve, "sm_70", True), (cuda.resolve, "sm_61", False), (vulkan.resolve, "hopper", True),
     (vulkan.resolve, "baseline", False)],
)  # fmt: skip
def test_fast_math_is_for_matrix_units(
    resolve_gpu: Callable[[TargetOptions], CompileTarget], name: str, changes: bool
) -> None:
    target = resolve_gpu(TargetOptions(gpu_target=name))
    assert with_math(target, "strict") == target
    fast = with_math(target, "fast")
    assert fast.capabilities.fast_math is changes
    assert any("--math fast changes nothing here" in note for note in fast.notes) is not changes


def program(folder: Path, text: str = PROGRAM) -> Path:
    folder.mkdir(parents=True)
    path = folder / "ptxas"
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_where_it_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package, then CUDA_HOME, then the path."""
    places = [program(tmp_path / name / "bin") for name in ("package", "home", "path")]

    class Installed:
        def locate(self) -> Path:
            return places[0]

    def files(name: str) -> list[Installed]:
        if name != "nvidia-cuda-nvcc-cu12":
            raise metadata.PackageNotFoundError(name)
        return [Installed()]

    monkeypatch.setattr(metadata, "files", files)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    for place in places:
        found = ptxas.find_assembler()
        assert found is not None
        assert (found.path, found.version, found.architectures) == (place, "12.9.86", {80, 90})
        place.unlink()
    assert ptxas.find_assembler() is None


@pytest.mark.parametrize("text", ["#!/bin/sh\nexit 1\n", "#!/bin/sh\necho another program\n", "no program"])
def test_what_is_no_ptxas_is_not_taken(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "bin", text)
    monkeypatch.setattr(ptxas, "_PACKAGES", ())
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert ptxas.find_assembler() is None


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("echo 'ptxas kernels.ptx, line 3; error   : Unknown symbol' >&2; echo done >&2; exit 255", "Unknown symbol"),
        ("kill -SEGV $$", "exit code -11"),
        ("exit 0", "got nothing"),  # and no file
    ],
)
def test_what_it_does_not_assemble_is_one_line(body: str, said: str, tmp_path: Path) -> None:
    broken = ptxas.Assembler(program(tmp_path / "bin", f"#!/bin/sh\n{body}\n"), "12.9.86", frozenset({90}))
    with pytest.raises(LinattnError) as caught:
        broken.assemble(b"nonsense", 90)
    text = str(caught.value)
    assert said in text
    assert "\n" not in text
    assert "does not assemble the kernels for sm_90" in text
