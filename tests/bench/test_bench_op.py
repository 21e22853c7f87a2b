"""linattn-bench op: the JSON, the error column, absences, turns, processes. Times are never asserted."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import onnx
import pytest
from linattn.frontend import CompileOptions, compile_model
from linattn.runtime.bench import cases, fla_runner
from linattn.runtime.bench.cases import AttentionCase, ConvCase, judge, relative_error
from linattn.runtime.bench.device_times import per_call, tells_times
from linattn.runtime.bench.load import Watch
from linattn.runtime.bench.op_models import COPY, build_copy, build_op, chain_feeds
from linattn.runtime.bench.op_rows import kernel_time
from linattn.runtime.bench.process import Subject, SubjectError
from linattn.runtime.bench.timing import summarize
from linattn.runtime.errors import TargetError

Bench = Callable[..., tuple[int, str, str]]
QUICK = ("--seconds", "0.02", "--rounds", "2", "--warmup", "1", "--no-ceilings")
SMALL = ("op", "--heads", "2", "--dim", "32", *QUICK)


def check_stats(stats: Mapping[str, float]) -> None:
    order = [stats[key] for key in ("min", "median", "p90", "p95", "p99", "max")]
    assert stats["n"] >= 1
    assert order == sorted(order)
    assert order[0] > 0


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two token counts, two strategies, two peers and one that is not there, with a picture."""
    from linattn.runtime.bench.cli import main

    folder = tmp_path_factory.mktemp("op")
    arguments = [
        *SMALL,
        "--tokens",
        "1,5",
        "--strategies",
        "default,recurrent",
        "--peers",
        "onnxruntime,onnxruntime-std",
    ]
    assert main([*arguments, "--quiet", "--json", str(folder / "o.json")]) == 0
    return json.loads((folder / "o.json").read_text())


def test_json(result: dict[str, Any]) -> None:
    assert (result["format"], result["kind"]) == (2, "op")
    assert {"cpu", "cores", "system", "load_average"} <= set(result["machine"])
    assert {"python", "iree-base-runtime", "iree-base-compiler", "onnxruntime"} <= set(result["versions"])
    assert {"uri", "name", "driver", "driver_version"} <= set(result["devices"]["cpu"])
    assert result["case"]["rule"] == "gated_delta"
    assert all(len(model["sha256"]) == 64 for model in result["models"])
    assert [(row["subject"], row["tokens"]) for row in result["rows"]] == [
        (subject, tokens)
        for tokens in (1, 5)
        for subject in ("cpu:default", "cpu:recurrent", "onnxruntime", "onnxruntime-std")
    ]
    for row in result["rows"]:
        check_stats(row["call"])
        check_stats(row["overhead"])
        assert row["load"]["warmup"] >= 2  # one a round
        assert row["kernel"]["method"].startswith("device clock" if row["kind"] == "linattn" else "call - overhead")
        assert row["kind"] != "linattn" or row["kernel"]["seconds"] > 0
        assert row["bytes_per_s"] > 0
        assert row["flop_per_s"] > 0
        assert row["status"] == "ok"
        assert 0 < row["error"]["output"] < row["error"]["limit"]
        assert 0 < row["error"]["state"] < row["error"]["limit"]
    ours = [row for row in result["rows"] if row["kind"] == "linattn"]
    assert all(row["peer"] == "onnxruntime" and row["speedup"] > 0 for row in ours)
    assert all(row["strategy"] == "recurrent" for row in ours if row["subject"] == "cpu:recurrent")
    assert [row["speedup"] for row in result["rows"] if row["subject"] == "onnxruntime"] == [None, None]


def test_subjects_take_turns(result: dict[str, Any]) -> None:
    """A B C D A B C D, for each case: drifts of the machine hit all alike."""
    assert result["order"] == ["cpu:default", "cpu:recurrent", "onnxruntime", "onnxruntime-std"] * 4


