"""What linattn-compile writes never destroys what it reads, and is whole or not there."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from linattn.frontend import cli
from linattn.frontend.cli import main
from linattn.frontend.compile import compile_model as compile_here
from linattn.runtime import InputError, LinattnError, Program
from linattn.runtime.outputs import check_outputs, new_file
from test_integrity import WEIGHTS, X, model
from tolerances import BENIGN, error

OPTIONS = ["-o", "--parameters", "--report"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model whose weights lie in weights.bin."""
    folder = tmp_path / "model"
    folder.mkdir()
    onnx.save(model(0), folder / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    return folder


def compile_(folder: Path, *arguments: object, capsys: pytest.CaptureFixture[str] | None = None) -> tuple[int, str]:
    """Exit code and error line; without -o the module goes to out.vmfb."""
    given = [str(argument) for argument in arguments]
    output = [] if "-o" in given else ["-o", str(folder / "out.vmfb")]
    code = main([str(folder / "model.onnx"), *given, *output, "--quiet"])
    err = capsys.readouterr().err if capsys else ""
    assert "Traceback" not in err
    return code, err.strip()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def same(path: Path) -> Path:
    return path


def roundabout(path: Path) -> Path:
    return path.parent / ".." / path.parent.name / path.name


def symlink(path: Path) -> Path:
    link = path.parent.parent / "link"
    link.symlink_to(path)
    return link


def hard_link(path: Path) -> Path:
    link = path.parent.parent / "hard"
    link.hardlink_to(path)
    return link


def linked_folder(path: Path) -> Path:
    link = path.parent.parent / "linked"
    link.symlink_to(path.parent)
    return link / path.name


WAYS: list[Callable[[Path], Path]] = [same, roundabout, symlink, hard_link, linked_folder]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", ["model.onnx", "weights.bin"])
@pytest.mark.parametrize("option", OPTIONS)
def test_an_input_is_never_an_output(
    option: str, name: str, way: Callable[[Path], Path], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(folder)
    code, line = compile_(folder, option, way(folder / name), capsys=capsys)
    assert code == 2
    assert f"{option} would overwrite an input" in line
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["model.onnx", "weights.bin"])
def test_an_input_is_never_an_output_of_a_bundle(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(folder)
    for arguments, message in (
        (["-o", folder / "out.linattn", "--report", folder / name], "--report would overwrite an input"),
        (["-o", folder / "new.linattn", "--report", folder / "new.linattn"], "--report would overwrite what -o writes"),
        (["-o", folder / "no" / "out.linattn"], "no such folder"),
    ):
        code, line = compile_(folder, *arguments, capsys=capsys)
        assert (code, message in line) == (2, True), line
        assert contents(folder) == before


def test_a_description_of_a_gpu_is_an_input(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    description = folder / "gpu.json"
    description.write_text('{"capabilities": {}}')
    gpu = ["--target", "vulkan", "--gpu-target", description]
    code, line = compile_(folder, *gpu, "--report", description, capsys=capsys)
    assert code == 2
    assert description.read_text() == '{"capabilities": {}}', line


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("pair", [("-o", "--parameters"), ("-o", "--report"), ("--parameters", "--report")])
@pytest.mark.parametrize("exists", [True, False])
def test_outputs_have_names_of_their_own(
    pair: tuple[str, str], way: Callable[[Path], Path], exists: bool, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if way is hard_link and not exists:
        pytest.skip("needs a file")
    path = folder / "one"
    if exists:
        path.write_text("old")
    before = contents(folder)
    code, line = compile_(folder, pair[0], path, pair[1], way(path), capsys=capsys)
    assert code == 2
    assert f"{pair[1]} would overwrite what {pair[0]} writes" in line
    assert contents(folder) == before


def a_folder(folder: Path) -> Path:
    (folder / "there").mkdir()
    return folder / "there"


def a_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def a_socket(folder: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(folder / "socket"))
    return folder / "socket"


def a_loop(folder: Path) -> Path:
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop"


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    ("place", "message"),
    [
        (a_folder, "a folder, not a file to write"),
        (a_pipe, "not a plain file"),
        (a_socket, "not a plain file"),
        (lambda folder: folder / "no" / "such" / "out", "no such folder"),
        (lambda folder: folder / "model.onnx" / "out", "no such folder"),
        (lambda folder: folder / ("a" * 300), "not a name for a file"),
        (lambda folder: folder / "a\0b", "not a name for a file"),
        (a_loop, "not a name for a file"),
    ],
)
def test_places_that_cannot_be_written(
    option: str, place: Callable[[Path], Path], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = place(folder)
    before = sorted(folder.iterdir())
    code, line = compile_(folder, option, path, capsys=capsys)
    assert code == 2
    assert message in line
    assert len(line.splitlines()) == 1
    assert sorted(folder.iterdir()) == before


def test_ir_goes_to_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = compile_(folder, "--dump-ir", folder / "model.onnx", capsys=capsys)
    assert (code, "not a folder" in line) == (2, True)


def test_a_folder_of_somebody_else(folder: Path) -> None:
    with pytest.raises(InputError, match="may not be written to"):
        check_outputs({"-o": "/sys/out.vmfb"} if os.geteuid() else {"-o": "/proc/self/out.vmfb"})


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_modes_are_those_of_any_new_file(umask: int, folder: Path) -> None:
    old = os.umask(umask)
    try:
        code, _ = compile_(folder, "--parameters", folder / "w.irpa", "--report", folder / "report.json")
    finally:
        os.umask(old)
    assert code == 0
    modes = {stat.S_IMODE((folder / name).stat().st_mode) for name in ("out.vmfb", "w.irpa", "report.json")}
    assert modes == {0o666 & ~umask}


def test_a_link_leads_to_what_is_written(folder: Path) -> None:
    store = folder.parent / "store"
    store.mkdir()
    for name in ("out.vmfb", "w.irpa"):
        (folder / name).symlink_to(store / name)
        (store / name).write_text("old")
    assert compile_(folder, "--parameters", folder / "w.irpa")[0] == 0
    assert (folder / "out.vmfb").is_symlink()
    assert {path.name for path in store.iterdir()} == {"out.vmfb", "w.irpa"}
    with Program.load(folder / "out.vmfb", verify=True) as program:
        assert error(program.run({"x": X})["y"], X @ WEIGHTS[0]) < BENIGN["float32"]


LIMITED = """
import resource, sys
from linattn.frontend.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, 1 << 17))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("options", "named"), [([], "out.vmfb"), (["--parameters", "w.irpa", "--report", "report.json"], "w.irpa")]
)
def test_a_full_disk(options: list[str], named: str, folder: Path) -> None:
    """No file may be larger than 128 KiB: the code fits, the weights do not."""
    (folder / "out.vmfb").write_text("old")
    before = contents(folder)
    command = [sys.executable, "-c", LIMITED, "model.onnx", "-o", "out.vmfb", "--quiet", *options]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    assert result.stderr.startswith(f"linattn-compile: error: {named}: cannot be written, got "), result.stderr
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert contents(folder) == before


def test_a_full_disk_for_the_report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last file: those before it are whole."""

    def full(self: Path, data: str) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli, "compile_model", compile_here)
    monkeypatch.setattr(Path, "write_text", full)
    assert compile_(folder, "--report", folder / "report.json")[0] == 2
    assert sorted(contents(folder)) == ["model.onnx", "out.vmfb", "weights.bin"]
    Program.load(folder / "out.vmfb", verify=True).close()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=lambda stop: stop.name)
def test_stopped(stop: signal.Signals, folder: Path) -> None:
    arguments = ["model.onnx", "-o", "out.vmfb", "--parameters", "w.irpa"]
    command = [sys.executable, "-m", "linattn.frontend.cli", *arguments]
    before = contents(folder)
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        process.stderr.readline()  # it has begun
        process.send_signal(stop)
        rest = process.stderr.read()
        code = process.wait(60)
    assert contents(folder) == before
    assert "Traceback" not in rest
    if stop == signal.SIGINT:
        assert (code, rest.splitlines()[-1]) == (130, "linattn-compile: stopped")


def test_two_compiles_to_one_output(folder: Path) -> None:
    """At once, of different weights: what is there in the end is one of the two, whole."""
    other = folder.parent / "other"
    other.mkdir()
    onnx.save(model(1), other / "model.onnx")
    out = folder / "out.vmfb"
    command = [sys.executable, "-m", "linattn.frontend.cli", "--quiet", "-o", str(out)]
    processes = [subprocess.Popen([*command, str(path / "model.onnx")]) for path in (folder, other)]
    assert [process.wait(120) for process in processes] == [0, 0]
    with Program.load(out, verify=True) as program:
        y = program.run({"x": X})["y"]
    assert min(error(y, X @ WEIGHTS[0]), error(y, X @ WEIGHTS[1])) < BENIGN["float32"]
    assert sorted(contents(folder)) == ["model.onnx", "out.vmfb", "weights.bin"]


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 16))

    def write(byte: int) -> None:
        for _ in range(100):
            with new_file(path) as partial, partial.open("wb") as file:
                for _ in range(16):
                    file.write(bytes([byte]) * (1 << 12))
                    file.flush()

    threads = [threading.Thread(target=write, args=(byte,)) for byte in (1, 2, 3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        data = path.read_bytes()
        assert (len(data), len(set(data))) == (1 << 16, 1)
        time.sleep(0.001)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("fault", [KeyboardInterrupt, SystemExit, OSError, ValueError])
def test_nothing_is_left_after_an_error(fault: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write() -> None:
        with new_file(path) as partial:
            partial.write_text("new")
            raise fault

    with pytest.raises(LinattnError if fault is OSError else fault):
        write()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"
