"""A small hybrid that the tests build themselves: the same as ONNX Runtime, however a prompt is cut."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import onnxruntime
import pytest
from linattn.frontend import CompileOptions
from linattn.frontend.compile import compile_model  # in this process, where a limit can be patched
from linattn.frontend.graph import last_position
from linattn.runtime import Program, Session
from linattn.runtime.binding import Sizes
from linattn.runtime.collect import Collector
from linattn.runtime.feeds import block_inputs, complete_inputs
from linattn.runtime.held import zeros
from linattn.runtime.state import read_state

from samples.tiny_hybrid import build
from tests.tolerances import BENIGN, MODEL_LOGITS, error

IDS = np.random.default_rng(0).integers(0, 256, (2, 40))


@cache
def program(target: str, batch: int | None = 2, blocks: tuple[int, ...] | None = (16, 4)) -> Program:
    context = None if blocks is None else 48
    options = CompileOptions(target=target, batch=batch, max_context=context, prefill_blocks=blocks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(last_position, "LEAST_BYTES", 1)  # this model's last product is small
        return Program.load(compile_model(build(), options).module)


@cache
def reference() -> dict[str, np.ndarray]:
    """Logits and present states of all of IDS from empty states, by ONNX Runtime."""
    session = onnxruntime.InferenceSession(build().SerializeToString(), providers=["CPUExecutionProvider"])
    batch, tokens = IDS.shape
    sizes = {"batch": batch, "past": 0}
    positions = np.tile(np.arange(tokens), (batch, 1))
    feeds = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "position_ids": positions}
    for value in session.get_inputs():
        if value.name not in feeds:
            feeds[value.name] = np.zeros([sizes.get(d, d) for d in value.shape], np.float32)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def check_states(session: Session) -> None:
    for name, state in session.states.numpy().items():
        assert error(state, reference()[name.replace("past", "present")]) < BENIGN["float32"], name


def run(session: Session, cuts: list[int]) -> np.ndarray:
    """Logits of IDS, handed over in pieces."""
    edges = np.cumsum([0, *cuts])
    assert edges[-1] == IDS.shape[1]
    pieces = [session.run({"input_ids": IDS[:, a:b]})["logits"] for a, b in itertools.pairwise(edges)]
    return np.concatenate(pieces, 1)


@pytest.mark.parametrize("target", ["cpu", pytest.param("vulkan", marks=pytest.mark.vulkan)])
@pytest.mark.parametrize("cuts", [[40], [1] * 40, [17, 1, 22], [3, 37]], ids=["whole", "decode", "pieces", "odd"])
def test_any_cut_is_the_whole(target: str, cuts: list[int]) -> None:
    session = program(target).session()
    assert error(run(session, cuts), reference()["logits"]) < BENIGN["float32"]
    check_states(session)


@pytest.mark.parametrize("strategy", ["recurrent", "chunked"])
def test_portable_strategies_by_force(strategy: str) -> None:
    options = CompileOptions(batch=2, max_context=48, prefill_blocks=(16,), strategy=strategy)
    session = Program.load(compile_model(build(), options).module).session()
    assert error(run(session, [33, 7]), reference()["logits"]) < BENIGN["float32"]
    check_states(session)


@pytest.mark.parametrize("target", ["cpu", pytest.param("vulkan", marks=pytest.mark.vulkan)])
@pytest.mark.parametrize("tokens", [16, 23, 40])
def test_last_logits_without_the_others(target: str, tokens: int) -> None:
    loaded = program(target)
    assert [(e.symbol, e.last) for e in loaded.manifest.entry_points] == [
        ("decode", None),
        ("prefill_16", "prefill_16_last"),
        ("prefill_4", None),
    ]
    session = loaded.session()
    last = session.run({"input_ids": IDS[:, :tokens]}, logits="last")["logits"]
    assert error(last, reference()["logits"][:, tokens - 1 : tokens]) < BENIGN["float32"]
    rest = session.run({"input_ids": IDS[:, tokens:]})["logits"]
    assert error(rest, reference()["logits"][:, tokens:]) < BENIGN["float32"]
    check_states(session)


def test_open_dims() -> None:
    session = program("cpu", None, None).session()
    assert error(run(session, [23, 1, 16]), reference()["logits"]) < BENIGN["float32"]
    check_states(session)


def test_open_batch() -> None:
    session = program("cpu", None).session()
    assert error(run(session, [23, 1, 16]), reference()["logits"]) < BENIGN["float32"]
    check_states(session)


def test_a_used_session_starts_over_as_a_fresh_one() -> None:
    session = program("cpu").session()
    first = run(session, [40])
    session.reset()
    assert np.array_equal(run(session, [40]), first)


@pytest.mark.parametrize("target", ["cpu", pytest.param("vulkan", marks=pytest.mark.vulkan)])
def test_a_call_that_fails_leaves_every_state(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions alternate between two sets of states; the committed one is not written to, whichever it is."""
    session, done = program(target).session(), 0
    take = Collector.take
    for tokens in (4, 1, 4, 16, 1):
        session.run({"input_ids": IDS[:, done : done + tokens]})
        done += tokens
        before, left = session.states.numpy(), iter([None, None])  # the third block of a call fails when it is over

        def fail(*arguments: object, left: object = left) -> None:
            take(*arguments)  # type: ignore[arg-type]
            if next(left, "none") == "none":  # type: ignore[call-overload]
                raise RuntimeError("after the call")

        with monkeypatch.context() as patch:
            patch.setattr(Collector, "take", fail)
            with pytest.raises(RuntimeError, match="after the call"):
                session.run({"input_ids": IDS[:, done : done + 9]})
        assert session.position == done
        for name, state in session.states.numpy().items():
            np.testing.assert_array_equal(state, before[name], name)
    assert (
        error(session.run({"input_ids": IDS[:, done:]})["logits"], reference()["logits"][:, done:]) < BENIGN["float32"]
    )
    check_states(session)


