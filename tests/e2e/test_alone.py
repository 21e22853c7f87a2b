"""Small calls are the calling thread's own, beside workers for the others: which, and that nothing shows it."""

from __future__ import annotations

import dataclasses
import json
import threading
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
from linattn.frontend import CompileOptions, compile_model
from linattn.frontend.lower.alone import ANY_POSITION, KERNEL_US, positions_alone, with_alone
from linattn.frontend.options import CompiledModel
from linattn.runtime import Program
from linattn.runtime.bench.cases import AttentionCase
from linattn.runtime.bench.op_models import MICROSOFT, build_op
from linattn.runtime.engine import engine_of
from linattn.runtime.manifest import DISPATCHES_KEY, Manifest
from linattn.runtime.module import Module

from samples.tiny_hybrid import build
from tests.tolerances import BENIGN, error

CONTEXT, BLOCK = 192, 128
IDS = np.random.default_rng(9).integers(0, 256, (1, CONTEXT))


@cache
def compiled() -> CompiledModel:
    return compile_model(build(), CompileOptions(max_context=CONTEXT, prefill_blocks=(BLOCK,)))


def module() -> bytes:
    return compiled().module


@cache
def program(device: str | None = None) -> Program:
    return Program.load(module(), device)


class Counted:
    """A context that counts its calls."""

    def __init__(self, context: Any) -> None:
        self._context, self.calls = context, 0

    def invoke(self, *arguments: Any) -> None:
        self.calls += 1
        self._context.invoke(*arguments)


def count(monkeypatch: pytest.MonkeyPatch, loaded: Program) -> tuple[Counted, Counted]:
    """Of the calls by workers and by the calling thread."""
    found = engine_of(loaded).module
    contexts = Counted(found._context), Counted(found._alone)
    monkeypatch.setattr(found, "_context", contexts[0])
    monkeypatch.setattr(found, "_alone", contexts[1])
    return contexts


def play(loaded: Program) -> list[np.ndarray]:
    """Outputs and states of a life with blocks and steps, forks, rollbacks, rows and files of memory in between."""
    session = loaded.session(window=3)
    found = [session.run({"input_ids": IDS[:, : BLOCK + 2]})["logits"]]
    found += [session.run({"input_ids": IDS[:, at : at + 1]})["logits"] for at in range(BLOCK + 2, BLOCK + 6)]
    fork, snapshot = session.fork(), session.snapshot()
    found.append(fork.run({"input_ids": IDS[:, BLOCK + 6 : BLOCK + 11]}, logits="last")["logits"])
    session.rollback(2)
    kept = session.run({"input_ids": IDS[:, BLOCK + 4 : BLOCK + 5]}, device_outputs=True)["logits"]
    target = np.empty((1, 1, 256), np.float32)
    session.run({"input_ids": IDS[:, BLOCK + 5 : BLOCK + 6]}, into={"logits": target})
    found += [kept.numpy(), target]
    for one in (session, fork, loaded.session(snapshot)):
        found += [one.run({"input_ids": IDS[:, BLOCK + 11 : BLOCK + 12]})["logits"], *one.states.numpy().values()]
    session.reset()
    found.append(session.run({"input_ids": IDS[:, :1]})["logits"])
    return found


def test_a_step_is_the_calling_threads_and_a_long_block_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the module says of itself; whoever names a device gets that alone, and all compute the same bits."""
    alone = {entry.symbol: entry.alone for entry in program().manifest.entry_points}
    assert alone["decode"] >= CONTEXT
    assert alone[f"prefill_{BLOCK}"] == 0
    assert "alone     decode: done sooner by the thread that calls" in compiled().report.to_text()
    want = play(program())
    for device in ("local-task", "local-sync"):
        assert engine_of(program(device)).module._alone is None
        assert all(np.array_equal(a, b) for a, b in zip(want, play(program(device)), strict=True))
    by_workers, by_caller = count(monkeypatch, program())
    session = program().session()
    session.run({"input_ids": IDS[:, :BLOCK]})
    assert (by_workers.calls, by_caller.calls) == (1, 0)
    for at in range(BLOCK, BLOCK + 8):
        session.run({"input_ids": IDS[:, at : at + 1]})
    program().run({"input_ids": IDS[:, :1]})
    assert (by_workers.calls, by_caller.calls) == (1, 9)


def test_a_step_goes_to_workers_where_the_context_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the position on that the module names."""
    loaded = Program.load(module(), "cpu")
    step = engine_of(loaded).step(1)
    assert step is not None
    step._alone = 20
    by_workers, by_caller = count(monkeypatch, loaded)
    session = loaded.session()
    found = [session.run({"input_ids": IDS[:, at : at + 1]})["logits"] for at in range(30)]
    assert (by_workers.calls, by_caller.calls) == (10, 20)
    np.testing.assert_array_equal(np.concatenate(found, 1)[:, -1], last(program("local-task"), 30))


def last(loaded: Program, tokens: int) -> np.ndarray:
    session = loaded.session()
    return [session.run({"input_ids": IDS[:, at : at + 1]})["logits"] for at in range(tokens)][-1][:, 0]


def test_programs_in_threads_of_their_own() -> None:
    """They share the devices; each calls when it likes."""
    want, found = last(program("local-task"), 40), dict[int, np.ndarray]()
    programs = [Program.load(module()) for _ in range(3)]

    def run(number: int) -> None:
        found[number] = last(programs[number], 40)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[number], want) for number in range(3))


