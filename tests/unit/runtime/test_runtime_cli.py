from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from linattn.runtime import Program, greedy
from linattn.runtime.cli import main
from linattn.runtime.loading import _compiled_first
from linattn.runtime.manifest_target import Target
from tiny_hybrid import Hybrid, reference


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.vmfb"
    path.write_bytes(Hybrid().compile())
    return path


def test_generate(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(model), "--ids", "3,1,2", "--generate", "6"]) == 0
    out, err = capsys.readouterr()
    want = list(greedy(Program.load(model).session(), [3, 1, 2], 6))
    assert [int(token) for token in out.split(",")] == want
    assert out.count("\n") == 1
    assert "loaded" in err
    assert "tokens/s" in err


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8"])
def test_input_file_and_output_dir(model: Path, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    ids = np.array([3, 1, 2, 4, 5], dtype)
    np.save(model.parent / "ids.npy", ids)
    out = model.parent / "out"
    assert (
        main([str(model), "--input", str(model.parent / "ids.npy"), "--output-dir", str(out), "--device", "cpu"]) == 0
    )
    assert "logits: [1, 5, 4] float32 min" in capsys.readouterr().out
    np.testing.assert_allclose(np.load(out / "logits.npy"), reference(ids[None].astype(np.int64))[0], rtol=1e-6)


def test_states_given_run_stateless(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(model.parent / "rec.npy", np.ones((1, 4), np.float32))
    assert main([str(model), "--ids", "3,1,2", "--input", f"past.0.rec={model.parent / 'rec.npy'}"]) == 0
    assert "present.1.kv: [1, 2, 3, 4] float32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ids", "1,x"], "--ids: not token ids"),
        (["--ids", "99999999999999999999"], "--ids: not token ids"),
        (["--ids", "1", "--device", "tpu"], "unknown device, got 'tpu'"),
        (["--ids", "1", "--generate", "0"], "--generate"),
        (["--ids", "1", "--generate", "100"], "context full"),
        (["--generate", "3"], "no inputs; give"),
        (["--input", "nope.npy"], "nope.npy"),
        (["--input", "x=README"], "README"),
        (["--input", "pickled.npy"], "not a .npy array; numpy.save writes one"),
        (["--input", "text.npy"], "not a .npy array"),
        (["--input", "two.npz"], "not a single .npy array"),
        (["--ids", "1", "--input", "ids.npy"], "no place for these ids"),
        (["--ids", "1", "--input", "position_ids=ids.npy"], "position_ids: wrong shape"),
        (["--ids", "1", "--parameters", "w.irpa"], "weights inside"),
        ([], "no inputs; give --prompt TEXT"),
        (["--input", "position_ids=ids.npy"], "input_ids: missing input"),
    ],
)
def test_errors(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(model.parent)
    np.save("ids.npy", np.ones(3, np.int64))
    np.save("pickled.npy", np.array([{}], object), allow_pickle=True)
    Path("text.npy").write_text("hello")
    np.savez("two.npz", a=np.ones(1), b=np.ones(1))
    assert main([str(model), *arguments]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("linattn-run: error: ")
    assert words in last


def test_missing_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere.vmfb", "--ids", "1"]) == 2
    assert capsys.readouterr().err == "linattn-run: error: nowhere.vmfb: no such file\n"


def test_debug_shows_where_an_error_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere.vmfb", "--debug"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("linattn-run: error: nowhere.vmfb: no such file\n")


@pytest.mark.vulkan
def test_a_load_on_a_gpu_says_what_it_waits_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before it, since nothing can be said while IREE holds the interpreter; a CPU has nothing to wait for."""
    for target, said in (("vulkan", True), ("cpu", False)):
        path = tmp_path / f"{target}.vmfb"
        path.write_bytes(Hybrid(target).compile())
        assert main([str(path), "--ids", "3,1,2"]) == 0
        first, *_ = capsys.readouterr().err.splitlines()
        assert ("loading on vulkan" in first and "driver compiles the kernels" in first) is said, first
    assert logging.getLogger("linattn.runtime").level == logging.NOTSET


def test_where_there_is_native_code_the_wait_is_for_others() -> None:
    target = Target("cuda", "cuda", "sm_80", native=("sm_80", "sm_90"))
    assert _compiled_first(target).startswith("native code for sm_80, sm_90: on another GPU the driver compiles")
