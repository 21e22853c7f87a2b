"""What the commands show without running anything: --describe, --dry-run, completion; and what goes through pipes."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from linattn.frontend import CompileOptions, compile_model
from linattn.frontend import cli as compile_cli
from linattn.runtime import Program
from linattn.runtime import cli as run_cli
from linattn.runtime.bench import cli as bench_cli

from samples.tiny_hybrid import build

SMALL = ["--max-context", "32", "--prefill-blocks", "8"]
OPEN = ["--max-context", "open", "--prefill-blocks", "open", "--batch", "open"]
SMALL_THINGS = re.compile(r"\bNone\b|\b0\.0+ [KMGT]iB|is not a GPU|not a CPU|\b1 rows\b|\b1 tokens\b")
"""What a reader of a report stumbled over."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.onnx, and compiled of it tiny.vmfb with its weights beside it and its report."""
    folder = tmp_path_factory.mktemp("first_look")
    onnx.save(build(), folder / "model.onnx")
    options = [str(folder / "model.onnx"), *SMALL, "--parameters", str(folder / "tiny.irpa"), "--quiet"]
    options += ["-o", str(folder / "tiny.vmfb"), "--report", str(folder / "report.json")]
    assert compile_cli.main(options) == 0
    return folder


def test_describe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The numbers are those of a program that was loaded."""
    assert run_cli.main(["--describe", "--json", str(folder / "tiny.vmfb")]) == 0
    found = json.loads(capsys.readouterr().out)
    with Program.load(folder / "tiny.vmfb") as program:
        manifest, states = program.manifest, program.session(batch=1).states
        held = {spec.name: states[spec.name].numpy().nbytes for spec in program.states if spec.kind != "kv_cache"}
    rows = {row["name"]: row for row in found["states"]}
    assert {name: rows[name]["bytes"] for name in held} == held
    assert rows["past.1.key"]["bytes"] == 2 * 32 * 32 * 4
    assert found["memory"]["sequence"] == sum(row["bytes"] for row in rows.values())
    assert found["memory"]["weights"] == (folder / "tiny.irpa").stat().st_size
    assert found["file_bytes"] == (folder / "tiny.vmfb").stat().st_size
    assert found["target"]["instruction_sets"] == list(manifest.target.instruction_sets)
    assert [entry["symbol"] for entry in found["entry_points"]] == ["decode", "prefill_8"]
    assert sum(row["count"] for row in found["strategies"]) == len(manifest.nodes)
    assert run_cli.main([str(folder / "tiny.vmfb"), "--describe"]) == 0
    text = capsys.readouterr().out
    assert not SMALL_THINGS.search(text), text
    for word in ("decode  1 token", "input_ids  int64 [batch, sequence]", "2 x recurrent", "fused_simd", "tiny.irpa"):
        assert word in text


def test_describe_opens_no_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells of modules for other machines too."""
    monkeypatch.setattr("linattn.runtime.module.Module.link", None)
    monkeypatch.setattr("linattn.runtime.loading.open_device", None)
    assert run_cli.main(["--describe", str(folder / "tiny.vmfb")]) == 0


