"""linattn-bench model: the JSON, compiled modules, errors."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from linattn.runtime.bench import model_rows
from linattn.runtime.bench.charts import Bar, bar_chart
from linattn.runtime.bench.cli import main
from linattn.runtime.bench.export import to_csv, to_markdown
from linattn.runtime.bench.model_runners import IreeModel
from linattn.runtime.loading import read_manifest
from linattn.runtime.module import Module

MODELS = Path(__file__).parents[3] / "shared" / "models"
Bench = Callable[..., tuple[int, str, str]]
QUICK = ("--prefill", "5", "--decode", "3", "--repeats", "2", "--no-ceilings")
LENGTHS = ("--prefill", "5,3", *QUICK[2:])


@pytest.fixture(scope="module")
def compiled(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from linattn.frontend import CompileOptions, compile_model

    path = tmp_path_factory.mktemp("model") / "compiled.vmfb"
    compile_model(tiny_model, CompileOptions(max_context=16, prefill_blocks=()), output=path)
    return path


@pytest.fixture(scope="module")
def result(tiny_model: Path, compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("json") / "m.json"
    options = [*LENGTHS, "--warmup", "2", "--quiet", "--json", str(file)]
    assert main(["model", str(tiny_model), str(compiled), *options]) == 0
    return json.loads(file.read_text())


def test_json(result: dict[str, Any]) -> None:
    assert (result["format"], result["kind"]) == (2, "model")
    subjects = ["tiny:cpu:default", "tiny:onnxruntime", "compiled"]
    assert [(row["subject"], row["prompt"]) for row in result["rows"]] == [(s, n) for n in (3, 5) for s in subjects]
    assert result["order"] == subjects * 4
    assert result["method"]["prefill"] == [3, 5]
    assert len(result["models"]) == 1
    for row in result["rows"]:
        assert row["prefill"]["tokens_per_s"] > 0
        assert row["decode"]["tokens_per_s"] > 0
        assert row["decode"]["step"]["n"] == 6
        assert (row["overhead"] is None) == (row["kind"] != "linattn")
        assert row["overhead"] is None or 0 < row["overhead"]["median"] < row["decode"]["step"]["max"]
        assert (row["bare_overhead"] is not None) == (row["kind"] == "linattn")  # its steps are packed
        assert row["bare_overhead"] is None or 0 < row["bare_overhead"]["median"] < row["overhead"]["max"]
        assert (row["generate_overhead"] is not None) == (row["subject"] == "tiny:cpu:default")  # it chooses tokens
        assert row["first_token_s"]["n"] == 2
        assert row["decode"]["tokens_per_s"] == pytest.approx(1 / row["decode"]["step"]["median"])
        assert row["decode"]["step"]["median"] <= row["decode"]["step"]["p95"] <= row["decode"]["step"]["max"]
        assert row["decode"]["step"]["deviation"] >= 0
        assert row["warmup"] == {"prompts": 2, "steps": 6}
        assert {"threads", "cores_used", "cores_of_others", "spoiled"} == set(row["load"])
        assert row["load_s"] > 0
        assert row["memory_bytes"]["peak"] >= row["memory_bytes"]["loaded"] > 0
        if row["kind"] == "linattn":
            assert (row["status"], row["reference"]) == ("ok", "tiny:onnxruntime")
            assert 0 < row["error"]["logits"] < 1e-5
            assert row["error"]["positions"] == 4
            assert row["greedy"] == {"equal": 4, "of": 4, "margin": None, "ok": True}
            assert row["weights"] == (None if row["subject"] == "compiled" else "float32")
            assert row["error"]["noise"] is None  # nothing is rounded
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
    assert [row["subject"] for row in result["rows"]] == ["cpu", "cpu-generic"]
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


def test_a_module_has_no_gguf(bench: Bench, compiled: Path) -> None:
    status, out, _ = bench("model", compiled, *QUICK, "--quiet", "--peers", "llama.cpp")
    assert status == 0
    assert "it runs the .gguf beside an .onnx file, and none was given" in out


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
    other.write_text(json.dumps(result | {"method": result["method"] | {"prefill": [6]}}))
    status, _, err = bench("plot", one, other, "-o", tmp_path / "both.png")
    assert status == 2
    assert "results of different lengths" in err
    other.write_text("[]")
    status, _, err = bench("plot", other, "-o", tmp_path / "both.png")
    assert status == 2
    assert "not a result of linattn-bench" in err


def test_wrong_logits_are_flagged(bench: Bench, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_rows, "LOGIT_LIMITS", dict.fromkeys(model_rows.LOGIT_LIMITS, 0.0))
    arguments = (*QUICK, "--repeats", "1")
    status, out, _ = bench("model", tiny_model, *arguments)
    assert status == 1
    assert "WRONG" in out


class FakeSubject:
    """ONNX Runtime, which finds another token likelier by a margin."""

    def __init__(self, margin: float) -> None:
        self._margin = margin

    def call(self, method: str, **arguments: Any) -> Any:
        assert (arguments["tokens"], arguments["one"], arguments["other"]) == ([7], 8, 9)
        return {"margin": self._margin}[method]


@pytest.mark.parametrize(
    ("off", "exact", "margin", "status"),
    [
        (1e-4, None, 1e-4, "ok"),  # a tie that rounding decides
        (1e-4, None, 0.5, "wrong"),  # right logits where they were compared, another token all the same
        (5e-2, None, 1e-4, "wrong"),
        (5e-2, 4e-2, 1e-4, "ok"),  # ONNX Runtime's own rounding is as large
        (5e-2, 1e-2, 1e-4, "wrong"),  # more than that noise
    ],
)
def test_what_is_wrong(compiled: Path, off: float, exact: float | None, margin: float, status: str) -> None:
    """A quantised model is held against how far ONNX Runtime is from itself, not against a guess."""
    manifest = read_manifest(Module(compiled))
    logits = np.ones((2, 4), np.float32)
    ours, theirs = (model_rows.Entrant(name, "", "cpu", manifest, compiled) for name in ("ours", "theirs"))
    ours.logits, theirs.logits = {3: logits * (1 + off)}, {3: logits}
    theirs.exact = {} if exact is None else {3: logits / (1 + exact)}
    ours.repeats, theirs.repeats = {3: [{"tokens": [7, 9]}]}, {3: [{"tokens": [7, 8]}]}
    theirs.subject = FakeSubject(margin)  # type: ignore[assignment]
    judged = model_rows._judged(ours, theirs, [1, 2, 3])
    assert judged["status"] == status
    assert judged["error"]["noise"] == (None if exact is None else pytest.approx(exact))


def test_noise_of_a_quantised_model(bench: Bench, tmp_path: Path) -> None:
    """It is measured where the model lets products round, with the model's own weights."""
    model = MODELS / "genai-int4-cpu" / "model.onnx"
    status, out, err = bench("model", model, *QUICK, "--repeats", "1", "--json", tmp_path / "q.json")
    assert status == 0, err
    row = json.loads((tmp_path / "q.json").read_text())["rows"][0]
    assert row["weights"] == "int4"
    assert 1e-3 < row["error"]["noise"] < 0.2
    assert row["error"]["limit"] == pytest.approx(2 * row["error"]["noise"])
    assert "onnxruntime without rounded activations differs from it" in out


