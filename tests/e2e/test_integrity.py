"""Files that are not what was written, and weights that are not the model's, are refused before they run."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from linattn.frontend import CompileOptions, compile_model
from linattn.frontend.model import load_model
from linattn.runtime import Program, TargetError
from linattn.runtime.cli import main
from linattn.runtime.integrity import SEAL_BYTES, check_seal, seal_file, sealed
from onnx import helper, numpy_helper
from tolerances import BENIGN, error

ROWS, COLUMNS = 512, 192
WEIGHTS = {seed: np.random.default_rng(seed).standard_normal((ROWS, COLUMNS)).astype(np.float32) for seed in (0, 1)}
X = np.random.default_rng(2).standard_normal((2, ROWS)).astype(np.float32)
DAMAGED = r"(damaged: its bytes are not those|wrong size, got \d+ bytes, expected|no seal at its end)"


def model(seed: int) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "twin",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, X.shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [len(X), COLUMNS])],
        [numpy_helper.from_array(WEIGHTS[seed], "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders of two models of equal names and shapes, each with m.vmfb and w.irpa; the first with inside.vmfb too."""
    folders = {seed: tmp_path_factory.mktemp(f"twin{seed}") for seed in (0, 1)}
    for seed, folder in folders.items():
        compile_model(model(seed), CompileOptions(parameters=folder / "w.irpa"), output=folder / "m.vmfb")
    compile_model(model(0), output=folders[0] / "inside.vmfb")
    return folders


