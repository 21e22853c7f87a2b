from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from linattn.runtime import InputError, Program, Session, StateError, TargetError, greedy, greedy_rows
from linattn.runtime.binding import plan_blocks
from linattn.runtime.device import Move
from linattn.runtime.manifest import EntryPoint, Manifest
from needed import need_device
from tiny_hybrid import Hybrid, open_form, reference

Load = Callable[..., Program]


def some_ids(batch: int, tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 8, (batch, tokens))


def feed(session: Session, ids: np.ndarray, splits: tuple[int, ...]) -> np.ndarray:
    parts = np.split(ids, np.cumsum(splits)[:-1], 1)
    return np.concatenate([session.run({"input_ids": part})["logits"] for part in parts], 1)


def assert_states(session: Session, want: dict[str, np.ndarray]) -> None:
    got = session.states.numpy()
    assert got.keys() == want.keys()
    for name, array in got.items():
        np.testing.assert_allclose(array, want[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("splits", [(21,), (5, 1, 15), (1, 1, 1, 18), (2,) * 10 + (1,), (16, 5)])
@pytest.mark.parametrize("batch", [1, 3])
def test_any_cut_is_the_same(load: Load, batch: int, splits: tuple[int, ...]) -> None:
    session, ids = load(batch=batch).session(), some_ids(batch, 21)
    want, states = reference(ids)
    np.testing.assert_allclose(feed(session, ids, splits), want, rtol=1e-6)
    assert session.position == 21
    assert_states(session, states)


@pytest.mark.parametrize("batch", [1, 2])
def test_open_form(batch: int) -> None:
    session, ids = Program.load(open_form(Hybrid()).compile()).session(), some_ids(batch, 21)
    want, states = reference(ids)
    np.testing.assert_allclose(feed(session, ids, (6, 1, 1, 13)), want, rtol=1e-6)
    assert_states(session, states)


@pytest.mark.vulkan
def test_open_form_on_vulkan_says_what_to_do() -> None:
    """IREE refuses tensors of size zero there; this module is not by our compiler, which lets none be empty."""
    need_device("vulkan")
    session = Program.load(open_form(Hybrid("vulkan")).compile()).session()
    with pytest.raises(TargetError, match="compile it again, or with a fixed --max-context"):
        session.run({"input_ids": some_ids(1, 3)})


@pytest.mark.parametrize(
    ("blocks", "tokens", "want"),
    [
        ((1, 8, 3), 22, [8, 8, 3, 3]),
        ((1, 8, 3), 5, [3, 1, 1]),
        ((1, None), 5, [5]),
        ((1, None), 1, [1]),
        ((None,), 1, [1]),
        ((1, None, 8), 20, [20]),
        ((4,), 8, [4, 4]),
    ],
)
def test_plan(blocks: tuple[int | None, ...], tokens: int, want: list[int]) -> None:
    manifest = Hybrid(blocks=blocks).manifest()
    plan = plan_blocks(manifest, tokens)
    assert [size for _, size in plan] == want
    assert all(entry.tokens in (None, size) for entry, size in plan)
    if tokens == 1 and 1 in blocks:
        assert plan[0][0].kind == "decode"


def test_plan_without_a_tail() -> None:
    manifest = replace(Hybrid().manifest(), entry_points=(EntryPoint("main", "main", 4),))
    with pytest.raises(InputError, match="got 6, expected token counts 4"):
        plan_blocks(manifest, 6)


def test_last_logits_only(load: Load) -> None:
    program, ids = load(batch=3), some_ids(3, 14)
    want = reference(ids)[0]
    session = program.session()
    got = session.run({"input_ids": ids}, logits="last")["logits"]
    assert got.shape == (3, 1, 4)
    np.testing.assert_allclose(got, want[:, -1:], rtol=1e-6)
    with pytest.raises(InputError, match=r"all \| last"):
        session.run({"input_ids": ids}, logits="none")  # type: ignore[arg-type]


def test_no_tokens(cpu: Program) -> None:
    session = cpu.session()
    session.run({"input_ids": some_ids(1, 2)})
    before = session.states.numpy()
    assert session.run({"input_ids": np.zeros((1, 0), np.int64)})["logits"].shape == (1, 0, 4)
    assert session.position == 2
    for name, array in session.states.numpy().items():
        np.testing.assert_array_equal(array, before[name])


def test_reset(load: Load) -> None:
    """Table 2 #17: nothing of the old sequence is left, not even NaN in rows that are not committed."""
    session, ids = load().session(), some_ids(1, 9)
    device = session.program.device
    session.run({"input_ids": some_ids(1, 24, 1)})
    for index, spec in enumerate(session.program.states):  # poison every buffer
        old = session._line[-1].arrays(session.program.manifest)[index]
        poison = device.upload(np.full(old.shape, np.nan, np.float32), spec.dtype)
        device.move([Move(poison, old, ((0, 0, old.nbytes),))])
    session.reset()
    assert session.position == 0
    first = session.run({"input_ids": ids[:, :1]})["logits"]
    rest = session.run({"input_ids": ids[:, 1:]})["logits"]
    np.testing.assert_allclose(np.concatenate([first, rest], 1), reference(ids)[0], rtol=1e-6)


def test_state_is_read_anew(load: Load) -> None:
    """Table 2 #33: a copy read before a step neither changes nor is returned again after it."""
    session, ids = load().session(), some_ids(1, 4)
    session.run({"input_ids": ids[:, :3]})
    before = session.states.numpy()
    session.run({"input_ids": ids[:, 3:]})
    np.testing.assert_array_equal(before["past.0.conv"], reference(ids[:, :3])[1]["past.0.conv"])
    assert before["past.1.kv"].shape == (1, 2, 3, 4)
    assert_states(session, reference(ids)[1])
    np.testing.assert_array_equal(session.states["present.0.rec"].numpy(), session.states["past.0.rec"].numpy())


def test_sessions_are_separate(load: Load) -> None:
    program = load()
    one, two = program.session(), program.session()
    ids, other = some_ids(1, 12, 1), some_ids(1, 12, 2)
    got: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for i in range(0, 12, 4):
        got[0].append(one.run({"input_ids": ids[:, i : i + 4]})["logits"])
        got[1].append(two.run({"input_ids": other[:, i : i + 4]})["logits"])
    np.testing.assert_allclose(np.concatenate(got[0], 1), reference(ids)[0], rtol=1e-6)
    np.testing.assert_allclose(np.concatenate(got[1], 1), reference(other)[0], rtol=1e-6)


def test_threads(load: Load) -> None:
    """Table 2 #38: sessions of one program in several threads."""
    program, wrong = load(), list[object]()
    barrier = threading.Barrier(4)

    def work(seed: int) -> None:
        try:
            session = program.session()
            barrier.wait(30)
            for round_ in range(10):
                ids = some_ids(1, 20, 100 * seed + round_)
                session.reset()
                got = feed(session, ids, (9, 1, 1, 9))
                np.testing.assert_allclose(got, reference(ids)[0], rtol=1e-6)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


def test_one_session_in_two_threads_is_refused(cpu: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    session, inside, leave, errors = cpu.session(), threading.Event(), threading.Event(), list[str]()
    run = cpu._engine.module._wait_for

    def slow(*args: object) -> object:
        inside.set()
        leave.wait(30)
        return run(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(cpu._engine.module, "_wait_for", slow)
    thread = threading.Thread(target=session.run, args=({"input_ids": some_ids(1, 1)},))
    thread.start()
    assert inside.wait(30)
    for action in (lambda: session.run({"input_ids": some_ids(1, 1)}), session.reset, session.states.numpy):
        try:
            action()
        except StateError as error:
            errors.append(str(error))
    leave.set()
    thread.join(30)
    assert len(errors) == 3
    assert all("in use by another thread" in error for error in errors)
    assert session.position == 1


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("when", ["before", "after"])
def test_all_or_nothing(load: Load, monkeypatch: pytest.MonkeyPatch, failing: int, when: str) -> None:
    """Table 2 #37: a block fails (before or after it has written its KV rows); the call has not happened."""
    program, ids = load(), some_ids(1, 19)
    session = program.session()
    head = session.run({"input_ids": ids[:, :5]})["logits"]
    before, call, count = session.states.numpy(), program._engine.call, iter(range(100))

    def broken(*args: object) -> object:
        bad = next(count) == failing
        if bad and when == "before":
            raise TargetError("injected")
        result = call(*args)  # type: ignore[arg-type]
        if bad:
            raise TargetError("injected")
        return result

    monkeypatch.setattr(program._engine, "call", broken)
    with pytest.raises(TargetError, match="injected"):
        session.run({"input_ids": ids[:, 5:] % 3 + 1})  # blocks 8, 3, 3
    monkeypatch.setattr(program._engine, "call", call)
    assert session.position == 5
    for name, array in session.states.numpy().items():
        np.testing.assert_array_equal(array, before[name])
    tail = session.run({"input_ids": ids[:, 5:]})["logits"]
    want, states = reference(ids)
    np.testing.assert_allclose(np.concatenate([head, tail], 1), want, rtol=1e-6)
    assert_states(session, states)


def test_failure_while_reading_outputs(cpu: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    session, ids = cpu.session(), some_ids(1, 6)
    session.run({"input_ids": ids[:, :2]})

    def broken(*args: object) -> object:
        raise TargetError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(cpu.device, "read_rows", broken)
        with pytest.raises(TargetError, match="injected"):
            session.run({"input_ids": ids[:, 2:]})
    assert session.position == 2
    np.testing.assert_allclose(session.run({"input_ids": ids[:, 2:]})["logits"], reference(ids)[0][:, 2:], rtol=1e-6)


def test_context_full(cpu: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    session, ids = cpu.session(), some_ids(1, 25)
    session.run({"input_ids": ids[:, :20]})
    before = session.states.numpy()

    def never(*args: object) -> object:
        raise AssertionError("something ran")

    with monkeypatch.context() as patch:
        patch.setattr(cpu._engine, "call", never)
        with pytest.raises(StateError) as caught:
            session.run({"input_ids": ids[:, 20:]})
    assert "context full, got 20 + 5 tokens, expected at most 24" in str(caught.value)
    assert session.position == 20
    for name, array in session.states.numpy().items():
        np.testing.assert_array_equal(array, before[name])
    session.run({"input_ids": ids[:, 20:24]})
    assert_states(session, reference(ids[:, :24])[1])
    with pytest.raises(StateError, match="got 24 \\+ 1"):
        session.run({"input_ids": ids[:, 24:]})


def test_model_limit() -> None:
    hybrid = open_form(Hybrid())
    text = replace(hybrid.manifest(), context_limit=4).to_json()
    session = Program.load(hybrid.compile(text)).session()
    with pytest.raises(StateError, match="context full, got 0 \\+ 5 tokens, expected at most 4; reset the session"):
        session.run({"input_ids": some_ids(1, 5)})


def test_callers_mask_and_positions(load: Load) -> None:
    session, ids = load(batch=2).session(), some_ids(2, 12)
    want = reference(ids)[0]
    steps = np.broadcast_to(np.arange(12), (2, 12))
    first = session.run(
        {"input_ids": ids[:, :7], "attention_mask": np.ones((2, 7), np.int64), "position_ids": steps[:, :7]}
    )
    whole = {"input_ids": ids[:, 7:10], "attention_mask": np.ones((2, 10), np.int64), "position_ids": steps[:, 7:10]}
    second = session.run(whole)
    third = session.run({"input_ids": ids[:, 10:], "attention_mask": np.ones((2, 2), np.int64)})
    got = np.concatenate([part["logits"] for part in (first, second, third)], 1)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    moved = load(batch=2).session().run({"input_ids": ids, "position_ids": steps + 1})["logits"]
    assert not np.allclose(moved, want)


def test_padding_is_refused(cpu: Program) -> None:
    """Table 2 #23."""
    session = cpu.session()
    with pytest.raises(InputError, match="attention_mask: padding would enter the state"):
        session.run({"input_ids": some_ids(1, 3), "attention_mask": np.array([[0, 1, 1]])})
    assert session.position == 0


def test_padding_without_recurrent_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pure attention model may be padded, and later calls remember the masked columns."""
    program = Program.load(Hybrid(batch=2).compile())
    real = program.manifest
    kinds = tuple(replace(s, kind="kv_cache" if s.kind == "kv_cache" else "other") for s in real.states)
    monkeypatch.setattr(program._engine, "manifest", replace(real, states=kinds))
    session, ids = program.session(), some_ids(2, 10)
    mask = np.ones((2, 10), np.int64)
    mask[0, :3] = 0
    steps = np.broadcast_to(np.arange(10), (2, 10))
    want = reference(ids, mask)[0]
    parts = [
        session.run({"input_ids": ids[:, :4], "attention_mask": mask[:, :4], "position_ids": steps[:, :4]}),
        session.run({"input_ids": ids[:, 4:8], "position_ids": steps[:, 4:8]}),
        session.run({"input_ids": ids[:, 8:], "attention_mask": mask, "position_ids": steps[:, 8:]}),
    ]
    np.testing.assert_allclose(np.concatenate([part["logits"] for part in parts], 1), want, rtol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, "input_ids: missing input"),
        ({"ids": [[1]]}, "no such input, got ids, expected input_ids, attention_mask, position_ids"),
        ({"input_ids": [[1]], "past.0.rec": np.zeros((1, 4), np.float32)}, "a session has its own states"),
        (
            {"input_ids": np.full((1, 2), 1 << 63, np.uint64)},
            "input_ids[0, 0]: value out of range, got 9223",
        ),
        ({"input_ids": np.ones((1, 2))}, "input_ids: wrong dtype, got float64, expected int64"),
        ({"input_ids": [[1.5]]}, "input_ids: wrong dtype, got float64"),
        ({"input_ids": [[1], [2, 3]]}, "input_ids: rows of different length, got 1 and 2, expected one length"),
        ([[1, 2]], "inputs are given by name, got list, expected {'input_ids': ...}"),
        ({"input_ids": None}, "input_ids: "),
        ({"input_ids": 1}, "wrong shape, got [], expected [batch_size=1, sequence_length]"),
        ({"input_ids": [1, 2], "position_ids": [0, 1]}, "position_ids: wrong shape, got [2]"),
        ({"input_ids": [[1], [2]]}, "wrong shape, got [2, 1], expected [batch_size=1, sequence_length]"),
        (
            {"input_ids": [[1, 2]], "position_ids": [[0]]},
            "position_ids: wrong shape, got [1, 1], expected [batch_size=1, ",
        ),
        (
            {"input_ids": [[1, 2]], "attention_mask": [[1]]},
            "attention_mask: wrong shape, got [1, 1], expected [batch_size",
        ),
        ({"input_ids": [[1, 2]], "attention_mask": [1, 1]}, "attention_mask: wrong shape"),
    ],
)
def test_wrong_inputs(cpu: Program, inputs: Any, words: str) -> None:
    session = cpu.session()
    for _ in range(2):
        with pytest.raises(InputError) as caught:
            session.run(inputs)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    assert session.position == 0
    assert session.run({"input_ids": [[1, 2]]})["logits"].shape == (1, 2, 4)  # plain lists are fine


def test_open_batch() -> None:
    program = Program.load(open_form(Hybrid()).compile())
    session = program.session()
    with pytest.raises(StateError, match=r"program\.session"):
        session.states.numpy()
    session.run({"input_ids": some_ids(2, 3)})
    with pytest.raises(InputError, match="wrong shape, got \\[1, 1\\], expected \\[batch_size=2"):
        session.run({"input_ids": some_ids(1, 1)})
    session.reset()
    session.run({"input_ids": some_ids(3, 2)})
    assert session.states["past.1.kv"].numpy().shape == (3, 2, 2, 4)
    assert program.session(batch=4).states["past.1.kv"].numpy().shape == (4, 2, 0, 4)
    with pytest.raises(InputError, match="at least 1"):
        program.session(batch=0)


def test_fixed_batch(cpu: Program) -> None:
    with pytest.raises(InputError, match="got 2, expected 1"):
        cpu.session(batch=2)
    with pytest.raises(StateError, match=r"past\.0\.rec, past\.0\.conv, past\.1\.kv"):
        cpu.session().states["past"].numpy()


@pytest.mark.parametrize("rows", [1, 2])
def test_greedy(rows: int) -> None:
    program, ids = Program.load(Hybrid(batch=rows).compile()), some_ids(rows, 6)
    tokens = list(greedy(program.session(), ids[0], 8) if rows == 1 else greedy_rows(program.session(), ids, 8))
    want = ids
    for _ in range(8):
        want = np.concatenate([want, reference(want)[0][:, -1].argmax(-1)[:, None]], 1)
    got = [[token] if isinstance(token, int) else list(token) for token in tokens]
    assert np.array(got).T.tolist() == want[:, 6:].tolist()
    assert len({tuple(row) for row in got}) > 1  # not the same token every time
    with pytest.raises(InputError, match="the prompt must have tokens"):
        next(greedy(program.session(), [], 3))


def test_greedy_refuses_nan(cpu: Program) -> None:
    session = cpu.session()
    session._line[-1].moving[0] = cpu.device.upload(np.full((1, 4), np.nan, np.float32), "float32")
    with pytest.raises(StateError, match="the logits are NaN"):
        next(greedy(session, [1, 2], 1))


def test_large_outputs_do_not_stay_alive(cpu: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """States share one allocation with the outputs of their call; they move out when those are large."""
    session, ids = cpu.session(), some_ids(1, 16)
    monkeypatch.setattr("linattn.runtime.holding._COMPACT_BYTES", 1)
    np.testing.assert_allclose(feed(session, ids, (9, 7)), reference(ids)[0], rtol=1e-6)
    assert_states(session, reference(ids)[1])


def test_three_axis_positions() -> None:
    """MRotaryEmbedding's position_ids are [3, B, T], all axes alike for text."""
    from linattn.runtime.binding import Sizes, positions

    manifest: Manifest = Hybrid(batch=2).manifest()
    spec = replace(manifest.inputs[2], shape=(3, "batch_size", "sequence_length"))
    got = positions(manifest, spec, Sizes(manifest, tokens=4), 10, None)
    assert got.shape == (3, 2, 4)
    np.testing.assert_array_equal(got, np.broadcast_to([10, 11, 12, 13], (3, 2, 4)))