def test_report(result: dict[str, Any], bench: Bench, tmp_path: Path) -> None:
    """One page with nothing outside it; names are text, whatever is in them."""
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    names = [{"name": "<b>tiny", "sha256": result["models"][0]["sha256"]}]
    busy = {"threads": 2, "cores_used": 2.0, "cores_of_others": 1.5, "spoiled": True}
    rows = [row | {"load": busy} for row in result["rows"]]
    rows[0] |= {"status": "wrong"}
    devices = {"cpu": result["devices"]["cpu"] | {"software": True, "name": "llvmpipe"}}
    one.write_text(json.dumps(result))
    other.write_text(json.dumps(result | {"models": names, "rows": rows, "devices": devices}))
    assert bench("report", one, other, "-o", tmp_path / "r.html") == (0, "", "")
    page = (tmp_path / "r.html").read_text()
    for text in ("Prompt of 3 tokens", "Prompt of 5 tokens", "SPOILED (6 of 6 rows", "no GPU", " WRONG</text>"):
        assert text in page
    assert ("<b>tiny" in page, "&lt;b&gt;tiny" in page) == (False, True)
    assert not re.search(r"(src|href)=|@import|url\(", page)
    assert len(re.findall("<svg", page)) == len(re.findall("</svg>", page)) == 3
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        ElementTree.fromstring(svg)
    other.write_text(json.dumps(result | {"format": 1}))
    status, _, err = bench("report", one, other, "-o", tmp_path / "r.html")
    assert (status, err.count("\n")) == (2, 1)
    assert "a result of another version, got 1, expected 2; measure again" in err