def test_plot(result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from linattn.runtime.bench.plot import draw

    for peers in (True, False):
        rows = [dict(row) for row in result["rows"] if peers or row["kind"] == "linattn"]
        if not peers:
            rows = [row | {"speedup": None, "peer": None} for row in rows]
            rows[0]["status"] = "wrong"
        draw([result | {"rows": rows}], tmp_path / f"{peers}.png")
        assert (tmp_path / f"{peers}.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_result_is_flagged(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Against an answer that is off by a per mille, every row is wrong, has no speed, and the exit status says so."""
    right = ConvCase.reference

    def off(self: ConvCase, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: array * 1.001 for name, array in right(self, inputs).items()}

    monkeypatch.setattr(ConvCase, "reference", off)
    file = tmp_path / "o.json"
    status, out, _ = bench("op", "--op", "causal_conv", "--channels", "8", "--tokens", "3", *QUICK, "--json", file)
    rows = json.loads(file.read_text())["rows"]
    assert status == 1
    assert out.count("WRONG") == len(rows) + 1
    for row in rows:
        assert row["status"] == "wrong"
        assert row["error"]["output"] == pytest.approx(1e-3, rel=0.1)
        assert row["speedup"] is None


def test_absent_are_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not there is named with its reason, and the rest is measured."""
    monkeypatch.setattr(fla_runner.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("linattn.runtime.bench.subjects.missing_device", lambda t: "no driver" if t == "cuda" else None)
    status, out, _ = bench(
        "op", "--op", "causal_conv", "--channels", "8", "--tokens", "2", "--dtype", "bf16", *QUICK,
        "--targets", "cpu,cuda", "--peers", "onnxruntime,fla",
    )  # fmt: skip
    assert status == 0
    assert "absent    cuda: no driver" in out
    assert "absent    fla: torch is not installed" in out
    assert "absent    onnxruntime (tokens=2, dtype=bfloat16): " in out
    assert "cpu:default" in out


@pytest.mark.parametrize(
    ("rule", "form", "by_key", "function", "decay"),
    [
        ("gated_delta", "chunk", False, "fla.ops.gated_delta_rule chunk_gated_delta_rule", "g"),
        ("gated_delta", "recurrent", True, "fla.ops.kda fused_recurrent_kda", "g"),
        ("gated", "chunk", True, "fla.ops.gla chunk_gla", "g"),
        ("gated", "recurrent", True, "fla.ops.gla fused_recurrent_gla", "gk"),
    ],
)
def test_functions_of_fla(
    rule: str, form: str, by_key: bool, function: str, decay: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are called with decays of heads [B, T, H] or of keys [B, T, H, dk], by the name they give them."""
    case = AttentionCase(3, "float32", rule=rule, heads=2, kv_heads=2, dk=8, dv=4, key_decay=by_key)
    called: dict[str, Any] = {}
    torch = MagicMock()
    torch.from_numpy = Tensor
    module = SimpleNamespace(**{function.split()[1]: lambda **given: (called.update(given), 0)})
    known = {"torch": torch, "fla": None, function.split()[0]: module}
    monkeypatch.setattr(fla_runner, "need", lambda name, package: known[name])
    fla_runner.FlaRunner(form).prepare("call", "", case.inputs(), case.attributes)
    assert called[decay].array.shape == ((1, 3, 2, 8) if by_key else (1, 3, 2))
    assert called["k"].array.shape == (1, 3, 2, 8)


class Tensor:
    """What the runner needs of PyTorch's."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape = array, array.shape

    def cuda(self) -> Tensor:
        return self

    def view(self, *shape: int) -> Tensor:
        return Tensor(self.array.reshape(shape))


def test_work_of_others_is_seen() -> None:
    """A process that keeps a core busy spoils what is timed beside it."""
    watch = Watch()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            with watch.watching():
                time.sleep(0.3)
                sum(range(1_000_000))
        finally:
            other.kill()
    seen = watch.summary()
    assert seen["cores_of_others"] > 0.3
    assert seen["spoiled"] is True
    short = Watch()
    with short.watching():
        pass
    assert short.summary()["spoiled"] is None


@pytest.mark.vulkan
def test_a_driver_in_software_is_no_gpu(bench: Bench, tmp_path: Path) -> None:
    """And its kernels' times are by its own clock."""
    arguments = ("--heads", "1", "--dim", "8", "--tokens", "2", "--targets", "vulkan", "--strategies", "recurrent")
    status, out, _ = bench("op", *arguments, *QUICK, "--peers", "none", "--json", tmp_path / "o.json")
    assert status == 0
    result = json.loads((tmp_path / "o.json").read_text())
    device, (row,) = result["devices"]["vulkan"], result["rows"]
    assert device["software"] == ("llvmpipe" in device["name"])
    assert ("is a driver in software and no GPU" in out) == device["software"]
    assert ("vulkan:recurrent (on the CPU)" in out) == device["software"]
    assert row["kernel"]["method"] == "device clock, median"
    assert row["kernel"]["seconds"] > 0


def test_nothing_measured(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linattn.runtime.bench.subjects.missing_device", lambda target: "no driver")
    status, _, err = bench(*SMALL, "--tokens", "2", "--targets", "cuda", "--peers", "none", "--quiet")
    assert status == 2
    assert err == "linattn-bench: error: nothing of linattn could be measured; cuda: no driver\n"


def test_kernel_time_from_a_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody tells the times, as on CUDA without PyTorch; a difference that is not positive is no time."""
    samples: dict[str, list[float]] = {"call": [3.0, 2.0], "overhead": [1.0], "chain": [8.0, 9.0], "kernel": []}
    assert kernel_time("linattn", samples, 4)["seconds"] == 2.0
    assert kernel_time("linattn", samples | {"chain": [1.0]}, 4)["seconds"] is None
    monkeypatch.setattr(fla_runner.importlib.util, "find_spec", lambda name: None)
    assert not tells_times("cuda")


def test_a_recording_must_be_whole() -> None:
    event = {"type": "dispatch_event", "valid": True}
    rows = [event | {"event_id": i, "duration_ns": ns} for i, ns in ((3, 40), (1, 10), (2, 20), (4, 80))]
    text = "\n".join(map(json.dumps, [*rows, {"type": "dispatch_summary"}]))
    assert per_call(text, 2) == pytest.approx([30e-9, 120e-9])
    for broken in (text.replace("true", "false", 1), text.partition("\n")[2], ""):
        with pytest.raises(TargetError, match="the recording is not complete"):
            per_call(broken, 2)


def test_processes() -> None:
    """A subject lives in a process of its own; its errors are one line, its death is noticed."""
    first, second = (Subject(name, f"{__name__}:Fake", {}) for name in ("first", "second"))
    try:
        assert len({first.call("pid"), second.call("pid"), os.getpid()}) == 3
        assert first.call("pid") == first.pid
        with pytest.raises(SubjectError, match=r"^ValueError: no such thing$"):
            first.call("fail")
        assert first.call("pid") == first.pid
        with pytest.raises(SubjectError, match=r"second: its process died, got status 3 in 'die'; it said: last words"):
            second.call("die")
    finally:
        first.close()
        second.close()


class Fake:
    """A runner that can fail and die."""

    def pid(self) -> int:
        return os.getpid()

    def fail(self) -> None:
        raise ValueError("no such\nthing")

    def die(self) -> None:
        os.write(2, b"last words\n")
        os._exit(3)


@pytest.mark.parametrize("rule", cases.RULES)
def test_costs_are_those_of_the_arrays(rule: str) -> None:
    """Least bytes: each array once, and the state again on its way out; FLOP as NUMERICS section 6 has them."""
    case = AttentionCase(7, "float16", rule=rule, heads=4, kv_heads=2, dk=8, dv=16)
    inputs = case.inputs()
    outputs = case.reference(inputs)
    moved = sum(array.nbytes for array in inputs.values()) + inputs["past_state"].nbytes + outputs["output"].size * 2
    assert case.bytes == moved
    square = AttentionCase(1, "float32", rule=rule, heads=1, kv_heads=1, dk=8, dv=8)
    assert square.flop == {"linear": 2, "gated": 3, "delta": 3, "gated_delta": 4}[rule] * 2 * 64


def test_conv_costs() -> None:
    case = ConvCase(5, "bfloat16", channels=3, taps=4)
    inputs = case.inputs()
    assert case.bytes == sum(array.nbytes for array in inputs.values()) + (inputs["past_state"].size + 15) * 2
    assert case.flop == 2 * 5 * 3 * 4


def test_errors_that_are_no_numbers() -> None:
    exact = np.ones((2, 2))
    assert relative_error(np.full((2, 2), np.nan), exact) == float("inf")
    assert relative_error(np.ones((2, 3)), exact) == float("inf")
    assert relative_error(np.zeros((2, 2)), np.zeros((2, 2))) == 0
    case = ConvCase(2, "float32", channels=1)
    verdict = judge(case, {"output": exact * np.inf, "present_state": exact}, dict.fromkeys(case.outputs, exact))
    assert not verdict["ok"]


def test_chain_waits_for_the_node_before() -> None:
    """Every node of a chain has its own state and takes the output of the one before."""
    import onnx

    case = AttentionCase(3, "float32", heads=4, kv_heads=2, dk=8, dv=8)
    inputs = case.inputs()
    model = onnx.load_model_from_string(build_op(case, inputs, "com.microsoft", 3))
    assert [node.input[0] for node in model.graph.node] == ["query", "output_0", "output_1"]
    assert {value.name for value in model.graph.input} == set(chain_feeds(inputs, 3))


def test_statistics() -> None:
    stats = summarize([float(value) for value in range(1, 101)])
    assert stats.pop("deviation") == pytest.approx(math.sqrt((100**2 - 1) / 12))
    assert stats == {"n": 100, "min": 1, "mean": 50.5, "median": 50.5, "p90": 90, "p95": 95, "p99": 99, "max": 100}


@pytest.mark.parametrize("size", COPY)
def test_the_copy_behind_a_ceiling_compiles_for_every_vulkan_device(size: int) -> None:
    compile_model(onnx.ModelProto.FromString(build_copy(size)), CompileOptions(target="vulkan"))