@pytest.mark.parametrize(
    ("tokens", "heads", "cpu", "alone"),
    [
        (1, 16, None, ANY_POSITION),
        (1, 32, "sapphirerapids", 0),
        (1, 32, "znver4", ANY_POSITION),
        (1, 64, "znver4", 0),
        (256, 4, "znver4", 0),
    ],
)
def test_a_model_of_one_operator(tokens: int, heads: int, cpu: str | None, alone: int) -> None:
    """Which has no token ids: its inputs tell how many rows a call has."""
    case = AttentionCase(tokens, "float32", heads=heads, kv_heads=heads)
    inputs = case.inputs()
    model = onnx.load_from_string(build_op(case, inputs, MICROSOFT))
    compiled = compile_model(model, CompileOptions(cpu_features=cpu))
    assert [entry.alone for entry in compiled.manifest.entry_points] == [alone]
    if cpu is None:
        loaded = Program.load(compiled.module)
        found, want = loaded.run(inputs), case.reference(inputs)
        assert all(error(found[name], want[name]) <= BENIGN["float32"] for name in want)


def test_open_rows_are_never_few() -> None:
    """Nobody knows how large such a call is."""
    rows = [ROW]
    manifest = program().manifest
    specs = [dataclasses.replace(spec, shape=("any", 8)) for spec in manifest.inputs]
    for inputs, alone in ((specs, 0), ([dataclasses.replace(spec, shape=(2, 8)) for spec in specs], ANY_POSITION)):
        entry = dataclasses.replace(manifest.entry_points[0], kind="main", tokens=None, symbol="main")
        one = dataclasses.replace(manifest, inputs=tuple(inputs), entry_points=(entry,), states=())
        assert with_alone(one, {"main": rows}).entry_points[0].alone == alone


def test_weights_are_there_once() -> None:
    """Linked to two devices, the module takes what it takes of one."""
    assert program().memory().weights <= program("local-task").memory().weights + 4096


ROW = {"key": "kernel", "bytes": 1000, "flop": None}


@pytest.mark.parametrize(
    ("what", "rows", "tokens", "cache", "expected"),
    [
        ("nothing but waking", [ROW] * 100, 1, (0, 0), ANY_POSITION),
        ("one large kernel", [ROW | {"bytes": 50_000_000}], 1, (0, 0), 0),
        ("LinearAttention of 16 heads", [ROW | {"bytes": 2_150_000}], 1, (0, 0), ANY_POSITION),
        ("of 32", [ROW | {"bytes": 4_300_000}], 1, (0, 0), 0),
        ("many operations", [ROW | {"flop": 30_000_000}], 8, (0, 0), 0),
        ("many tokens", [ROW | {"bytes": 2_000_000}], 512, (0, 0), 0),
        ("an open size", [ROW, ROW | {"bytes": None}], 1, (0, 0), 0),
        ("any number of tokens", [ROW], None, (0, 0), 0),
        ("no kernel", [], 1, (0, 0), 0),
        ("caches, of which a token takes 5 KB", [ROW | {"bytes": 5_001_000}], 1, (5e6, 5e3), 720),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_rule(what: str, rows: Any, tokens: int | None, cache: tuple[float, float], expected: int) -> None:
    """What workers save against what waking them takes, of which `alone.py` has the measured numbers."""
    del what
    assert positions_alone(rows, tokens, *cache) == expected


def test_more_work_is_never_more_the_callers() -> None:
    """Over bytes, operations, caches and kernels."""
    for kernels in (1, 20, 500):
        for token in (0.0, 1e3):
            found = [
                positions_alone([ROW | {"bytes": size // kernels, "flop": 2 * size // kernels}] * kernels, 1, 0, token)
                for size in np.geomspace(1e4, 1e9, 30).astype(int).tolist()
            ]
            assert found == sorted(found, reverse=True)
            assert found[0] > 0 == found[-1]
    wakes = [positions_alone([ROW | {"bytes": 10_000_000 // n}] * n, 1, 0, 1e3) for n in (1, 10, 100, 1000)]
    assert wakes == sorted(wakes)
    assert wakes[0] == 0 < wakes[-1] < 1000 * KERNEL_US * 1e5


def test_any_position_is_one_that_a_manifest_takes() -> None:
    """A model without caches names it, one of tiny caches no greater one."""
    manifest = program().manifest
    entry = dataclasses.replace(manifest.entry_points[0], alone=positions_alone([ROW], 1, 0, 0))
    assert Manifest.from_json(dataclasses.replace(manifest, entry_points=(entry,)).to_json()).entry_points == (entry,)
    assert positions_alone([ROW], 1, 0, 1e-9) == entry.alone


def of_kernels(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each kernel of joined dispatches too."""
    return [kernel for row in rows for kernel in row.get("kernels", [row])]


def test_bytes_are_those_that_move() -> None:
    """Of a table the row that is looked up, of a cache the row that is written; a rule of bytes needs that."""
    found = Module(module())
    tables = (found.reflection(name).get(DISPATCHES_KEY) for name in found.functions)
    rows = of_kernels(json.loads(next(table for table in tables if table))["decode"])
    looked_up = [row["bytes"] for row in rows if row["node"].startswith("node.Gather")]
    written = [row["bytes"] for row in rows if "memcpy" in row["key"]]
    assert looked_up[0] == 64 * 4 * 2 + 8  # of 256 rows of the embedding
    assert written == [2 * 2 * 32 * 4] * 2