def test_bars_begin_at_zero_or_are_points() -> None:
    near, far = (bar_chart([Bar("a", 10, "10", "ours"), Bar("b", value, "", "peer")], "s") for value in (20, 2000))
    widths = [float(width) for width in re.findall(r'<rect[^>]* width="([\d.]+)"', near)]
    assert widths[1] == pytest.approx(2 * widths[0], rel=1e-2)
    assert ("<rect" in far, far.count("<circle"), "log axis" in far) == (False, 2, True)
    ticks = re.findall(r'class="tick"( style="text-anchor: start")? x="([\d.]+)"', far)
    assert [bool(start) for start, _ in ticks] == [float(x) < 20 for _, x in ticks], "the first would be cut off"


def test_markdown_and_csv(result: dict[str, Any], tmp_path: Path) -> None:
    lines = to_markdown(result).splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == 2 + len(result["rows"])
    assert len({line.count("|") for line in lines if line.startswith("| ")}) == 1
    assert lines[-1].startswith("`linattn-bench ")
    rows = list(csv.DictReader(io.StringIO(to_csv(result))))
    assert [float(row["decode.step.p95"]) for row in rows] == [r["decode"]["step"]["p95"] for r in result["rows"]]
    assert {"warmup.steps", "load.threads", "load.cores_of_others", "decode.step.deviation"} <= set(rows[0])


def test_json_on_standard_output(
    result: dict[str, Any], bench: Bench, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("linattn.runtime.bench.cli.run_model", lambda *_: dict(result))
    status, out, _ = bench("model", tiny_model, "--json", "-")
    assert (status, json.loads(out)["rows"]) == (0, result["rows"])
    status, out, _ = bench("model", tiny_model, "--csv", "-")
    assert out.startswith("subject,")
    status, _, err = bench("model", tiny_model, "--csv", "-", "--json", "-")
    assert (status, err) == (2, "linattn-bench: error: standard output takes one of them, got --json, --csv\n")


def test_module_without_a_peer(bench: Bench, compiled: Path) -> None:
    status, out, err = bench("model", compiled, *QUICK)
    assert status == 0
    assert "absent    onnxruntime: it runs .onnx files" in out
    assert "linattn-bench: repeat 2 of 2" in err


def test_profile_of_joined_dispatches(bench: Bench, compiled: Path, tmp_path: Path) -> None:
    """Such a dispatch has one time for all its kernels; which these are is told, and the unit that all products use."""
    file = tmp_path / "p.json"
    status, out, _ = bench("model", compiled, *QUICK, "--profile", "--json", file)
    assert status == 0
    (profile,) = json.loads(file.read_text())["rows"]
    joined = [row for row in profile["rows"] if row["kernels"]]
    assert sum("linear_attention" in kernel for row in joined for kernel in row["kernels"]) == 2
    products = [row for row in joined if any("mat_mul" in kernel for kernel in row["kernels"])]
    assert products
    assert all(re.fullmatch(r"f32, \d+ bits", row["unit"]) for row in products)
    assert products[0]["unit"] in out


def test_profile(bench: Bench, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a module in which every kernel is a dispatch."""
    from linattn.frontend import CompileOptions
    from linattn.frontend.compile import compile_model
    from linattn.frontend.lower import iree

    monkeypatch.setattr(iree, "join_dispatches", lambda *_: {})
    compiled = tmp_path / "apart.vmfb"
    compile_model(tiny_model, CompileOptions(max_context=16, prefill_blocks=()), output=compiled)
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
    assert re.fullmatch(r"f32, \d+ bits", logits["unit"])
    assert (fused["unit"], fused["flop"], fused["unit_share"]) == (logits["unit"], None, None)
    assert logits["unit_share"] is None  # --no-ceilings
    assert "node.logits" in out
    assert logits["unit"] in out


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