@pytest.mark.parametrize("file", ["model.onnx", "nowhere.vmfb", "."])
def test_describe_of_something_else(file: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli.main(["--describe", str(folder / file)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_list_devices_for_machines(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert run_cli.main(["--list-devices", "--json"]) == 0
    assert "local-task" in {row["uri"] for row in json.loads(capsys.readouterr().out)}
    assert run_cli.main([str(folder / "tiny.vmfb"), "--json"]) == 2
    assert "--describe or --list-devices" in capsys.readouterr().err


def test_what_is_generated_is_what_ids_reads(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = str(folder / "tiny.vmfb")
    assert run_cli.main([module, "--ids", "1,2,3", "--generate", "6"]) == 0
    whole = capsys.readouterr().out
    assert re.fullmatch(r"\d+(,\d+){5}\n", whole)
    assert run_cli.main([module, "--ids", "1,2,3", "--generate", "2"]) == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("1 2, 3," + capsys.readouterr().out))
    assert run_cli.main([module, "--ids", "-", "--generate", "4"]) == 0
    assert capsys.readouterr().out == ",".join(whole.split(",")[2:])


def test_rows_of_ids(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A row a line, in and out."""
    options = CompileOptions(batch=2, max_context=32, prefill_blocks=())
    compile_model(folder / "model.onnx", options, output=folder / "two.vmfb")
    for given in ("1,2,3\n4,5,6\n", "1 2 3\n4 5 6"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(given))
        assert run_cli.main([str(folder / "two.vmfb"), "--ids", "-", "--generate", "3"]) == 0
        assert re.fullmatch(r"(\d+,\d+,\d+\n){2}", capsys.readouterr().out)
    monkeypatch.setattr(sys, "stdin", io.StringIO("1,2\n3\n"))
    assert run_cli.main([str(folder / "two.vmfb"), "--ids", "-", "--generate", "3"]) == 2
    assert "--ids: rows of different lengths, got 2, 1" in capsys.readouterr().err


def test_dry_run_chooses_what_is_compiled(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(folder.iterdir())
    monkeypatch.chdir(folder)
    assert compile_cli.main(["model.onnx", *SMALL, "--dry-run", "--quiet", "--report", "-"]) == 0
    dry, real = json.loads(capsys.readouterr().out), json.loads((folder / "report.json").read_text())
    same = ("nodes", "others", "states", "entry_points", "weight_bytes", "call_bytes", "abi")
    assert {key: dry[key] for key in same} == {key: real[key] for key in same}
    assert set(dry["call_bytes"]) == {"decode", "prefill_8"}
    assert dry["output_bytes"] == 0
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("sizes", [SMALL, OPEN], ids=["small", "open"])
@pytest.mark.parametrize("target", ["cpu", "vulkan", "cuda"])
def test_reports_are_about_the_target(
    target: str, sizes: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And of sizes that are open they say so."""
    assert compile_cli.main([str(folder / "model.onnx"), "--target", target, *sizes, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert not SMALL_THINGS.search(text), text
    assert ("a token" in text) == (sizes is OPEN)
    assert "dry run" in text


def test_dry_run_of_a_bundle(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(folder.iterdir())
    monkeypatch.chdir(folder)
    assert compile_cli.main(["model.onnx", "--target", "cpu,cuda", *SMALL, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert (out.count("fused_simd") > 5, out.count("fused_simt") > 5) == (True, True)
    assert sorted(folder.iterdir()) == before


def test_dry_run_names_a_node_that_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build()
    next(node for node in model.graph.node if node.op_type == "Softplus").op_type = "SoftFoo"
    onnx.save(model, tmp_path / "model.onnx")
    assert compile_cli.main([str(tmp_path / "model.onnx"), "--dry-run"]) == 2
    assert "SoftFoo" in capsys.readouterr().err


PARSERS: dict[str, Any] = {
    "linattn-run": run_cli.make_parser,
    "linattn-compile": compile_cli.make_parser,
    "linattn-bench": bench_cli.make_parser,
}


@pytest.mark.parametrize("command", PARSERS)
def test_completion(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bash takes the script, and offers every option."""
    parser = PARSERS[command]()
    with pytest.raises(SystemExit, match="0"):
        parser.parse_args(["--print-completion", "bash"])
    script = capsys.readouterr().out
    offer = f"COMP_WORDS=({command} --) COMP_CWORD=1; _shtab_{command.replace('-', '_')}; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", f"{script}\n{offer}"], capture_output=True, text=True, check=True)
    options = {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
    assert options <= set(done.stdout.split())
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit, match="2"):
        PARSERS[command]().parse_args(["--print-completion", "bash"])
    assert 'needs the package shtab; pip install "shtab>=' in capsys.readouterr().err


def test_ctrl_c_while_a_command_is_loaded() -> None:
    """Extension modules make an ImportError of it, so it has to wait."""
    source = """
import signal, sys, threading
from linattn.__main__ import run_command
threading.Timer(0.05, signal.raise_signal, [signal.SIGINT]).start()
sys.argv = ["linattn-run", "--version"]
sys.exit(run_command())
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "linattn-run: stopped\n")