def refused(*arguments: object, words: str = DAMAGED, verify: bool = False, **named: Path) -> None:
    with pytest.raises(TargetError, match=words) as caught:
        Program.load(*arguments, verify=verify, **named)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def flipped(data: bytes, place: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1 << place % 8
    return bytes(changed)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("verify", [False, True])
def test_whole_files_run(twins: dict[int, Path], seed: int, verify: bool) -> None:
    for path in twins[seed].glob("*.vmfb"):
        with Program.load(path, verify=verify) as program:
            assert error(program.run({"x": X})["y"], X @ WEIGHTS[seed]) < BENIGN["float32"]


def test_weights_of_a_twin(twins: dict[int, Path]) -> None:
    """Names and shapes are the same; what the weights hold is not."""
    refused(twins[0] / "m.vmfb", parameters=twins[1] / "w.irpa", words="weights of another model")


def test_half_of_a_pair_is_noticed(twins: dict[int, Path], tmp_path: Path) -> None:
    """A compile that ended between its two files, whichever came first, and a module without its own beside it."""
    for new in ("m.vmfb", "w.irpa"):
        for name in ("m.vmfb", "w.irpa"):
            (tmp_path / name).write_bytes((twins[int(name == new)] / name).read_bytes())
        refused(tmp_path / "m.vmfb", words="weights of another model")


@pytest.mark.parametrize("name", ["m.vmfb", "inside.vmfb", "w.irpa"])
def test_a_flipped_bit_anywhere_is_found(twins: dict[int, Path], name: str) -> None:
    data = (twins[0] / name).read_bytes()
    places = {*range(0, len(data), 499), *range(len(data) - SEAL_BYTES, len(data)), 0, 1, 2, 3}
    for place in places:
        with pytest.raises(TargetError, match=DAMAGED):
            check_seal(flipped(data, place), name, whole=True)


@pytest.mark.parametrize("name", ["m.vmfb", "inside.vmfb", "w.irpa"])
def test_code_and_tables_are_always_checked(twins: dict[int, Path], name: str) -> None:
    """Without reading the weights: what may be damaged unseen is their inside, and that runs."""
    data = (twins[0] / name).read_bytes()
    found, places = [], range(0, len(data) - SEAL_BYTES, 997)  # the hash of all, in the seal, is not read here
    for place in places:
        try:
            check_seal(flipped(data, place), name)
        except TargetError:
            found.append(place)
    unseen = [place for place in places if place not in found]
    if name == "m.vmfb":
        assert unseen == []
        return
    weights = WEIGHTS[0].nbytes
    if name == "inside.vmfb":  # which lie there with all other constants, more of them for some CPUs
        members = zipfile.ZipFile(twins[0] / name).infolist()
        weights = max(member.file_size for member in members if member.filename.startswith("_const"))
        assert weights >= WEIGHTS[0].nbytes
    assert weights - (3 << 16) < unseen[-1] - unseen[0] < weights - (2 << 16)


@pytest.mark.parametrize("name", ["m.vmfb", "inside.vmfb", "w.irpa"])
def test_damage_ends_in_one_line(twins: dict[int, Path], name: str, tmp_path: Path) -> None:
    for file in twins[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = (tmp_path / name).read_bytes()
    module = tmp_path / ("m.vmfb" if name == "w.irpa" else name)
    changes: list[Callable[[], bytes]] = [
        lambda: flipped(data, 100),
        lambda: flipped(data, len(data) - SEAL_BYTES - 10),
        lambda: data[:-1],
        lambda: data[: len(data) // 2],
        lambda: data[:-SEAL_BYTES],
        lambda: data[:10],
        lambda: b"",
        lambda: data + b"\0",
        lambda: data[:-SEAL_BYTES] + b"\0" * 4096 + data[-SEAL_BYTES:],
        lambda: bytes(len(data)),  # a copy that has only made room so far
    ]
    for change in changes:
        (tmp_path / name).write_bytes(change())
        refused(module)
    middle = len(data) // 2
    (tmp_path / name).write_bytes(flipped(data, middle))
    refused(module, verify=True)
    if name == "inside.vmfb":
        refused(flipped(data, middle), verify=True)


def test_verify_in_the_shell(twins: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = (twins[0] / "inside.vmfb").read_bytes()
    path = tmp_path / "bad.vmfb"
    path.write_bytes(flipped(data, len(data) // 2))
    np.save(tmp_path / "x.npy", X)
    command = [str(path), "--input", f"x={tmp_path / 'x.npy'}"]
    assert main(command) == 0
    assert main([*command, "--verify"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"linattn-run: error: {path}: damaged")


def test_other_tools_read_sealed_files(twins: dict[int, Path], tmp_path: Path) -> None:
    """The seal is the comment of the zip archive that a .vmfb is too, and follows what IREE reads of both files."""
    with zipfile.ZipFile(twins[0] / "inside.vmfb") as archive:
        assert archive.testzip() is None
        assert len(archive.comment) == SEAL_BYTES
    np.save(tmp_path / "x.npy", X)
    compile_model(model(0), CompileOptions(parameters=tmp_path / "w.irpa", plain_abi=True), output=tmp_path / "m.vmfb")
    tool = Path(sys.executable).parent / "iree-run-module"
    command = [
        tool,
        f"--module={tmp_path / 'm.vmfb'}",
        f"--parameters=model={tmp_path / 'w.irpa'}",
        "--device=local-sync",
    ]
    command += ["--function=main", f"--input=@{tmp_path / 'x.npy'}", f"--output=@{tmp_path / 'y.npy'}"]
    subprocess.run(command, check=True, capture_output=True)
    assert error(np.load(tmp_path / "y.npy"), X @ WEIGHTS[0]) < BENIGN["float32"]


@pytest.mark.parametrize("size", [0, 1, 21, 22, 100, (1 << 18) + 1])
def test_a_seal_fits_any_bytes(size: int, tmp_path: Path) -> None:
    data = np.random.default_rng(size).bytes(size)
    path = tmp_path / "any"
    path.write_bytes(data)
    seal_file(path)
    assert path.read_bytes() == sealed(data)
    assert sealed(data)[:-SEAL_BYTES] == data
    for whole in (False, True):
        check_seal(path, "any", whole=whole)
        check_seal(sealed(data), "any", whole=whole)
        with pytest.raises(TargetError, match="no seal"):
            check_seal(data, "any", whole=whole)


@pytest.mark.parametrize("changed", ["w", "small"])
def test_the_hash_of_a_model_covers_what_its_weights_hold(changed: str, tmp_path: Path) -> None:
    hashes = []
    for seed, name in ((0, "a"), (1, "b"), (0, "c")):
        folder = tmp_path / name
        folder.mkdir()
        proto = model(seed if changed == "w" else 0)
        small = np.array([1, seed if changed == "small" else 0], np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(small, "small"))
        onnx.save(proto, folder / "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
        hashes.append(load_model(folder / "model.onnx").sha256)
    graphs = {(tmp_path / name / "model.onnx").read_bytes() for name in "abc"}
    assert len(graphs) == 1
    assert hashes[0] == hashes[2] != hashes[1]