@pytest.mark.parametrize("target", ["cpu", pytest.param("vulkan", marks=pytest.mark.vulkan)])
@pytest.mark.parametrize("position", [48, 10**9, -5])
def test_a_position_that_no_row_has_writes_the_last_rows(target: str, position: int) -> None:
    """Only a caller of the module without a session can give one; it wrote over the heap."""
    loaded = program(target)
    for entry in (entry for entry in loaded.manifest.entry_points if entry.tokens != 16):
        tokens = entry.tokens or 0
        sizes = Sizes(loaded.manifest, batch=2, tokens=tokens, past=0, total=tokens)
        feeds = complete_inputs(loaded.manifest, {"input_ids": IDS[:, :tokens]}, sizes, 2, 0, tokens)
        states = zeros(loaded.manifest, loaded._engine.pool, 2).arrays(loaded.manifest)
        _, states = loaded._engine.call(entry, block_inputs(loaded.manifest, feeds, 0, 0, tokens), states, position)
        for spec, state in zip(loaded.manifest.states, states, strict=True):
            if spec.kind == "kv_cache":
                rows = np.abs(read_state(loaded.manifest, loaded.device, spec, state, 48)).sum((0, 1, 3))
                assert np.flatnonzero(rows).tolist() == list(range(48 - tokens, 48))


def test_stateless_run_continues_from_given_states() -> None:
    """ONNX in, ONNX out: the states of the first call are the inputs of the second."""
    first = program("cpu").run({"input_ids": IDS[:, :16]})
    past = {name.replace("present", "past"): value for name, value in first.items() if name != "logits"}
    second = program("cpu").run({"input_ids": IDS[:, 16:20], **past})
    assert error(second["logits"], reference()["logits"][:, 16:20]) < BENIGN["float32"]
    assert second["present.1.key"].shape == (2, 2, 20, 32)


def test_half_precision_is_near() -> None:
    options = CompileOptions(batch=2, max_context=48, prefill_blocks=(16, 4))
    half = Program.load(compile_model(build("f16"), options).module).session()
    assert error(run(half, [40]), reference()["logits"]) < MODEL_LOGITS["f16"]
