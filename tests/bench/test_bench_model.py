"""linattn-bench model: the JSON, compiled modules, errors."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from linattn.runtime.bench import model_bench
from linattn.runtime.bench.cli import main
from linattn.runtime.bench.model_runners import IreeModel

Bench = Callable[..., tuple[int, str, str]]
QUICK = ("--prefill", "5", "--decode", "3", "--repeats", "2", "--no-ceilings")


@pytest.fixture(scope="module")
def compiled(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from linattn.frontend import CompileOptions, compile_model

    path = tmp_path_factory.mktemp("model") / "compiled.vmfb"
    compile_model(tiny_model, CompileOptions(max_context=16, prefill_blocks=()), output=path)
    return path


@pytest.fixture(scope="module")
def result(tiny_model: Path, compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("json") / "m.json"
    assert main(["model", str(tiny_model), str(compiled), *QUICK, "--quiet", "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_json(result: dict[str, Any]) -> None:
    assert (result["format"], result["kind"]) == (1, "model")
    subjects = ["tiny:cpu:default", "tiny:onnxruntime", "compiled"]
    assert [row["subject"] for row in result["rows"]] == subjects
    assert result["order"] == subjects * 2
    assert len(result["models"]) == 1
    for row in result["rows"]:
        assert row["prefill"]["tokens_per_s"] > 0
        assert row["decode"]["tokens_per_s"] > 0
        assert row["decode"]["step"]["n"] == 6
        assert (row["overhead"] is None) == (row["kind"] != "linattn")
        assert row["overhead"] is None or 0 < row["overhead"]["median"] < row["decode"]["step"]["max"]
        assert row["first_token_s"]["n"] == 2
        assert row["load_s"] > 0
        assert row["memory_bytes"]["peak"] >= row["memory_bytes"]["loaded"] > 0
        if row["kind"] == "linattn":
            assert (row["status"], row["reference"]) == ("ok", "tiny:onnxruntime")
            assert 0 < row["error"]["logits"] < 1e-5
            assert row["error"]["positions"] == 4
            assert row["greedy"] == {"equal": 4, "of": 4}
    assert "fused_simd" in result["rows"][0]["strategy"]


def test_each_module_of_a_bundle(bench: Bench, tiny_model: Path, tmp_path: Path) -> None:
    from linattn.frontend import CompileOptions, compile_bundle

    small = CompileOptions(max_context=16, prefill_blocks=())
    machines = [small, dataclasses.replace(small, cpu_features="generic")]
    compile_bundle(tiny_model, machines, tmp_path / "tiny.linattn")
    file = tmp_path / "b.json"
    status, _, err = bench("model", tmp_path / "tiny.linattn", *QUICK, "--json", file)
    assert status == 0, err
    result = json.loads(file.read_text())
    assert [row["subject"] for row in result["rows"]] == ["cpu-default", "cpu-generic"]
    assert len(result["models"]) == 1


@pytest.mark.parametrize(("all_logits", "wanted"), [(True, "all"), (False, "last")])
def test_logits_that_are_asked_for(
    all_logits: bool, wanted: str, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = IreeModel(str(compiled), all_logits=all_logits)
    asked: list[str] = []
    run = runner._session.run

    def recorded(inputs: Any, logits: Any) -> Any:
        asked.append(logits)
        return run(inputs, logits=logits)

    monkeypatch.setattr(runner._session, "run", recorded)
    assert runner.step(np.array([[1, 2]])).ndim == 1
    assert asked == [wanted]


def test_all_logits_is_an_option(compiled: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.json"
    options = [*QUICK, "--quiet", "--repeats", "1", "--peers", "none"]
    assert main(["model", str(compiled), *options, "--all-logits", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["method"]["all_logits"] is True


def test_plot(result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from linattn.runtime.bench.plot import draw

    draw([result], tmp_path / "m.png")
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")


def test_plot_of_several_results(result: dict[str, Any], bench: Bench, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    one.write_text(json.dumps(result))
    other.write_text(json.dumps(result | {"method": result["method"] | {"seed": 1}}))
    status, _, err = bench("plot", one, other, "-o", tmp_path / "both.png")
    assert (status, err) == (0, "")
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    other.write_text(json.dumps(result | {"method": result["method"] | {"prefill": 6}}))
    status, _, err = bench("plot", one, other, "-o", tmp_path / "both.png")
    assert status == 2
    assert "results of different lengths" in err
    other.write_text("[]")
    status, _, err = bench("plot", other, "-o", tmp_path / "both.png")
    assert status == 2
    assert "not a result of linattn-bench" in err


def test_wrong_logits_are_flagged(bench: Bench, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_bench, "LOGIT_LIMITS", dict.fromkeys(model_bench.LOGIT_LIMITS, 0.0))
    arguments = (*QUICK, "--repeats", "1")
    status, out, _ = bench("model", tiny_model, *arguments)
    assert status == 1
    assert "WRONG" in out


def test_module_without_a_peer(bench: Bench, compiled: Path) -> None:
    status, out, err = bench("model", compiled, *QUICK)
    assert status == 0
    assert "absent    onnxruntime: it runs .onnx files" in out
    assert "linattn-bench: repeat 2 of 2" in err


def test_profile(bench: Bench, compiled: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    status, out, _ = bench("model", compiled, *QUICK, "--profile", "--json", file)
    assert status == 0
    result = json.loads(file.read_text())
    assert result["kind"] == "profile"
    (profile,) = result["rows"]
    assert (profile["entry"], profile["position"], profile["tokens"]) == ("decode", 5, 1)
    assert profile["count"] == sum(row["count"] for row in profile["rows"])
    assert profile["dispatch_s"] == pytest.approx(sum(row["seconds"] for row in profile["rows"]))
    assert sum(row["share"] for row in profile["rows"]) == pytest.approx(1.0)
    (fused,) = (row for row in profile["rows"] if row["key"].startswith("linear_attention"))
    assert fused["count"] == 2
    assert fused["nodes"] == ["layers.0.linear_attention", "layers.2.linear_attention"]
    one_call = 4 * (4 * 2 * 32 + 2 * 2 + 2 * 2 * 32 * 32)  # q, k, v and output; decay and beta; state in and out
    assert fused["bytes"] == 2 * one_call
    (logits,) = (row for row in profile["rows"] if "node.logits" in row["nodes"])
    assert logits["flop"] == 2 * 256 * 64
    assert "node.logits" in out


def test_profile_of_a_device_that_does_not_run(bench: Bench, tiny_model: Path) -> None:
    status, _, err = bench("model", tiny_model, *QUICK, "--targets", "cpu@local-sink", "--profile", "--quiet")
    assert status == 2
    assert err.count("\n") == 1


def test_forced_strategy_that_is_unknown(bench: Bench, tiny_model: Path) -> None:
    status, _, err = bench("model", tiny_model, *QUICK, "--strategies", "fastest", "--quiet")
    assert status == 2
    assert "nothing of linattn could be measured; cpu:fastest: " in err
    assert "unknown strategy" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.onnx"], "nowhere.onnx: no such file"),
        ([__file__], "not a model, expected a .onnx or a .vmfb file, or a bundle"),
        (
            ["{compiled}", "--prefill", "20"],
            "context too short, got 16, expected 148 tokens; compile with --max-context",
        ),
        (["{compiled}", "--peers", "vllm"], "--peers: unknown name, got 'vllm', expected onnxruntime"),
        (["{compiled}", "--decode", "0"], "--decode: not a positive number, got 0"),
        (["{compiled}", "--json", "nowhere/x.json"], "nowhere/x.json: no such folder; create it first"),
    ],
)
def test_errors(bench: Bench, compiled: Path, arguments: list[str], message: str) -> None:
    status, out, err = bench("model", *(argument.format(compiled=compiled) for argument in arguments))
    assert status == 2
    assert out == ""
    assert message in err
    assert err.startswith("linattn-bench: error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "softmax"], "--op: unknown operator, got 'softmax', expected linear_attention | causal_conv"),
        (["--rule", "best"], "--rule: unknown rule"),
        (["--dtype", "f64"], "--dtype: unknown dtype, got 'f64', expected f32 | f16 | bf16"),
        (["--targets", "npu"], "--targets: unknown target, got 'npu', expected cpu | cuda | vulkan"),
        (["--targets", "cpu,cpu"], "--targets: given twice, got cpu"),
        (["--tokens", "1,x"], "--tokens: not a positive number, got 'x'"),
        (["--strategies", "fastest"], "--strategies: unknown name, got 'fastest', expected default | "),
        (["--peers", "vllm"], "--peers: unknown name, got 'vllm', expected onnxruntime | onnxruntime-std | fla"),
        (["--domain", "org.other"], "--domain: unknown domain"),
        (["--rounds", "0"], "--rounds: not a positive number, got 0"),
        (["--plot", "x.bmp"], "--plot: unknown kind of picture, got x.bmp, expected .png | .svg | .pdf"),
    ],
)
def test_op_errors(bench: Bench, arguments: list[str], message: str) -> None:
    status, out, err = bench("op", *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_debug_shows_where(bench: Bench) -> None:
    status, _, err = bench("op", "--rounds", "0", "--debug")
    assert status == 2
    assert "Traceback" in err


def test_missing_package_is_one_line(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = bench("op", "--plot", "x.png")
    assert status == 2
    assert 'matplotlib: not installed; pip install "matplotlib>=' in err
